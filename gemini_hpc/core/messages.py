"""Everything the coordinator is told (events) and everything it orders (commands). Times in seconds.

A message is a flat frozen dataclass; `codec` has its wire form.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gemini_hpc.core.codec import Message

# --- events: what the coordinator is told -------------------------------------------------------------


@dataclass(frozen=True)
class Event(Message, abstract=True):
    """Something that happened on `node` (for evidence: that happened to it)."""

    node: str


@dataclass(frozen=True)
class Heartbeat(Event):
    """The answer to a Lead, whose `sent` it echoes: the agent is alive and follows us. Any other event says so too."""

    echo: float


@dataclass(frozen=True)
class Vote(Event):
    """The answer to a RequestVote: granted for `term`; or not, for the voter knows of a leader in `term`."""

    term: int
    granted: bool


@dataclass(frozen=True)
class Deposed(Event):
    """The answer to a Lead of an old term: somebody has led in `term`."""

    term: int


@dataclass(frozen=True)
class Inventory(Event):
    """The first word to the leader of `term`: all that this node has. A coordinator keeps nothing that is not in here.

    `worker`: building, idle, busy or lost; it was last told to join `generation` as `rank` (0 and -1: never).
    `world`: the newest MPI world that it had a host in, of `members`; `host`: that one is ready.
    `safe_step`: what it was last told to be safe. `held`: the sealed snapshots as (area, half, rank, step, generation,
    nbytes, checksum).
    """

    term: int
    worker: str
    reason: str
    generation: int
    rank: int
    built_rank: int
    store: str
    snapshot_bytes: int
    world: int
    members: tuple[str, ...]
    host: bool
    safe_step: int
    held: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class WorkerReady(Event):
    """A worker has built its engine over a fake group and can adopt any rank; the node's arena exists."""

    built_rank: int
    snapshot_bytes: int
    store: str  # host:port of a fresh c10d store in this worker, for the generation it may lead as rank 0


@dataclass(frozen=True)
class WorkerLost(Event):
    """The worker process is gone (pidfd), or said that it cannot go on; `final`: nor could another in its place."""

    reason: str
    final: bool


@dataclass(frozen=True)
class Trouble(Event):
    """A collective of `generation` failed in this worker: some peer is in trouble, this one is parked."""

    generation: int
    reason: str


@dataclass(frozen=True)
class Parked(Event):
    """The worker has left the group of `generation` and holds a fresh store for the next one."""

    generation: int
    store: str


@dataclass(frozen=True)
class Resumed(Event):
    """The worker is in the group of `generation` with `step` restored; which rung it took, and how long.

    `loss` is that of the step, as its snapshot says: whoever did the step may have died before anybody heard it. NaN:
    it is the initial state.
    """

    generation: int
    rank: int
    step: int
    loss: float
    rung: str
    group_s: float
    reset_s: float
    restore_s: float


@dataclass(frozen=True)
class Stepped(Event):
    """One optimizer update is done."""

    generation: int
    rank: int
    step: int
    loss: float
    step_s: float
    snapshot_s: float  # how long training stood still for the snapshot; -1 when none was taken


@dataclass(frozen=True)
class Sealed(Event):
    """The snapshot of this node's own rank is complete and has its checksum."""

    generation: int
    rank: int
    step: int
    half: int
    nbytes: int
    checksum: int


@dataclass(frozen=True)
class Copied(Event):
    """The end of a Pull or a Load: `rank`'s snapshot now lies verified in (area, half), or it does not.

    `source` and `generation` are those of the order; a Load has no source. `hurry`: why a Pull that had patience did
    not keep to the idle spans of the network; "" = it did, or none are known.
    """

    generation: int
    rank: int
    step: int
    source: str
    area: int
    half: int
    nbytes: int
    checksum: int
    ok: bool
    reason: str
    seconds: float
    hurry: str = ""


@dataclass(frozen=True)
class HostReady(Event):
    """The node's window host has its window in MPI world `world`; `members[i]` is the node of MPI rank i."""

    world: int
    members: tuple[str, ...]


@dataclass(frozen=True)
class HostLost(Event):
    """The node's window host of MPI world `world` is gone. It owned nothing; a new world is started."""

    world: int
    reason: str


@dataclass(frozen=True)
class Damaged(Event):
    """The snapshot that this worker was to restore from its own arena has not the checksum it was sealed with."""

    generation: int
    rank: int
    step: int


@dataclass(frozen=True)
class Persisted(Event):
    """The end of a Persist: the shard's file is on the shared file system, or it is not."""

    rank: int
    step: int
    name: str
    nbytes: int
    checksum: int
    ok: bool
    reason: str
    seconds: float


@dataclass(frozen=True)
class Published(Event):
    """The end of a Publish."""

    step: int
    path: str
    ok: bool
    reason: str


@dataclass(frozen=True)
class Disconnected(Event):
    """The control connection to the node's agent broke. Soft: networks hiccup."""


@dataclass(frozen=True)
class NodeExited(Event):
    """The cluster (parent process, or Slurm) says that the node's agent is gone. Hard evidence.

    `number` is that of the newest Voters before it.
    """

    reason: str
    number: int = 0


@dataclass(frozen=True)
class Voters(Event):
    """The cluster says that none of those who voted is left, and names those who vote from now on; `node` is empty.

    `number`: how often it has done so. `term`: the newest in which anybody led, as far as it knows.
    """

    voters: tuple[str, ...]
    number: int
    term: int


@dataclass(frozen=True)
class NodeDrains(Event):
    """Slurm gives the node no new work, for it is to be repaired, or does again (`drains` is false)."""

    drains: bool


