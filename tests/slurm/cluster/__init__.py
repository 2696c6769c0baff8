"""A real Slurm on one machine, for the tests: Debian's packages, with a namespace for every node where that may be."""

from pathlib import Path

from tests.slurm.cluster.flat import FlatCluster
from tests.slurm.cluster.packages import unavailable, unpack, without_namespaces
from tests.slurm.cluster.slurm import Node, SlurmCluster
from tests.slurm.cluster.storage import Storage

__all__ = ["FlatCluster", "Node", "SlurmCluster", "Storage", "bring_up", "unavailable", "unpack", "without_namespaces"]


def bring_up(place: Path, nodes: int) -> SlurmCluster:
    """Return a cluster of that many nodes, all idle; raises OSError when the packages cannot be had."""
    return (FlatCluster if without_namespaces() else SlurmCluster)(place, nodes)
