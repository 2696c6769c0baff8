"""One Slurm cluster for all tests of this folder that ask for it."""

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import SlurmCluster, unavailable, unpack

MISSING = pytest.StashKey[str]()


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[SlurmCluster]:
    reason = unavailable()
    if not reason:
        try:
            unpack()
        except OSError as error:
            reason = str(error)
    if reason:
        pytestconfig.stash[MISSING] = reason
        pytest.skip(reason)
    place = tmp_path_factory.mktemp("slurm")
    cluster = SlurmCluster(place / "cluster", nodes=6)
    try:
        yield cluster
    finally:
        cluster.close()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say aloud what was not tested: a skipped test is one letter among many."""
    if reason := config.stash.get(MISSING, ""):
        terminalreporter.section("NOTHING WAS TRIED ON A SLURM", red=True, bold=True)
        terminalreporter.line(reason)
