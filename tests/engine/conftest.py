"""Real processes for the tests of this room; none of them outlives its test."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.harness import Cluster, Clusters, Fork, Losses, Nursery, Rank, Undisturbed, reference
from tests.engine.job import Case


@pytest.fixture(scope="session")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    """One process that imports torch and DeepSpeed once; the kernel ends it, and its children, with this one."""
    found = Nursery(tmp_path_factory.mktemp("engine"))
    yield found
    found.close()


@pytest.fixture
def fork(nursery: Nursery) -> Iterator[Fork]:
    ranks: list[Rank] = []

    def new() -> Rank:
        ranks.append(nursery.fork())
        return ranks[-1]

    yield new
    for rank in ranks:
        rank.end()


@pytest.fixture
def cluster(fork: Fork, tmp_path: Path) -> Clusters:
    """Start clusters: cluster(case, size, spares)."""

    def new(case: Case, size: int = 3, spares: int = 1) -> Cluster:
        return Cluster(fork, tmp_path, case, size, spares)

    return new


@pytest.fixture(scope="session")
def undisturbed(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """The losses of the same training on plain gloo: undisturbed(case, size, steps); computed once each."""
    known: dict[tuple[Case, int, int], Losses] = {}

    def losses(case: Case, size: int, steps: int) -> Losses:
        key = (case, size, steps)
        if key not in known:
            ranks: list[Rank] = []

            def fork() -> Rank:
                ranks.append(nursery.fork())
                return ranks[-1]

            try:
                known[key] = reference(fork, tmp_path_factory.mktemp("reference"), case, size, steps)
            finally:
                for rank in ranks:
                    rank.end()
        return known[key]

    return losses
