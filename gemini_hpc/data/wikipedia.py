"""English Wikipedia through Hugging Face `datasets`, from the network or a local copy in the same format.

`datasets` imports torch when it streams, so `submit` reads through a child process: this module's `main`.
"""

import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gemini_hpc.data.corpus import MAX_CORPUS_BYTES, Corpus
from gemini_hpc.data.text import joined, text_corpus
from gemini_hpc.errors import UserError

DATASET, SUBSET = "wikimedia/wikipedia", "20231101.en"

PREPARE_S = 1800
"""How long the first 32 MiB may take to arrive."""

_ALTERNATIVES = "name a local copy in data.path, or take data.source=text or data.source=synthetic"


def wikipedia_corpus(path: str | Sequence[str] | None) -> Corpus:
    """Read articles, as many as a corpus holds, with an empty line between them.

    `path`: a dataset written by `save_to_disk`, or Parquet or JSON-lines files (or a directory of them) with
    a column `text`; None: the Hub's dataset, kept in the user's Hugging Face cache once it has been fetched.
    Raises UserError for a missing package, network, file or column.
    """
    if path:
        names = [path] if isinstance(path, str) else path
        rows = (row for name in names for row in _local_rows(name))
        return joined(_articles(rows, ", ".join(names)), ", ".join(names))
    cached = _cache_file()
    if not cached.exists():
        _fetch(cached)
    return text_corpus(str(cached))


def prepare(path: str | Sequence[str] | None, seq_len: int) -> str:
    """Read the corpus in a child process, fetch it where it is not here yet; return its fingerprint.

    Raises UserError for a text too short, with the child's reason, or when it takes longer than PREPARE_S.
    """
    names = [path] if isinstance(path, str) else path or []
    command = [sys.executable, "-m", "gemini_hpc.data.wikipedia", str(seq_len), *names]
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=PREPARE_S)
    except subprocess.TimeoutExpired as error:
        raise UserError(f"Wikipedia did not arrive within {PREPARE_S} s: {_ALTERNATIVES}") from error
    if child.returncode == 0:
        return child.stdout.splitlines()[-1]
    reason = (child.stderr.strip().splitlines() or [f"exit status {child.returncode}"])[-1]
    raise UserError(reason if child.returncode == 2 else f"cannot read Wikipedia ({reason}): {_ALTERNATIVES}")


def main(arguments: list[str]) -> int:
    """Read the corpus named by SEQ_LEN [PATH...] and print its fingerprint; on bad input one line, and 2."""
    seq_len, names = int(arguments[0]), arguments[1:]
    try:
        print(wikipedia_corpus(names or None).require(seq_len).fingerprint)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _fetch(cached: Path) -> None:
    """Stream the first articles from the Hub into `cached`, which appears whole or not at all."""
    datasets = _package("datasets")
    try:
        rows = datasets.load_dataset(DATASET, SUBSET, split="train", streaming=True)
        text = joined(_articles(rows, DATASET), DATASET).symbols.tobytes()
        cached.parent.mkdir(parents=True, exist_ok=True)
        partial = cached.with_suffix(f".{os.getpid()}")
        partial.write_bytes(text)
        partial.replace(cached)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"cannot fetch {DATASET} ({_first_line(error)}): {_ALTERNATIVES}") from error


def _local_rows(name: str) -> Iterator[Mapping[str, Any]]:
    place = Path(os.path.expanduser(name))
    if not os.path.exists(place):
        raise UserError(f"no dataset at {name!r} (data.path): name one that exists, or leave data.path out")
    datasets = _package("datasets")
    try:
        if (place / "state.json").exists() or (place / "dataset_dict.json").exists():
            loaded = datasets.load_from_disk(str(place))
            yield from loaded if isinstance(loaded, datasets.Dataset) else loaded["train"]
            return
        files = [place] if place.is_file() else sorted(place.rglob("*"))
        for suffix, reader in ((".parquet", "parquet"), (".jsonl", "json")):
            matching = [str(file) for file in files if file.suffix == suffix]
            if matching:
                yield from datasets.load_dataset(reader, data_files=matching, split="train", streaming=True)
                return
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"cannot read the dataset {name!r} (data.path): {_first_line(error)}") from error
    raise UserError(f"no dataset in {name!r} (data.path): give one made by save_to_disk, or .parquet or .jsonl files")


def _articles(rows: Iterable[Mapping[str, Any]], source: str) -> Iterator[bytes]:
    for row in rows:
        if not isinstance(row.get("text"), str):
            raise UserError(f"{source} has no text in a column `text`, only {', '.join(row)}: rename the column")
        yield row["text"].replace("\0", "").encode(errors="replace") + b"\n\n"


def _cache_file() -> Path:
    constants = _package("huggingface_hub.constants")
    size = f"{MAX_CORPUS_BYTES >> 20}MiB"
    return Path(constants.HF_HOME) / "gemini_hpc" / f"wikipedia-{SUBSET}-{size}.txt"


def _package(name: str) -> Any:
    """Import a part of Hugging Face, which only this source needs."""
    if find_spec(name.partition(".")[0]) is None:
        raise UserError(
            "data.source=wikipedia needs the package `datasets`: pip install 'gemini_hpc[wikipedia]'; "
            f"or {_ALTERNATIVES}"
        )
    from importlib import import_module

    return import_module(name)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
