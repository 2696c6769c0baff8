"""Wikipedia in its Hugging Face format, from small local copies; and what is said where there is none."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from gemini_hpc.config import DataConfig
from gemini_hpc.data import check_source, open_corpus, wikipedia
from gemini_hpc.data.wikipedia import wikipedia_corpus
from gemini_hpc.errors import UserError

ARTICLES = [
    {"id": "1", "url": "https://en.wikipedia.org/wiki/A", "title": "A", "text": "Anarchism is a café."},
    {"id": "2", "url": "https://en.wikipedia.org/wiki/B", "title": "B", "text": "Albedo\0 is white."},
]
TEXT = "Anarchism is a café.\n\nAlbedo is white.\n\n".encode()


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same two articles in every format that is understood."""
    import datasets

    root = tmp_path_factory.mktemp("copies")
    dataset = datasets.Dataset.from_list(ARTICLES)
    datasets.disable_progress_bars()
    dataset.save_to_disk(str(root / "saved"))
    datasets.DatasetDict(train=dataset).save_to_disk(str(root / "splits"))
    (root / "parquet").mkdir()
    dataset.select([0]).to_parquet(str(root / "parquet" / "train-00000.parquet"))
    dataset.select([1]).to_parquet(str(root / "parquet" / "train-00001.parquet"))
    (root / "articles.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ARTICLES))
    return root


@pytest.mark.parametrize("name", ["saved", "splits", "parquet", "articles.jsonl"])
def test_every_local_format_gives_the_same_text(copies: Path, name: str) -> None:
    corpus = open_corpus(DataConfig(source="wikipedia", path=str(copies / name)))
    assert corpus.symbols.tobytes() == TEXT
    assert str(copies / name) in corpus.origin


def test_the_check_reads_in_a_child_and_passes_its_reason_on(copies: Path) -> None:
    local = DataConfig(source="wikipedia", path=str(copies / "articles.jsonl"))
    assert check_source(local, seq_len=16) == open_corpus(local).fingerprint
    with pytest.raises(UserError, match=r"too short: .*articles\.jsonl .*model\.seq_len=1000 needs 1001 bytes"):
        check_source(local, seq_len=1000)


def test_a_dataset_without_text_is_told_its_columns(tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").write_text('{"id": 1, "body": "x"}\n')
    with pytest.raises(UserError, match=r"no text in a column `text`, only id, body: rename the column$"):
        wikipedia_corpus(str(tmp_path / "other.jsonl"))


def test_a_broken_dataset_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "broken.parquet").write_bytes(b"this is no parquet")
    with pytest.raises(UserError, match=r"^cannot read the dataset .*broken\.parquet' \(data\.path\): .+") as caught:
        wikipedia_corpus(str(tmp_path / "broken.parquet"))
    assert "\n" not in str(caught.value)


def test_missing_and_unfit_places_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no dataset at 'nowhere'"):
        wikipedia_corpus("nowhere")
    with pytest.raises(UserError, match=r"no dataset in .*\.parquet or \.jsonl files$"):
        wikipedia_corpus(str(tmp_path))


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'gemini_hpc\[wikipedia\]'; or name a local copy"):
        wikipedia_corpus(None)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path))
    return tmp_path


def test_without_a_network_the_alternatives_are_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub.constants

    # The library's own switch for "no network": the real refusal, without its retries (23 s).
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"^cannot fetch wikimedia/wikipedia \(.+\): name a local copy") as caught:
        wikipedia_corpus(None)
    assert "\n" not in str(caught.value)
    assert not list(cache.rglob("*.*"))


def test_what_was_fetched_once_is_read_from_the_cache(
    cache: Path, copies: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hub is stood in for by the same dataset as local Parquet files, streamed by the same library."""
    import datasets

    asked = []

    def hub(name: str, subset: str, **options: Any) -> Any:
        asked.append((name, subset))
        files = sorted(map(str, (copies / "parquet").iterdir()))
        return load_dataset("parquet", data_files=files, **options)

    load_dataset = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", hub)
    first, second = wikipedia_corpus(None), wikipedia_corpus(None)
    assert first.symbols.tobytes() == second.symbols.tobytes() == TEXT
    assert asked == [("wikimedia/wikipedia", "20231101.en")]
    assert [file.name for file in cache.rglob("*.*")] == ["wikipedia-20231101.en-32MiB.txt"]


def test_a_child_that_crashes_is_one_line_with_the_alternatives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wikipedia.sys, "executable", "/bin/false")
    with pytest.raises(UserError, match=r"^cannot read Wikipedia \(exit status 1\): name a local copy"):
        wikipedia.prepare(None, 16)
