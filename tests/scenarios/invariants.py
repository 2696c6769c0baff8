"""What must hold after every event, whatever fails, in whatever order (DESIGN.md section 4).

I1  All ranks of a group restore one step of one history: nothing torn, nothing mixed, nobody else's.
I3  No plan goes behind a safe step while every rank's snapshot of it lies intact on some node that the coordinator
    counts as living, whether others can read it or not; and a step is called safe only when it lies with every
    holder. (So losses of fewer than m nodes of each group, once the coordinator noted a step to be safe, never cost
    more than what was done since.) Nor does the first plan after that go behind it while a holder of each rank lives,
    whatever lies there now; nor to the persistent tier for a step that memory has; nor is a node to overwrite the last
    copy that is known of what others are to restore.
I4  In a generation the orders of one coordinator in one term are obeyed, no node goes back to the orders of an older
    one; at any time one node at most may act, and nobody orders anything who may not.
I5  A run that stops has saved what was safe; one that has finished has published its last step; one that fails over
    a damaged checkpoint has none that is whole. What else I5 and I6 ask is in `schedules`.
"""

from typing import TYPE_CHECKING, Any

from gemini_hpc.core import messages as m
from gemini_hpc.core.learn import BAD_READS
from gemini_hpc.core.placement import holders
from gemini_hpc.core.state import Cluster, Phase, term_of
from gemini_hpc.core.types import FRESH, changed

if TYPE_CHECKING:
    from tests.scenarios.node import Content, Node
    from tests.scenarios.simulation import Simulation


UNWRITTEN = {"bad_disk", "no_tier", "no_writes", "slow_disk", "hang_archiver", "crash_archiver", "corrupt"}
"""Faults of a schedule that may keep a step from the persistent tier."""

ON_THE_WAY = 6
"""No message of an orderly line takes more than so many times the usual delay."""


class Broken(AssertionError):
    """An invariant does not hold."""


