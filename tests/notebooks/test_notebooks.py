"""Every notebook runs from top to bottom on a run directory."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from tests.analysis.synthetic import Loss, write_run

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return write_run(tmp_path / "a run", steps=24, losses=[Loss(12, rank=2, replayed=1)])


def execute(name: str) -> nbformat.NotebookNode:
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    NotebookClient(notebook, timeout=60, resources={"metadata": {"path": str(NOTEBOOKS)}}).execute()
    return notebook


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def test_the_run_report(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEMINI_RUN_DIR", str(run_dir))
    shown = outputs(execute("01_run_report.ipynb"))
    figures = [o for o in shown if "application/vnd.plotly.v1+json" in o.get("data", {})]
    assert len(figures) == 4
    assert all("text/html" in o["data"] for o in figures), "plotly's renderer must give HTML too"
    text = "".join(o.text for o in shown if o.output_type == "stream")
    assert "all 100 losses equal those of the undisturbed run to the last bit" in text
    assert "node2 killed (step 12, backward)" in text


def test_no_run_is_said_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEMINI_RUN_DIR", str(tmp_path))
    with pytest.raises(CellExecutionError, match="set GEMINI_RUN_DIR"):
        execute("01_run_report.ipynb")


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.name)
def test_notebooks_are_kept_without_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    assert outputs(notebook) == []
    assert all(cell.execution_count is None for cell in notebook.cells if cell.cell_type == "code")
