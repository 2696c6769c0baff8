"""One Slurm cluster for all tests of this folder that ask for it."""

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import FlatCluster, SlurmCluster, bring_up, unavailable, unpack, without_namespaces

MISSING = pytest.StashKey[str]()
"""What was not tried, and why."""

NO_MACHINES = "on a Slurm whose nodes are one machine"


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[SlurmCluster]:
    reason = unavailable()
    if not reason:
        try:
            unpack()
        except OSError as error:
            reason = str(error)
    if reason:
        pytestconfig.stash[MISSING] = f"nothing was tried on a Slurm: {reason}"
        pytest.skip(reason)
    place = tmp_path_factory.mktemp("slurm")
    cluster = bring_up(place / "cluster", nodes=6)
    try:
        if isinstance(cluster, FlatCluster):
            pytestconfig.stash[MISSING] = f"what could be was tried {NO_MACHINES}: {without_namespaces()}"
        yield cluster
    finally:
        cluster.close()


@pytest.fixture
def machines(cluster: SlurmCluster) -> None:
    """Ask for nodes with a memory, processes and a root folder of their own."""
    if isinstance(cluster, FlatCluster):
        pytest.skip(f"cannot be {NO_MACHINES}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say aloud what was not tested: a skipped test is one letter among many."""
    if reason := config.stash.get(MISSING, ""):
        terminalreporter.section("SLURM", red=True, bold=True)
        terminalreporter.line(reason)
