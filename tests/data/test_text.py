"""Local text: what is read, in which order, and what bad input is told."""

import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest

from gemini_hpc.config import DataConfig
from gemini_hpc.data import check_source, open_corpus
from gemini_hpc.data import text as text_module
from gemini_hpc.data.text import text_corpus
from gemini_hpc.errors import UserError


def test_the_default_is_the_standard_library_without_its_tests() -> None:
    corpus = open_corpus(DataConfig())
    assert 5_000_000 < len(corpus.symbols) < 33_000_000
    text = corpus.symbols.tobytes()
    assert b"def dataclass(" in text
    assert b"class TestCase(" in text  # unittest is part of the library
    assert b"class GrammarTests(" not in text
    assert "standard library of Python 3." in corpus.origin
    assert corpus.fingerprint == text_corpus(None).fingerprint


def test_a_directory_is_read_in_the_order_of_names_without_hidden_and_binary_files(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second ")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "z.md").write_text("first ")
    (tmp_path / "c.bin").write_bytes(b"\0\1\2")
    (tmp_path / "late-zero.bin").write_bytes(b"x" * 10_000 + b"\0")
    (tmp_path / ".hidden").write_text("secret")
    corpus = text_corpus(str(tmp_path))
    assert corpus.symbols.tobytes() == b"first second "
    assert corpus.origin == f"{tmp_path} (2 texts, 13 bytes)"


def test_several_paths_are_read_in_the_order_given(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    assert text_corpus([str(tmp_path / "b"), str(tmp_path / "a")]).symbols.tobytes() == b"ba"


def test_a_long_text_is_cut_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "MAX_CORPUS_BYTES", 1 << 20)
    (tmp_path / "a").write_bytes(b"a" * 1_000_000)
    (tmp_path / "b").write_bytes(b"b" * 1_000_000)
    corpus = text_corpus(str(tmp_path))
    assert len(corpus.symbols) == 1 << 20
    assert corpus.origin.endswith(", cut at 1 MiB)")


def test_home_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert text_corpus("~/mine.txt").symbols.tobytes() == b"mine"


@pytest.mark.parametrize("name", ["nowhere.txt", "", "~nobody-of-this-name/x", "a\0b"])
def test_a_missing_path_is_named(name: str) -> None:
    with pytest.raises(UserError, match=r"no text at .* exists$"):
        text_corpus(name)


def test_text_with_zero_bytes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "utf16.txt").write_text("hello", encoding="utf-16")
    with pytest.raises(UserError, match=r"utf16.txt.* is not text: .*convert it to UTF-8$"):
        text_corpus(str(tmp_path / "utf16.txt"))


def test_nothing_to_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no text in .*name a text file"):
        text_corpus(str(tmp_path))
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UserError, match=r"no text in .*empty.txt"):
        text_corpus(str(tmp_path / "empty.txt"))
    with pytest.raises(UserError, match="no text in an empty list"):
        text_corpus([])


def test_a_named_pipe_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="no text at"):
        text_corpus(str(tmp_path / "pipe"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_text_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "secret.txt").chmod(0)
    with pytest.raises(UserError, match=r"cannot read .*secret.txt.*Permission denied"):
        text_corpus(str(tmp_path / "secret.txt"))


def test_a_read_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()

    def no_scan(folder: str) -> NoReturn:
        raise PermissionError(13, "Permission denied", folder)

    monkeypatch.setattr(text_module.os, "scandir", no_scan)
    with pytest.raises(UserError, match=r"cannot read .*\(data.path\): Permission denied; name text"):
        text_corpus(str(tmp_path))


def test_the_check_finds_a_text_too_short_and_imports_no_torch(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("short")
    short = DataConfig(path=str(tmp_path / "short.txt"))
    assert check_source(short, seq_len=4) == open_corpus(short).fingerprint
    with pytest.raises(UserError, match="too short"):
        check_source(short, seq_len=5)
    script = (
        "import sys; from gemini_hpc.config import DataConfig; from gemini_hpc.data import check_source\n"
        "check_source(DataConfig(), 128); check_source(DataConfig(source='synthetic'), 128)\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
