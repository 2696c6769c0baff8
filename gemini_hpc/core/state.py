"""What the coordinator knows. Frozen: `coordinator.step` returns a new one."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from gemini_hpc.core.domains import Domains
from gemini_hpc.core.messages import Pull
from gemini_hpc.core.placement import Form
from gemini_hpc.core.types import FRESH, changed


@dataclass(frozen=True)
class Rules:
    """The shape of the run and its bounds; never changes. Times in seconds."""

    nodes: tuple[str, ...]  # in order of preference: the first world_size become active
    world_size: int
    replicas: int
    placement: Form
    domains: Domains  # nodes that are lost together
    total_steps: int
    snapshot_every: int  # steps
    persist_every: int
    patient: bool  # replicas are read in the idle spans of the network
    heartbeat_timeout_s: float
    suspect_s: float
    leave_s: float
    build_s: float
    takeover_s: float  # for all living nodes to report to a new coordinator
    fetch_s: float  # one read
    gather_s: float  # all reads of a recovery; then the next tier
    join_s: float
    progress_s: float  # without a step of any rank
    world_s: float
    finish_s: float  # for the last checkpoint, after the last step
    max_restarts: int  # of one node's worker, in a row
    max_fruitless: int  # generations in a row that end before a step is done


class Worker(StrEnum):
    BUILDING = "building"  # the process is starting
    IDLE = "idle"  # an engine is built and no group is held: can be told to join
    BUSY = "busy"  # told to join the current generation
    FAILED = "failed"  # too often in a row: no other is started


class Phase(StrEnum):
    FORMING = "forming"  # no plan: waiting for enough workers
    GATHERING = "gathering"  # planned: survivors leave, new members fetch
    JOINING = "joining"  # everybody was told to join
    RUNNING = "running"
    SAVING = "saving"  # the newest step goes to the persistent tier, before the end or because others cannot read it
    FINISHED = "finished"


@dataclass(frozen=True)
class Member:
    """One node of the allocation."""

    node: str
    alive: bool = True
    due: float = 0.0  # by when it must have reported what it has
    held: tuple[tuple[int, ...], ...] | None = None  # what it reported to lie in its arena; None = not yet
    told_safe: int = FRESH  # the step that a coordinator before this one called safe
    heard: float = -1.0  # when it last spoke; -1 = never yet
    evidence: Mapping[str, float] = field(default_factory=dict)  # kind -> since when it is suspect for it
    worker: Worker = Worker.BUILDING
    worker_since: float = 0.0
    built_rank: int = -1
    store: str = ""
    joined: int = 0  # the generation that its worker was last told to join
    rank: int = -1  # as which rank
    snapshot_bytes: int = 0  # > 0: its arena exists
    host_world: int = 0  # the MPI world in which its window host is ready
    host_began: int = 0  # the newest MPI world in which its window host has begun
    absences: int = 0  # MPI worlds in a row that did not start, and its window host had not begun
    blamed: int = 0  # MPI worlds in a row that did not start, and its window host was the first to go
    doubted: bool = False  # an MPI world started without it, and not with it: that is tried once more
    hostless: bool = False  # and did not with it again
    chances: int = 0  # that it was given since
    restarts: int = 0
    votes: bool = True  # it can elect another coordinator
    deaf: bool = False  # it could not read a snapshot that it was to restore
    drains: bool = False  # Slurm wants to take it away
    hurry: str = ""  # why its window host does not keep to the idle spans of the network
    failed_writes: int = 0  # to the persistent tier, in a row

    @property
    def able(self) -> bool:
        """Whether it can have a rank, or will when its worker is built."""
        return self.alive and self.worker is not Worker.FAILED

    @property
    def last_choice(self) -> bool:
        """Whether any other node is to be preferred for a rank."""
        return self.deaf or self.drains or self.hostless


@dataclass(frozen=True)
class Copy:
    """A verified snapshot in a node's arena."""

    area: int
    half: int
    nbytes: int
    checksum: int
    origin: int  # the generation that trained it; 0: from the persistent tier. Equal steps of one origin fit together


class Missing(NamedTuple):
    """A replica that the placement asks for and that is not verified yet."""

    rank: int
    step: int
    holder: str
    area: int
    source: str
    copy: Copy


@dataclass(frozen=True)
class Source:
    """Where a rank's snapshot comes from: tier fresh, local, peer (from `node`) or persistent."""

    tier: str
    node: str = ""


