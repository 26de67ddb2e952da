"""What every command line shares: ``--config``, ``key=value`` overrides, ``--dry-run``, help and honest exit codes.

``python -m ldm_smd.cli > docs/tools.md`` writes the help of all tools.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import indent
from typing import TypeVar
from unittest import mock

from .config import Setting, dump_config, load_config, settings
from .errors import UserError

Config = TypeVar("Config")


def run_tool(schema: type[Config], main: Callable[[Config], None], description: str) -> int:
    """Parse the command line, load the configuration, run ``main(config)``; returns the exit code.

    0 done, 2 a mistake of the user's (one line on standard error, no traceback), 130 interrupted.
    """
    parser = argparse.ArgumentParser(
        description=description,
        epilog="settings:\n" + "\n".join(map(described, settings(schema))),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with settings")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved settings as YAML and exit")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, before those of the file")
    arguments = parser.parse_intermixed_args()
    code, said = 0, ""
    try:
        config = load_config(schema, arguments.config, arguments.overrides)
        if arguments.dry_run:
            print(dump_config(config), end="")
            return 0
        main(config)
    except UserError as error:
        code, said = 2, f"error: {error}"
    except KeyboardInterrupt:
        code, said = 130, "interrupted"
    # Last of all: with the exception go the frames that hold progress bars, which end their line.
    if said:
        print(f"{parser.prog}: {said}", file=sys.stderr)
    return code


def described(setting: Setting) -> str:
    """A setting for --help: name, default, and what its docstring says."""
    value = "(required)" if setting.default is None else f"= {setting.default}"
    return f"  {setting.name} {value}" + (f"\n{indent(setting.text, ' ' * 6)}" if setting.text else "")


def all_help(tools: Path) -> str:
    """The help of every tool, as Markdown."""
    parts = ["# The tools\n\nWhat `--help` prints (`python -m ldm_smd.cli > docs/tools.md`).\n"]
    for path in sorted(tools.glob("*.py")):
        out = io.StringIO()
        # argparse folds lines by the terminal's width.
        with (
            mock.patch.object(sys, "argv", [path.name, "--help"]),
            mock.patch.dict(os.environ, {"COLUMNS": "120"}),
            contextlib.redirect_stdout(out),
            contextlib.suppress(SystemExit),
        ):
            runpy.run_path(str(path), run_name="__main__")
        parts.append(f"## {path.name}\n\n```\n{out.getvalue().strip()}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    print(all_help(Path("tools")), end="")
