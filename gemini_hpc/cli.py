"""What all command lines share: an error is one line and an exit status, the traceback only under --debug."""

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from gemini_hpc.errors import GeminiError, UserError


class Parser(argparse.ArgumentParser):
    """Arguments that cannot be are bad input like any other."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see python -m {self.prog} --help")


def split_settings(settings: Sequence[str]) -> tuple[str | None, list[str]]:
    """Return the configuration file, if one is named, and the overrides. Raises UserError for more than one file."""
    files = [setting for setting in settings if "=" not in setting]
    if len(files) > 1:
        raise UserError(f"one configuration file at most, not {', '.join(files)}; overrides have the form key=value")
    return (files[0] if files else None), [setting for setting in settings if "=" in setting]


def run_command(command: Callable[[list[str]], int]) -> int:
    """Call `command` with the arguments; return its exit status: 2 for bad input, 1 for a failure, 130 for Ctrl-C."""
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    try:
        return command([argument for argument in arguments if argument != "--debug"])
    except GeminiError as error:
        if debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # nobody reads any more, as after `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
