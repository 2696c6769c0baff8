"""Text of this machine: the Python standard library's own sources, or what the user names. NumPy only."""

import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from gemini_hpc.data.corpus import MAX_CORPUS_BYTES, Corpus
from gemini_hpc.errors import UserError

SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests"})
"""Parts of the standard library's folder that are not the library, or differ between its installations."""

_HEAD_BYTES = 8192


def text_corpus(path: str | Sequence[str] | None) -> Corpus:
    """Read a text file, a directory's text files, or a list of both; None: the standard library's sources.

    Files are taken in the order of their names, a directory's hidden and binary ones left out, and the whole
    is cut at MAX_CORPUS_BYTES. Raises UserError when something is missing, unreadable, not text, or empty.
    """
    if path is None:
        python = f"Python {sys.version_info.major}.{sys.version_info.minor}"
        return joined(_standard_library(), f"the standard library of {python}")
    names = [path] if isinstance(path, str) else path
    return joined(_named(names), ", ".join(names) or "an empty list")


def joined(texts: Iterable[bytes], source: str) -> Corpus:
    """Lay texts end to end, as much as a corpus may hold. Raises UserError when there is nothing."""
    whole, count, cut = bytearray(), 0, ""
    for text in texts:
        whole += text
        count += bool(text)
        if len(whole) > MAX_CORPUS_BYTES:
            del whole[MAX_CORPUS_BYTES:]
            cut = f", cut at {MAX_CORPUS_BYTES >> 20} MiB"
            break
    if not whole:
        raise UserError(f"no text in {source}: name a text file or a directory of them in data.path")
    plural = "" if count == 1 else "s"
    origin = f"{source} ({count} text{plural}, {len(whole)} bytes{cut})"
    return Corpus(np.frombuffer(bytes(whole), dtype=np.uint8), origin)


def _standard_library() -> Iterator[bytes]:
    for file in _walk(sysconfig.get_paths()["stdlib"], SKIPPED_FOLDERS):
        if file.endswith(".py"):
            yield _read(file) or b""


def _named(names: Sequence[str]) -> Iterator[bytes]:
    for name in names:
        place = os.path.expanduser(name)
        if os.path.isdir(place):
            yield from (_read(file) or b"" for file in _walk(place))
        elif os.path.isfile(place):
            text = _read(place)
            if text is None:
                raise UserError(f"{name!r} (data.path) is not text: it has zero bytes; convert it to UTF-8")
            yield text
        else:
            raise UserError(f"no text at {name!r} (data.path): name a text file or a directory that exists")


def _walk(folder: str, skipped: frozenset[str] = frozenset()) -> Iterator[str]:
    """Every file below `folder` that is not hidden, by name; lazily, since it may be a home directory."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise _unreadable(folder, error) from error
    for entry in entries:
        if entry.name.startswith(".") or entry.name in skipped:
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(entry.path, skipped)
        elif entry.is_file():
            yield entry.path


def _read(file: str) -> bytes | None:
    """Return a file, as far as a corpus can use it; None when it is binary: text has no zero bytes."""
    try:
        with open(file, "rb") as stream:
            head = stream.read(_HEAD_BYTES)
            text = head if b"\0" in head else head + stream.read(MAX_CORPUS_BYTES)
    except OSError as error:
        raise _unreadable(file, error) from error
    return None if b"\0" in text else text


def _unreadable(place: str, error: OSError) -> UserError:
    reason = error.strerror or error
    return UserError(f"cannot read {place!r} (data.path): {reason}; name text that you may read")
