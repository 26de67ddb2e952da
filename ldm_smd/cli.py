"""Common parts of all command lines: ``--config``, ``key=value`` overrides, ``--dry-run``, help and exit codes.

``python -m ldm_smd.cli > docs/tools.md`` writes the help of all tools.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from errno import EACCES, EDQUOT, EEXIST, EIO, EISDIR, ENAMETOOLONG, ENOENT, ENOSPC, ENOTDIR, EPERM, EROFS
from pathlib import Path
from textwrap import indent
from typing import Any, TypeVar

import ldm_smd

from .commands import BY_NAME, COMMANDS, for_console
from .config import Setting, dump_config, load_config, settings
from .errors import UserError, shortened
from .memory import keep_freed_memory

Config = TypeVar("Config")
CONSOLE = "ldm-smd"
FILE_ERRORS = {EACCES, EDQUOT, EEXIST, EIO, EISDIR, ENAMETOOLONG, ENOENT, ENOSPC, ENOTDIR, EPERM, EROFS}
"""Operating system errors that are about the user's files."""
HEAD = f"""# The tools

The output of `--help` (made by `python -m ldm_smd.cli > docs/tools.md`). After `pip install .` each tool is also a command:
`{CONSOLE} train-autoencoder` (or `python -m ldm_smd train-autoencoder`) is the same as `python tools/train_autoencoder.py`.

Completion of sub-commands, flags, settings and their values, in bash (a line for `~/.bashrc`) or zsh:

```sh
eval "$(register-python-argcomplete {CONSOLE})"
```
"""
"""Head of docs/tools.md."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sub-command in ``arguments``, by default those of the process; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if "_ARGCOMPLETE" in os.environ:
        from .completion import complete

        complete(console_parser())  # ends the process
    if arguments and arguments[0] in BY_NAME:
        return run_command(arguments[0], arguments[1:], console=True)
    if arguments and not arguments[0].startswith("-"):
        near = difflib.get_close_matches(arguments[0], BY_NAME, n=1, cutoff=0.0)[0]
        print(f"{CONSOLE}: error: unknown command {arguments[0]!r}; the nearest known command is {near!r}", file=sys.stderr)
        return 2
    parser = console_parser()
    parser.parse_args(arguments)
    parser.print_help()
    return 0


def run_command(name: str, arguments: Sequence[str] | None = None, console: bool = False) -> int:
    """Run a command with ``arguments``, by default those of the process; returns the exit code.

    Args:
        console: whether it was called as a sub-command of ldm-smd instead of its script in tools/.
    """
    command = BY_NAME[name]
    prog, wording = (f"{CONSOLE} {name}", for_console) if console else (None, str)
    return run_tool(command.schema, command.run, command.description, arguments, prog, wording)


def run_tool(
    schema: type[Config],
    main: Callable[[Config], object],
    description: str,
    arguments: Sequence[str] | None = None,
    prog: str | None = None,
    wording: Callable[[str], str] = str,
) -> int:
    """Parse the command line, load the configuration, run ``main(config)``; returns the exit code.

    0: success; 2: UserError (one line on standard error, no traceback); 130: interrupted.

    Args:
        arguments: None for those of the process.
        prog: name of the command; None for the name of the script.
        wording: applied to all texts about the tools.
    """
    parser = SettingsParser(
        lambda: wording("settings:\n" + "\n".join(map(described, settings(schema)))),
        prog=prog,
        description=wording(description),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_arguments(parser)
    options = parser.parse_intermixed_args(arguments)
    code, message = 0, ""
    try:
        config = load_config(schema, options.config, options.overrides)
        if options.dry_run:
            print(dump_config(config), end="")
            return 0
        keep_freed_memory()
        main(config)
    except UserError as error:
        code, message = 2, f"error: {wording(str(error))}"
    except OSError as error:
        if error.errno not in FILE_ERRORS:
            raise
        where = f"{shortened(str(error.filename))}: " if error.filename is not None else ""
        code, message = 2, f"error: expected readable and writable files, found {where}{error.strerror}"
    except KeyboardInterrupt:
        code, message = 130, "interrupted"
    # Printed last, because progress bars end their line only when the frames of the exception are gone.
    if message:
        print(f"{parser.prog}: {message}", file=sys.stderr)
    return code


class SettingsParser(argparse.ArgumentParser):
    """Lists the settings at the end of its help. Their docstrings are read from the sources only when it is printed."""

    def __init__(self, list_settings: Callable[[], str], **options: Any) -> None:
        super().__init__(**options)
        self.list_settings = list_settings

    def format_help(self) -> str:
        self.epilog = self.list_settings()
        return super().format_help()


def add_arguments(parser: argparse.ArgumentParser) -> argparse.Action:
    """Add the arguments of all commands; returns the positional one, ``key=value``."""
    parser.add_argument("--config", metavar="FILE", help="YAML file with settings")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved settings as YAML and exit")
    return parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings; they override those of the file")


def console_parser() -> argparse.ArgumentParser:
    """Make the parser of ldm-smd without a sub-command, whose help lists the sub-commands."""
    widest = max(map(len, BY_NAME))
    commands = "\n".join(f"  {command.name:{widest}}  {command.summary}" for command in COMMANDS)
    parser = argparse.ArgumentParser(
        prog=CONSOLE,
        usage=f"{CONSOLE} [-h] [--version] COMMAND ...",
        description=ldm_smd.__doc__,
        epilog=f"commands:\n{commands}\n\n{CONSOLE} COMMAND --help shows its description, examples and all settings.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"{CONSOLE} {ldm_smd.__version__}")
    return parser


def described(setting: Setting) -> str:
    """Describe a setting for --help: name, default, bounds and docstring."""
    value = "(required)" if setting.default is None else f"= {setting.default}"
    if setting.bounds:
        value += f"  ({setting.bounds})"
    return f"  {setting.name} {value}" + (f"\n{indent(setting.text, ' ' * 6)}" if setting.text else "")


def all_help(tools: Path) -> str:
    """Return the help of every tool, as Markdown."""
    from unittest import mock  # here, because it imports asyncio

    parts = [HEAD]
    for path in sorted(tools.glob("*.py")):
        out = io.StringIO()
        # argparse wraps lines at the width of the terminal.
        with (
            mock.patch.object(sys, "argv", [path.name, "--help"]),
            mock.patch.object(sys, "path", [str(tools), *sys.path]),  # as for a script that is run
            mock.patch.dict(os.environ, {"COLUMNS": "120"}),
            contextlib.redirect_stdout(out),
            contextlib.suppress(SystemExit),
        ):
            runpy.run_path(str(path), run_name="__main__")
        parts.append(f"## {path.name}\n\n```\n{out.getvalue().strip()}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    print(all_help(Path("tools")), end="")
