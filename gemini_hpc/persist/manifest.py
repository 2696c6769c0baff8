"""Checkpoints as directories: publish one, find the newest, remove the old.

A directory is a checkpoint if and only if it holds a valid manifest.json. That file is written last, by a
rename, so whoever dies on the way leaves a directory that nobody mistakes for a checkpoint.
"""

import errno
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemini_hpc.errors import GeminiError

MANIFEST = "manifest.json"

_FORMAT = 1
_STEP_DIR = re.compile(r"step-([0-9]{8,18})")
_SHARD_NAME = re.compile(r"rank-[0-9]{4,18}\.h5")
_MANIFEST_BYTES_MAX = 64 << 20  # some hundred thousand ranks


class PersistError(GeminiError):
    """A file of the persistent tier cannot be written, or is not what it should be. Names it, in one line."""


@dataclass(frozen=True)
class ShardFile:
    """One rank's file in a checkpoint: `nbytes` is the file's size, `checksum` that of the payload in it."""

    rank: int
    name: str
    nbytes: int
    checksum: int


@dataclass(frozen=True)
class Manifest:
    """A published checkpoint. `files[rank]` is the file of that rank; `path` is the directory."""

    path: Path
    step: int
    world_size: int
    run_id: str
    generation: int
    fingerprint: str
    files: tuple[ShardFile, ...]

    @property
    def nbytes(self) -> int:
        """The size of all files."""
        return sum(file.nbytes for file in self.files)


def checkpoint_dir(run_dir: Path, step: int) -> Path:
    """Return the directory of the checkpoint of `step`."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def shard_path(run_dir: Path, step: int, rank: int) -> Path:
    """Return the path of `rank`'s file in the checkpoint of `step`."""
    return checkpoint_dir(run_dir, step) / f"rank-{rank:04d}.h5"


def publish(
    run_dir: Path,
    step: int,
    entries: Sequence[ShardFile],
    *,
    world_size: int,
    run_id: str,
    generation: int,
    fingerprint: str,
) -> Path:
    """Make the files of `entries` the checkpoint of `step`, and return the path of its manifest.

    Blocks on the file system (fsync). Raises PersistError, and publishes nothing, unless there is exactly one
    entry for every rank and every file exists with the size that its entry names.
    """
    directory = checkpoint_dir(run_dir, step)
    files = tuple(sorted(entries, key=lambda entry: entry.rank))
    _check(Manifest(directory, step, world_size, run_id, generation, fingerprint, files))
    content = {
        "format": _FORMAT,
        "step": step,
        "world_size": world_size,
        "run_id": run_id,
        "generation": generation,
        "fingerprint": fingerprint,
        "files": [
            # hexadecimal: other readers of JSON round whole numbers above 2**53
            {"rank": f.rank, "name": f.name, "bytes": f.nbytes, "checksum": f"{f.checksum:016x}"}
            for f in files
        ],
    }
    target = directory / MANIFEST
    with replacing(target) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
    sync_directory(directory.parent)  # the entry of the checkpoint's own directory
    return target


def newest(run_dir: Path, below: int | None = None) -> Manifest | None:
    """Return the newest valid checkpoint (of a step before `below`), judged by names and sizes; reading verifies."""
    valid, _ = survey(run_dir)
    return next((manifest for manifest in valid if below is None or manifest.step < below), None)


def survey(run_dir: Path) -> tuple[list[Manifest], list[str]]:
    """Return all valid checkpoints, newest first, and for every other directory one line why it is none.

    Raises PersistError when the directories cannot be listed.
    """
    valid, rejected = [], []
    for _, directory in reversed(_step_dirs(run_dir)):
        try:
            valid.append(_load(directory))
        except PersistError as error:
            rejected.append(str(error))
    return valid, rejected


def published(run_dir: Path) -> list[Path]:
    """Return all checkpoints that were ever published and are still there, valid or damaged, oldest first."""
    return [directory for _, directory in _step_dirs(run_dir) if os.path.lexists(directory / MANIFEST)]


