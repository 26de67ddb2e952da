"""The one exception for a mistake the user can mend."""


class UserError(Exception):
    """Bad input or configuration. Its message is one line: what was expected and what was found.

    The command lines print it without a traceback and exit with code 2.
    """


def brief(error: Exception) -> str:
    """What a library said, as part of that one line."""
    return " ".join(str(error).split())[:200]