@dataclass(frozen=True)
class Plan:
    """Who takes which rank in a generation, and the step from which all of them go on."""

    step: int
    origin: int  # of the snapshots of that step
    ranks: Mapping[int, str]
    sources: Mapping[int, Source]
    reason: str


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint of the persistent tier. `files`: rank -> (name, bytes, checksum)."""

    step: int
    files: Mapping[int, tuple[str, int, int]]


@dataclass(frozen=True)
class World:
    """The MPI world of the window hosts. `members[i]` is the node of MPI rank i."""

    number: int = 0
    members: tuple[str, ...] = ()
    state: str = "none"  # none | starting | ready | lost
    since: float = 0.0
    failures: int = 0  # in a row
    left_out: tuple[str, ...] = ()  # nodes that are not in it, to see whether they are to blame for these
    tried: tuple[str, ...] = ()  # nodes that were left out of attempts before, one of each
    without_since: float = -1.0  # since when it is ready but some living node has no host in it


PATIENCE_STEPS = 20
"""A snapshot that would take the idle spans of more steps is read whenever it can be."""

Copies = Mapping[tuple[int, int], Mapping[str, Copy]]
"""(rank, step) -> node -> the verified copy there."""


@dataclass(frozen=True)
class Cluster:
    """The coordinator's whole knowledge; every field changes only in `coordinator.step`."""

    rules: Rules
    members: Mapping[str, Member]
    term: int = 1  # in which its coordinator leads
    begun: bool = False  # whether any worker was ever told to join
    surveyed: bool = False  # whether the persistent tier was looked at
    survey: int = 0  # the number of the survey that is wanted, or was done
    survey_below: int | None = None  # the checkpoint of this step proved to be damaged, and so did those after it
    counted: bool = False  # whether what the members reported has been put together
    phase: Phase = Phase.FORMING
    phase_since: float = 0.0
    generation: int = 0
    ranks: Mapping[int, str] = field(default_factory=dict)
    plan: Plan | None = None
    fetched: frozenset[int] = frozenset()  # ranks whose snapshot of the plan's step lies in their own arena
    resumed: frozenset[int] = frozenset()
    stepped: Mapping[int, int] = field(default_factory=dict)  # rank -> newest step done in this generation
    step_s: float = 0.0  # how long the newest step took
    progressed: float = -1.0  # when a rank last did a step, or all had resumed
    done_since: float = -1.0  # all ranks have done the last step
    ahead_since: float = -1.0  # some rank has been beyond the safe step
    trouble_since: float = -1.0  # a collective of this generation failed
    last_turn: float = -1.0  # when the last event was taken
    copies: Copies = field(default_factory=dict)
    examined: Copies | None = None  # the `copies` of which `missing` tells; kept, for most events bring no copy
    missing: tuple[Missing, ...] = ()
    pulls: Mapping[str, Pull] = field(default_factory=dict)  # holder -> its one outstanding pull
    pull_since: Mapping[str, float] = field(default_factory=dict)  # holder -> when it was ordered
    not_before: Mapping[str, float] = field(default_factory=dict)  # node -> when it may read again after a failure
    misses: Mapping[tuple[int, int, str], int] = field(default_factory=dict)  # (rank, step, source) -> failed reads
    loading: frozenset[int] = frozenset()  # ranks that were told to Load
    safe_step: int = FRESH
    exposed: bool = True  # nothing is safe in memory yet, or not any more
    lags: bool = False  # replication does not keep up: what protects is the persistent tier
    complete: int = FRESH  # while it lags: the newest step of which memory has held a snapshot of every rank
    furthest: int = FRESH  # the newest step that all ranks had done in the generations before
    fruitless: int = 0  # generations since the run last came further
    worlds: int = 0  # the number of the last that this coordinator started
    world: World = World()
    persisting: int = FRESH  # step that is being written to the persistent tier
    persist_since: float = -1.0
    persist_sums: Mapping[int, int] = field(default_factory=dict)  # rank -> the checksum of what it is to write
    files: Mapping[int, tuple[str, int, int]] = field(default_factory=dict)
    publisher: str = ""  # who was told to publish it
    last_loss: str = ""  # why the last node, or the last worker on it, was given up
    through_disk: int = FRESH  # the step that was saved because not all could read it in memory
    stopping: str = ""  # why the newest step is saved
    stops_as: str = ""  # stopped, or suspended: it can go on, on other nodes; "" = it does, on these
    savers: Mapping[int, str] = field(default_factory=dict)  # out of nodes: rank -> who was asked to save it
    asked: float = -1.0  # when they last were: an order, or its answer, may be lost
    next_persist: int = 0
    published: Checkpoint | None = None
    outcome: str = ""

    def patience_s(self) -> float:
        """Return for how long a replica may wait for idle spans of the network."""
        return PATIENCE_STEPS * self.step_s if self.rules.patient else 0.0

    def all_stepped(self) -> int:
        """The newest step that all ranks have done in this generation; FRESH: none."""
        return min(self.stepped.values()) if len(self.stepped) == self.rules.world_size else FRESH


NUMBERS_OF_A_TERM = 1_000_000
"""So many generations, MPI worlds and surveys a coordinator may number in its term: the second begins with 1,000,001.

No two coordinators ever use the same number, and a newer one's are higher, though neither need know the other's.
"""


def term_of(generation: int) -> int:
    """Return the term in which a generation was opened."""
    return (generation - 1) // NUMBERS_OF_A_TERM + 1


def new_cluster(
    rules: Rules,
    now: float,
    term: int = 1,
    due: Mapping[str, float] | None = None,
    voters: Collection[str] | None = None,
    absent: Iterable[str] = (),
    silent: str = "",
) -> Cluster:
    """Return the state of a new coordinator, to which nobody has reported yet.

    `due`: by when each node has to; `voters`: those that can elect another (by default all); `absent`: nodes known to
    be gone; `silent`: one that is suspected from the start.
    """
    due = due or dict.fromkeys(rules.nodes, now + rules.build_s)
    voters = rules.nodes if voters is None else voters
    members = {
        node: Member(node, node not in absent, due[node], worker_since=now, votes=node in voters)
        for node in rules.nodes
    }
    if silent:
        members[silent] = changed(members[silent], evidence={"heartbeat": now})
    before = (term - 1) * NUMBERS_OF_A_TERM
    return Cluster(rules, members, term, phase_since=now, generation=before, worlds=before, survey=before)


def next_persist(rules: Rules, step: int) -> int:
    """Return the step after `step` to persist: the next multiple of persist_every, and the last of all."""
    if step >= rules.total_steps:
        return rules.total_steps + 1
    return min((step // rules.persist_every + 1) * rules.persist_every, rules.total_steps)
