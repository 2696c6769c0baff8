"""A real Slurm on one machine, for the tests: Debian's packages, and a namespace for every node."""

from tests.slurm.cluster.packages import unavailable, unpack
from tests.slurm.cluster.slurm import Node, SlurmCluster

__all__ = ["Node", "SlurmCluster", "unavailable", "unpack"]
