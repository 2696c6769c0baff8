"""A real Slurm on one machine, for the tests: Debian's packages, and a namespace for every node."""

from tests.slurm.cluster.packages import unavailable, unpack
from tests.slurm.cluster.slurm import Node, SlurmCluster
from tests.slurm.cluster.storage import Storage

__all__ = ["Node", "SlurmCluster", "Storage", "unavailable", "unpack"]
