"""UserError: the exception for mistakes that the user can correct."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class UserError(Exception):
    """Bad input or configuration. Its message is one line: what was expected and what was found.

    The command lines print it without a traceback and exit with code 2.
    """


def one_line(error: Exception) -> str:
    """Return the message of a library's exception on one line, to include in that of a UserError."""
    return shortened(" ".join(str(error).split()))


def shortened(text: str, most: int = 200) -> str:
    """Return ``text``, with its middle replaced by dots if it is longer than ``most``."""
    return text if len(text) <= most else f"{text[: most // 2 - 2]}...{text[1 - most // 2 :]}"


@contextmanager
def renamed_settings(names: Mapping[str, str]) -> Iterator[None]:
    """Rename settings in the message of a UserError: shared code names ``images``, although it reads ``held_out``.

    Args:
        names: the setting to name in place of each. The first that the message begins with is used.
    """
    try:
        yield
    except UserError as error:
        text = str(error)
        for known, actual in names.items():
            if text.startswith((f"{known}.", f"{known}:")):
                raise UserError(actual + text.removeprefix(known)) from error
        raise
