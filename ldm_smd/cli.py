"""What every command line shares: ``--config``, ``key=value`` overrides, ``--dry-run`` and honest exit codes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import TypeVar

from .config import dump_config, load_config
from .errors import UserError

Config = TypeVar("Config")


def run_tool(schema: type[Config], main: Callable[[Config], None], description: str) -> int:
    """Parse the command line, load the configuration, run ``main(config)``; returns the exit code.

    0 done, 2 a mistake of the user's (one line on standard error, no traceback), 130 interrupted.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file; keys as --dry-run prints them")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved configuration and exit")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides, as in model.channels=64")
    arguments = parser.parse_intermixed_args()
    try:
        config = load_config(schema, arguments.config, arguments.overrides)
        if arguments.dry_run:
            print(dump_config(config), end="")
            return 0
        main(config)
    except UserError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return 130
    return 0
