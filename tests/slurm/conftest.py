"""One Slurm cluster for all tests of this folder that ask for it."""

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import SlurmCluster, unavailable, unpack


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    if reason := unavailable():
        pytest.skip(reason)
    try:
        unpack()
    except OSError as error:
        pytest.skip(str(error))
    place = tmp_path_factory.mktemp("slurm")
    cluster = SlurmCluster(place / "cluster", nodes=6)
    try:
        yield cluster
    finally:
        cluster.close()
