"""The nodes of a run: their names and their addresses, on this machine and in an allocation of Slurm."""

import os

import psutil

from gemini_hpc.config import RunConfig
from gemini_hpc.config.site import TOPOLOGY
from gemini_hpc.core.domains import Domains, arrange
from gemini_hpc.errors import UserError
from gemini_hpc.slurm.control import this_job
from gemini_hpc.windows.launch import network_interface

CLUSTER = "GEMINI_CLUSTER"
"""Environment variable: the endpoint of the supervisor, which stands for the cluster."""

NODES = "GEMINI_NODES"
"""Environment variable: the names of all nodes of the run, comma-separated, in order of preference."""


DOMAINS = "GEMINI_DOMAINS"
"""Environment variable: the failure domain of every node that is in one, as a JSON object."""

RETURNED = "GEMINI_RETURNED"
"""Environment variable: 1 for the agent of a node that was lost and is back."""

LOOPBACK = "127.0.0.1"
"""Where the supervisor of virtual nodes listens, and where their workers meet: not at their nodes' addresses, whose
names some resolvers look for in vain, for seconds, in the middle of a recovery."""


def nodes_of(run: RunConfig) -> tuple[str, ...]:
    """Name the nodes of a run, in order of preference; on Slurm those of the job that this process belongs to.

    A job may have been given others than it asked for (`sbatch --nodes`): whatever does not train stands by.
    """
    active, spares = run.cluster.nodes, run.cluster.spares
    if run.site.kind == "local":
        return tuple(f"node{i}" for i in range(active + spares))
    nodes = this_job(run.site.call_timeout_s).nodes(os.environ.get("SLURM_JOB_NODELIST", ""))
    if len(nodes) < active:
        raise UserError(
            f"the job has {len(nodes)} nodes, and the run needs {active} to train:"
            f" submit it with --nodes={active + spares}, for {spares} to stand by"
        )
    return nodes


def arranged_nodes(run: RunConfig) -> tuple[tuple[str, ...], Domains]:
    """Name the nodes of a run so that, as ranks, they share no failure domain where that can be; and their domains."""
    nodes, cluster, protect = nodes_of(run), run.cluster, run.protect
    domains = domains_of(run, nodes)
    return arrange(nodes, domains, cluster.nodes, protect.replicas, protect.placement), domains


def domains_of(run: RunConfig, nodes: tuple[str, ...]) -> Domains:
    """Return the failure domains of the nodes, as the site file or Slurm tells them. Raises UserError."""
    given = run.site.failure_domains
    if given is None:
        return {}
    if run.site.kind == "local":
        lists = {name: names.split(",") for name, names in dict(given).items()}
    else:
        job = this_job(run.site.call_timeout_s)
        lists = {name: job.nodes(names) for name, names in (job.switches() if given == TOPOLOGY else given).items()}
    domains: dict[str, str] = {}
    for name, members in lists.items():
        for node in map(str.strip, members):
            if domains.setdefault(node, name) != name:
                raise UserError(f"site.failure_domains: {node} is in {domains[node]} and in {name}: put it into one")
    return {node: domains[node] for node in nodes if node in domains}


def address_of(node: str, nodes: tuple[str, ...]) -> str:
    """Return the address of a virtual node: every one has its own in 127.0.0.0/8, which needs no set-up."""
    place = nodes.index(node) + 2
    return f"127.0.{place // 250}.{place % 250}"


def own_address(run: RunConfig) -> str:
    """Return the address at which the other nodes of a Slurm job reach this one: that of `site.interface`."""
    interface = run.site.interface or network_interface()
    found = psutil.net_if_addrs().get(interface or "", [])
    addresses = [entry.address for entry in found if entry.family.name == "AF_INET"]
    if not addresses:
        known = ", ".join(sorted(psutil.net_if_addrs()))
        raise UserError(f"site.interface: no {interface} with an IPv4 address here; there are {known}")
    return addresses[0]
