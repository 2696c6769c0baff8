"""The fault matrix, whose rows lie in several folders: its references, and the table at the end."""

import json
from collections.abc import Generator
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.cluster.matrix import JOB, Losses, Matrix, References, train_reference

MATRIX = pytest.StashKey[Matrix]()
NOT_PROVEN = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", metavar="FILE", type=Path, help="write the table of the fault matrix as JSON, too")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[MATRIX] = Matrix()
    config.stash[NOT_PROVEN] = []


@pytest.fixture(scope="session")
def matrix(pytestconfig: pytest.Config) -> Matrix:
    return pytestconfig.stash[MATRIX]


@pytest.fixture(scope="session")
def references(tmp_path_factory: pytest.TempPathFactory) -> References:
    """Losses of the undisturbed training of so many nodes, of at least so many steps; trained when first asked for."""
    known: dict[int, Losses] = {}

    def losses(nodes: int, steps: int) -> Losses:
        if len(known.get(nodes, {})) < nodes * steps:
            place = tmp_path_factory.mktemp("reference")
            with pytest.MonkeyPatch.context() as patch:
                (place / "fault_job.py").write_text(JOB)
                patch.chdir(place)
                known[nodes] = train_reference(place / "run", nodes, steps)
        return known[nodes]

    return losses


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed and item.get_closest_marker("faults"):
        item.config.stash[NOT_PROVEN].append(f"{item.name} ({report.when})")
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    lines = config.stash[MATRIX]
    if not lines.lines:
        return
    terminalreporter.section("faults")
    for line in (*lines.table(), *lines.notes):
        terminalreporter.write_line(line)
    for name in config.stash[NOT_PROVEN]:
        terminalreporter.write_line(f"NOT PROVEN: {name}")
    if record := config.getoption("--record"):
        found = {"rows": [asdict(line) for line in lines.lines], "notes": lines.notes}
        record.write_text(json.dumps(found | {"not_proven": config.stash[NOT_PROVEN]}, indent=1) + "\n")