@dataclass(frozen=True)
class WorldFailed(Event):
    """The launcher of MPI world `world` ended."""

    world: int
    reason: str


@dataclass(frozen=True)
class Surveyed(Event):
    """The newest checkpoint of the persistent tier (-1: none), with its files: rank -> [name, bytes, checksum].

    `number` is that of the survey that was wanted when it began: it may have taken long.
    """

    number: int
    step: int
    files: Mapping[str, Any]


@dataclass(frozen=True)
class Suspend(Event):
    """The cluster is about to take the nodes away (time limit, preemption): save the run and end it; `node` is empty.

    Said again and again, for the coordinator may change.
    """

    reason: str


@dataclass(frozen=True)
class Tick(Event):
    """Time has passed; `node` is empty."""


# --- within a node, and between nodes and the cluster ---------------------------------------------------


@dataclass(frozen=True)
class Hello(Event):
    """The first message of a child to its agent, which passes on a host's. `role`: worker, host or archiver."""

    role: str
    pid: int
    world: int


@dataclass(frozen=True)
class Written(Event):
    """To the window host: the worker completed the snapshot in half `half` of its own area; seal it."""

    half: int


@dataclass(frozen=True)
class Profiled(Event):
    """From the worker, and on to the window host: what some steps up to `step` had in common, times in seconds.

    `idle_s`, `spread` and `spans_s` are those of `core.schedule.Profile`. `stamps`: the collectives of step `step` as
    (begin, end, bytes) by the node's monotonic clock, when they are to be logged.
    """

    rank: int
    step: int
    step_s: float
    idle_s: float
    spread: float
    spans_s: tuple[float, ...]
    stamps: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Reads(Event):
    """From the window host to its agent: what it read while the collectives of `step` ran, in the same form."""

    step: int
    stamps: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class NodeUp(Event):
    """To the cluster, and on to all agents: the agent of `node` listens at `endpoint`. A lost one is back by this."""

    endpoint: str


# --- commands: what the coordinator orders ----------------------------------------------------------


@dataclass(frozen=True)
class Command(Message, abstract=True):
    """An order to the agent of `node` (or to the cluster, where the class says so)."""

    node: str


@dataclass(frozen=True)
class RequestVote(Command):
    """Asked by `candidate`, which would lead in `term`."""

    candidate: str
    term: int


@dataclass(frozen=True)
class Lead(Command):
    """`leader` leads in `term`; to all agents, and to the cluster."""

    leader: str
    term: int
    sent: float  # by the leader's clock; comes back in the answer
    reported: bool  # whether the leader has this node's inventory: it may be lost on its way


@dataclass(frozen=True)
class StartWorld(Command):
    """To the cluster: launch window hosts on `members`; MPI rank = index. The old world is ended first."""

    world: int
    members: tuple[str, ...]


@dataclass(frozen=True)
class RestartWorker(Command):
    """End the node's worker, if there is one, and start a new one, for `generation` at the earliest."""

    generation: int


@dataclass(frozen=True)
class Abort(Command):
    """Drop the collectives of `generation` and park."""

    generation: int


@dataclass(frozen=True)
class Pull(Command):
    """Read `rank`'s snapshot from MPI rank `target` of `world` into (area, half) and verify it against `checksum`.

    `origin` is the generation in which the snapshot was taken, `generation` that of the order. For `patience_s` it may
    wait for idle spans of the network; after that it has `deadline_s`.
    """

    generation: int
    origin: int
    rank: int
    step: int
    source: str
    world: int
    target: int
    source_area: int
    source_half: int
    area: int
    half: int
    nbytes: int
    checksum: int
    deadline_s: float
    patience_s: float = 0.0


@dataclass(frozen=True)
class Load(Command):
    """Read `rank`'s shard of `step` from the persistent tier into (area, half) and verify it."""

    generation: int
    rank: int
    step: int
    area: int
    half: int
    name: str
    checksum: int


@dataclass(frozen=True)
class Join(Command):
    """Enter the group of `generation` as `rank`, restore (own area, half) of `step`, train on.

    `step` is FRESH (-1) when there is nothing to restore. Rank 0 serves `store`.
    """

    generation: int
    rank: int
    step: int
    half: int
    store: str


@dataclass(frozen=True)
class Safe(Command):
    """Every rank's snapshot of `step` is verified on all its holders: older ones may be overwritten."""

    generation: int
    step: int


@dataclass(frozen=True)
class Gone(Command):
    """These MPI ranks of `world` are dead: never touch their windows again."""

    world: int
    targets: tuple[int, ...]


@dataclass(frozen=True)
class Persist(Command):
    """Write the sealed snapshot in (area, half) to the persistent tier."""

    rank: int
    step: int
    area: int
    half: int
    nbytes: int
    checksum: int


@dataclass(frozen=True)
class Publish(Command):
    """All shards of `step` are on the persistent tier: write its manifest. `files`: rank -> [name, bytes, checksum]."""

    generation: int
    step: int
    files: Mapping[str, Any]


@dataclass(frozen=True)
class Retire(Command):
    """You were evicted in `generation`: kill your processes and leave."""

    generation: int


@dataclass(frozen=True)
class Finish(Command):
    """The run is over (to every agent, and to the cluster with node "").

    `state`: finished; suspended: it goes on by itself wherever there are nodes for it; stopped, or failed: somebody has
    to look into it first.
    """

    state: str
    reason: str


@dataclass(frozen=True)
class Note(Command):
    """To the event log: `event` with its fields (see telemetry)."""

    event: str
    details: Mapping[str, Any]
