"""The exception for mistakes that the user can correct."""


class UserError(Exception):
    """Bad input or configuration. Its message is one line: what was expected and what was found.

    The command lines print it without a traceback and exit with code 2.
    """


def one_line(error: Exception) -> str:
    """Return a library's message as a part of that line."""
    return shortened(" ".join(str(error).split()))


def shortened(text: str, most: int = 200) -> str:
    """Return ``text``, or the beginning and the end of a longer one."""
    return text if len(text) <= most else f"{text[: most // 2 - 2]}...{text[1 - most // 2 :]}"
