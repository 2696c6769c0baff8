"""A private folder on the shared file system: what the login node and the nodes of `doctor`'s job tell each other."""

import errno
import json
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from gemini_hpc.errors import GeminiError

POLL_S = 0.01


class Folder:
    """Files of JSON by their names. Each has one writer; what is read is whole, or not there yet."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def post(self, name: str, value: Any) -> None:
        """Write a file, in place of an earlier one of that name."""
        temporary = self.path / f".{name}.tmp"
        temporary.write_text(json.dumps(value))
        os.replace(temporary, self.path / name)

    def add(self, name: str, value: Any) -> None:
        """Append a line to a file."""
        with (self.path / name).open("a") as file:  # closed at once: only then NFS shows it to others
            file.write(json.dumps(value) + "\n")

    def read(self, name: str) -> Any:
        """Return what was posted; None = nothing yet."""
        text = self._text(name)
        with suppress(ValueError):
            return json.loads(text)
        return None

    def lines(self, name: str) -> list[Any]:
        """Return what was added."""
        return [json.loads(line) for line in self._text(name).splitlines(keepends=True) if line.endswith("\n")]

    def wait(self, name: str, timeout_s: float) -> Any:
        """Return what is posted within `timeout_s` seconds. Raises GeminiError when nothing is."""
        deadline = time.monotonic() + timeout_s
        while (value := self.read(name)) is None:
            if time.monotonic() > deadline:
                raise GeminiError(f"no {name} in {self.path} within {timeout_s:g} s")
            time.sleep(POLL_S)
        return value

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def _text(self, name: str) -> str:
        try:
            return (self.path / name).read_text()
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ESTALE):
                raise
        # NFS believes for half a minute what was not there; who changes the folder itself has to look again
        with suppress(OSError):
            look = self.path / f".look-{os.uname().nodename}-{os.getpid()}"
            look.touch()
            look.unlink()
        return ""
