"""The nodes of a run: their names and their addresses."""

from gemini_hpc.config import RunConfig

CLUSTER = "GEMINI_CLUSTER"
"""Environment variable: the endpoint of the supervisor, which stands for the cluster."""

NODES = "GEMINI_NODES"
"""Environment variable: the names of all nodes of the run, comma-separated, in order of preference."""


RETURNED = "GEMINI_RETURNED"
"""Environment variable: 1 for the agent of a node that was lost and is back."""

GROUP_ADDRESS = "127.0.0.1"
"""Where the workers of virtual nodes meet. Not at their nodes' addresses: c10d looks up the name of every peer it
connects to, and a resolver that does not know 127.0.0.2 may take seconds to say so, in the middle of a recovery."""


def virtual_nodes(run: RunConfig) -> tuple[str, ...]:
    """Name the virtual nodes of the embedded cluster, the spares last."""
    return tuple(f"node{i}" for i in range(run.cluster.nodes + run.cluster.spares))


def address_of(node: str, nodes: tuple[str, ...]) -> str:
    """Return the address of a virtual node: every one has its own in 127.0.0.0/8, which needs no set-up."""
    place = nodes.index(node) + 2
    return f"127.0.{place // 250}.{place % 250}"
