"""The one exception for a mistake the user can mend."""


class UserError(Exception):
    """Bad input or configuration. Its message is one line: what was expected and what was found.

    The command lines print it without a traceback and exit with code 2.
    """


def one_line(error: Exception) -> str:
    """What a library said, as part of that one line."""
    return shortened(" ".join(str(error).split()))


def shortened(text: str, most: int = 200) -> str:
    """``text``, or the beginning and the end of a longer one."""
    return text if len(text) <= most else f"{text[: most // 2 - 2]}...{text[1 - most // 2 :]}"