class Invariants:
    def __init__(self, sim: "Simulation") -> None:
        self._sim = sim
        self._obeyed: dict[int, tuple[str, int]] = {}  # generation -> whose orders were obeyed in it
        self._reached: dict[tuple[str, int], int] = {}  # (node, life) -> the newest generation that it obeyed
        self._safe_on_disk = FRESH  # the step that counts as safe because of its checkpoint alone
        self._safe: dict[int, dict[int, int]] = {}  # step -> rank -> checksum, of the newest safe step
        self._loaded = FRESH  # the step of the last plan, when it was read from the persistent tier
        self._held: dict[int, set[tuple[str, int]]] = {}  # rank -> who holds it of that step, until there is a plan

    def one_history(self, at_step: int, contents: "dict[int, Content | None]") -> int:
        """I1: hold what the ranks restore, or what a checkpoint is made of, against one another."""
        for rank, content in contents.items():
            if content is None or not content.intact or (content.rank, content.step) != (rank, at_step):
                raise Broken(f"I1: rank {rank} takes {content} for step {at_step}")
        states = {content.state for content in contents.values() if content}
        if len(states) != 1:
            raise Broken(f"I1: a mix of histories: {contents}")
        return states.pop()

    def one_acts(self, node: "Node") -> None:
        """I4: whoever may act now is the only one. `node` has just heard something: only that makes it able to."""
        if not node.seat.election.leads:
            return
        leading = [n for n in self._sim.nodes.values() if n.seat.cluster is not None and n.up and not n.paused]
        if len(leading) > 1:
            acting = [(n.name, n.seat.election.term) for n in leading if n.seat.election.may_act(n.clock())]
            if len(acting) > 1:
                raise Broken(f"I4: {acting} may act at once")

    def obeyed(self, node: "Node", order: m.Command) -> None:
        """I4: an order is obeyed; in its generation nobody else's are, and afterwards none of an older one."""
        if not isinstance(order, (m.Join, m.Pull, m.Load, m.Safe, m.RestartWorker, m.Retire)):
            return
        by = (node.seat.election.leader, term_of(order.generation))  # it may have been elected again since it said so
        if self._obeyed.setdefault(order.generation, by) != by:
            raise Broken(f"I4: {node.name} obeys {by} in generation {order.generation}, which is another's")
        if isinstance(order, (m.RestartWorker, m.Retire)):
            return  # they announce a generation that may never be opened
        life = (node.name, node.life)
        if order.generation < self._reached.get(life, 0):
            raise Broken(f"I4: {node.name} obeys {order} after orders of generation {self._reached[life]}")
        self._reached[life] = order.generation

    def decision(self, node: "Node", before: Cluster | None, after: Cluster, orders: list[m.Command]) -> None:
        """Look at what a coordinator has just decided."""
        if before is not None and after.rules is before.rules and after.generation < before.generation:
            raise Broken("the generation went backwards")
        if after.published is not None and len(after.published.files) != after.rules.world_size:
            raise Broken(f"the checkpoint of step {after.published.step} without all its files")
        if not orders or self._sim.over():  # whoever slept through the end decides on what was, and nobody obeys it
            return
        real = [order for order in orders if not isinstance(order, (m.Note, m.Lead, m.RequestVote))]
        if real and not node.seat.election.may_act(node.clock()):
            raise Broken(f"I4: {node.name} orders {real[0]} without a majority")
        # what was heard while there was no majority is decided on in one breath: perhaps two generations
        joins = [o for o in orders if isinstance(o, m.Join) and o.generation >= after.generation]
        if joins:
            self._joined(after, joins)
        for order in orders:
            if isinstance(order, m.Pull) and order.area == 0:
                self._fetches(after, order)
        for order in orders:
            if isinstance(order, m.Note) and order.event == "safe":
                self._note_safe(after, order.details["step"])
            elif isinstance(order, m.Note) and order.event == "persisted" and after.safe_step == order.details["step"]:
                self._safe_on_disk = after.safe_step
            elif isinstance(order, m.Note) and order.event == "plan":
                self._planned(after, **order.details)
            elif isinstance(order, m.Finish) and not order.node and order.state in ("stopped", "suspended"):
                self._stopped(after, order.reason)
        if len(after.copies) > 8 * after.rules.world_size or len(after.misses) > 100:
            raise Broken("knowledge grows without a bound")

    def _joined(self, cluster: Cluster, joins: list[m.Join]) -> None:
        if cluster.phase not in (Phase.JOINING, Phase.RUNNING):
            return  # given up in the same breath
        if sorted(cluster.ranks) != list(range(cluster.rules.world_size)):
            raise Broken(f"a rank without a node: {cluster.ranks}")
        if len(set(cluster.ranks.values())) != cluster.rules.world_size:
            raise Broken(f"a node with two ranks: {cluster.ranks}")
        if any(not cluster.members[name].alive for name in cluster.ranks.values()):
            raise Broken("a rank on an evicted node")
        if {join.rank: join.node for join in joins} != dict(cluster.ranks):
            raise Broken("not everybody was told to join")
        if len({(j.generation, j.step, j.store) for j in joins}) != 1 or joins[0].generation != cluster.generation:
            raise Broken(f"different joins: {joins}")

    def _note_safe(self, cluster: Cluster, at_step: int) -> None:
        """I3: it is verified on all holders, says the coordinator. Hold it to that, and remember what that step is."""
        if cluster.phase is not Phase.RUNNING or cluster.safe_step != at_step:
            return  # given up in the same breath
        rules = cluster.rules
        for rank, keepers in enumerate(holders(rules.world_size, rules.replicas, rules.placement)):
            for keeper in keepers:
                node = self._sim.nodes[cluster.ranks[keeper]]
                lost = not node.up or node.life > 0  # nobody need have noticed yet
                if not lost and not any(c.rank == rank and c.step >= at_step for c in node.arena.values()):
                    raise Broken(f"I3: step {at_step} is called safe, but {node.name} does not hold rank {rank} of it")
        known = all(cluster.copies.get((rank, at_step)) for rank in cluster.ranks)  # not lost again in the same breath
        if known and at_step:  # the state before the first step is what a fresh start makes, too
            checksums = {r: next(iter(cluster.copies[r, at_step].values())).checksum for r in cluster.ranks}
            self._safe = {at_step: checksums}
            table = enumerate(holders(rules.world_size, rules.replicas, rules.placement))
            named = {rank: [cluster.ranks[keeper] for keeper in keepers] for rank, keepers in table}
            self._held = {rank: {(name, self._sim.nodes[name].life) for name in names} for rank, names in named.items()}

    def _fetches(self, cluster: Cluster, order: m.Pull) -> None:
        """I3: what a node reads must not take the place of the last copy of what another has yet to read."""
        for rank in set(cluster.ranks) - cluster.fetched - {order.rank}:
            places = cluster.copies.get((rank, order.step), {})
            if set(places) == {order.node} and places[order.node].area == 0:
                raise Broken(f"I3: {order} overwrites the last copy of rank {rank}")

    def _lives(self, cluster: Cluster, name: str, life: int) -> bool:
        """Whether a node that held something has not lost it, as far as it was not damaged."""
        sim = self._sim
        node, intact = sim.nodes[name], name not in sim.corrupted and not sim.bad_reads
        return intact and node.up and node.life == life and cluster.members[name].alive

    def _planned(self, cluster: Cluster, step: int, reason: str, moves: list[dict[str, Any]], **_: Any) -> None:
        to_step = step
        kept = all(any(self._lives(cluster, *holder) for holder in held) for held in self._held.values())
        if self._held and kept and not self._sim.network.disorder:
            if to_step < max(self._safe):
                raise Broken(
                    f"I3: back to step {to_step}, though a holder of each rank of {self._safe} lives ({reason})"
                )
            from_disk = any(move["tier"] == "persistent" for move in moves) and to_step != cluster.through_disk
            readable = not any(member.hostless for member in cluster.members.values())
            again = to_step == self._loaded  # what lies in one arena from both tiers is reported as one
            if from_disk and readable and not again and to_step == max(self._safe):
                raise Broken(f"I3: step {to_step} from the persistent tier, though memory has {self._safe} ({reason})")
        self._held = {}
        self._loaded = to_step if any(move["tier"] == "persistent" for move in moves) else FRESH
        if to_step < self._safe_on_disk and self._lies_on_disk(self._safe_on_disk):
            raise Broken(f"I3: back to step {to_step}, though step {self._safe_on_disk} is on disk ({reason})")
        self._safe_on_disk = FRESH
        for at_step, checksums in self._safe.items():
            if to_step >= at_step:
                continue
            whole = all(self._survives(cluster, rank, at_step, checksum) for rank, checksum in checksums.items())
            if whole and not self._sim.network.disorder:  # which may tell of a node's start once more
                raise Broken(f"I3: back to step {to_step}, though step {at_step} is whole ({reason})")
            self._safe = {}

    def _stopped(self, cluster: Cluster, reason: str) -> None:
        """I5: what was safe is on the persistent tier, unless the tier, or the loss of the copies, forbade it."""
        saved, sim = cluster.published.step if cluster.published else FRESH, self._sim
        for at_step, checksums in self._safe.items():
            late = "could not be saved in time" in reason
            known = changed(cluster, members={n: m for n, m in cluster.members.items() if not (late and m.evidence)})
            whole = all(self._survives(known, rank, at_step, checksum) for rank, checksum in checksums.items())
            if saved < at_step and whole and not (late and (sim.no_writes or sim.struck & UNWRITTEN)):
                raise Broken(f"I5: stopped with step {saved} saved, though step {at_step} is whole: {reason}")

    def _lies_on_disk(self, at_step: int) -> bool:
        sim = self._sim
        entries = sim.manifests.get(at_step, {})
        files = [sim.files.get((at_step, rank, entry[2])) for rank, entry in entries.items()]
        return bool(files) and all(file is not None and file.intact for file in files)

    def _survives(self, cluster: Cluster, rank: int, at_step: int, checksum: int) -> bool:
        """Whether some node has it, and can be known to: the word of it is not on its way, nor were all reads bad."""
        sim = self._sim
        told_by = sim.now - ON_THE_WAY * sim.network.delay_s
        for name, member in cluster.members.items():
            node = sim.nodes[name]
            if member.alive and node.up and sim.spoiled[rank, at_step, name] < BAD_READS:
                for content in node.arena.values():
                    same = (content.rank, content.step, content.checksum) == (rank, at_step, checksum)
                    if same and content.intact and content.arrived < told_by:
                        return True
        return False

    def end(self) -> None:
        """The run is over: it says why, and `finished` is true."""
        sim = self._sim
        if sim.outcome not in ("finished", "suspended", "stopped", "failed") or not sim.reason:
            raise Broken(f"it ended as {sim.outcome!r}: {sim.reason!r}")
        if sim.outcome == "finished" and max(sim.most_trained, *sim.manifests, 0) < sim.rules.total_steps:
            raise Broken(f"finished, and yet only {sim.most_trained} steps were done")
        if sim.outcome == "finished" and sim.rules.total_steps not in sim.manifests:
            raise Broken(f"I5: {sim.reason}, and yet the newest checkpoint is of step {max(sim.manifests, default=0)}")
        if sim.outcome == "failed" and "damaged" in sim.reason:
            for at_step, ranks in sim.manifests.items():
                if all(sim.files[at_step, rank, entry[2]].intact for rank, entry in ranks.items()):
                    raise Broken(f"I5: {sim.reason}, and yet the checkpoint of step {at_step} is whole")
