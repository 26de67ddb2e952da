"""Shell completion of the console command with argcomplete: sub-commands, flags, settings and their values."""

from __future__ import annotations

import argparse

import argcomplete

from .cli import add_arguments
from .commands import COMMANDS, for_console
from .config import settings


class SettingCompleter:
    """Completes ``key=`` and the values of settings with few choices."""

    def __init__(self, schema: type) -> None:
        self.settings = {setting.name: setting for setting in settings(schema) if "[]" not in setting.name}

    def __call__(self, prefix: str, **_: object) -> dict[str, str]:
        """Return completions of ``prefix``, each with the description that zsh shows."""
        key, equals, _value = prefix.partition("=")
        if not equals:
            return {f"{name}=": for_console(setting.text).partition("\n")[0] for name, setting in self.settings.items()}
        return {f"{key}={value}": "" for value in self.settings[key].choices} if key in self.settings else {}


def complete(parser: argparse.ArgumentParser) -> None:
    """Print completions for the shell and end the process."""
    commands = parser.add_subparsers()
    for command in COMMANDS:
        overrides = add_arguments(commands.add_parser(command.name, help=command.summary))
        overrides.completer = SettingCompleter(command.schema)  # type: ignore[attr-defined]  # where argcomplete looks
    argcomplete.autocomplete(parser, always_complete_options=False)
