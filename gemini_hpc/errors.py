"""The error tree: what the user is told in one line. The traceback shows under `--debug` only."""

from collections.abc import Iterator
from contextlib import contextmanager


class GeminiError(Exception):
    """Base of every error that this package raises on purpose."""


class UserError(GeminiError):
    """Bad input. The message is one line that ends with the next thing to do; command lines exit with 2."""


@contextmanager
def parsing(what: str) -> Iterator[None]:
    """Say in one line that `what`, a file that anybody may have changed, is damaged, whatever reading it raises."""
    try:
        yield
    except GeminiError:
        raise
    except (
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        ArithmeticError,
        StopIteration,
        RecursionError,
    ) as error:
        raise UserError(
            f"{what} cannot be used ({type(error).__name__}): it is damaged, or of another version: move it away"
        ) from error
