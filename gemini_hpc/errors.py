"""The error tree: what the user is told in one line. The traceback shows under `--debug` only."""


class GeminiError(Exception):
    """Base of every error that this package raises on purpose."""


class UserError(GeminiError):
    """Bad input. The message is one line that ends with the next thing to do; command lines exit with 2."""