def prune(run_dir: Path, keep: int) -> list[Path]:
    """Remove old checkpoints but the newest `keep` (at least one), and return the directories that are gone.

    Unpublished directories older than the newest checkpoint were abandoned by their writers and go too. A
    directory whose manifest is there but does not hold is left for the user to look at. What cannot be
    removed now (a writer that is still at it, a file system in trouble) is tried again next time.
    """
    valid, _ = survey(run_dir)
    if not valid:
        return []
    old = [manifest.path for manifest in valid[max(keep, 1) :]]
    abandoned = [
        directory
        for step, directory in _step_dirs(run_dir)
        if step < valid[0].step and not os.path.lexists(directory / MANIFEST)
    ]
    removed = []
    for directory in old + abandoned:
        try:
            (directory / MANIFEST).unlink(missing_ok=True)  # first, so that half of it is never a checkpoint
            shutil.rmtree(directory)
            removed.append(directory)
        except OSError:
            continue
    return removed


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a new temporary file beside `path`, which takes its place if all goes well.

    On leaving: fsync, rename, fsync of the directory. On any error the temporary file is removed, `path`
    stays as it was, and an OSError becomes a PersistError.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    except OSError as error:
        raise PersistError(f"cannot write {path}: {reason(error)}") from error
    try:
        yield Path(name)
        os.fsync(descriptor)  # of a descriptor opened before the first write, so that no failed write is missed
        os.rename(name, path)
        sync_directory(path.parent)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise PersistError(f"cannot write {path}: {reason(error)}") from error
        raise
    finally:
        os.close(descriptor)


def sync_directory(path: Path) -> None:
    """Make the names in directory `path` durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def plain_size(path: Path) -> int:
    """Return the size of a regular file; OSError for anything else: a link leads elsewhere, a pipe waits for ever."""
    status = os.lstat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is no plain file")
    return status.st_size


def reason(error: BaseException) -> str:
    """Return why in a few words, on one line; HDF5 hides the error number in the middle of a long message."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror and error.errno:
        return error.strerror
    hidden = re.search(r"errno = (\d+)", text)
    return os.strerror(int(hidden[1])) if hidden else text[:200] or type(error).__name__


def _step_dirs(run_dir: Path) -> list[tuple[int, Path]]:
    try:
        names = os.listdir(run_dir / "checkpoints")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise PersistError(f"cannot list {run_dir / 'checkpoints'}: {reason(error)}") from error
    found = [(match, run_dir / "checkpoints" / name) for name in names if (match := _STEP_DIR.fullmatch(name))]
    return sorted((int(match[1]), path) for match, path in found)


def _load(directory: Path) -> Manifest:
    """Read and check the manifest of `directory`. Raises PersistError that says what is wrong with it."""
    path = directory / MANIFEST
    try:
        if plain_size(path) > _MANIFEST_BYTES_MAX:
            raise ValueError("its size")
        raw = json.loads(path.read_bytes())
        if raw["format"] != _FORMAT:
            raise ValueError(f"format {ascii(raw['format'])[:100]}")
        files = tuple(
            ShardFile(_int(f["rank"]), str(f["name"]), _int(f["bytes"]), _checksum(f["checksum"])) for f in raw["files"]
        )
        manifest = Manifest(
            directory,
            _int(raw["step"]),
            _int(raw["world_size"]),
            str(raw["run_id"]),
            _int(raw["generation"]),
            str(raw["fingerprint"]),
            files,
        )
    except FileNotFoundError as error:
        raise PersistError(f"{directory} was never published: it has no {MANIFEST}") from error
    except OSError as error:
        raise PersistError(f"cannot read {path}: {reason(error)}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise PersistError(f"{path} is damaged: {type(error).__name__} {reason(error)}") from error
    _check(manifest)
    return manifest


def _check(manifest: Manifest) -> None:
    if checkpoint_dir(manifest.path.parents[1], manifest.step) != manifest.path:
        raise PersistError(f"{manifest.path / MANIFEST} belongs to step {manifest.step}")
    ranks = [file.rank for file in manifest.files]
    if not ranks or len(ranks) != manifest.world_size or ranks != list(range(len(ranks))):
        raise PersistError(f"{manifest.path} does not have one file for each of {manifest.world_size} ranks")
    for file in manifest.files:
        if not _SHARD_NAME.fullmatch(file.name):
            raise PersistError(f"{manifest.path / MANIFEST} names a file elsewhere: {ascii(file.name)[:100]}")
        path = manifest.path / file.name
        try:
            size = plain_size(path)
        except OSError as error:
            raise PersistError(f"cannot find {path}: {reason(error)}") from error
        if size != file.nbytes:
            raise PersistError(f"{path} has {size} bytes instead of {file.nbytes}")


def _int(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{ascii(value)[:100]} where a whole number belongs")
    return value


def _checksum(value: Any) -> int:
    if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{16}", value):
        raise ValueError(f"{ascii(value)[:100]} where a checksum belongs")
    return int(value, 16)
