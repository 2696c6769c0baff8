"""Slurm as a witness: what its word about the nodes, and the time that is left, comes to."""

import queue
import threading
import time
from collections.abc import Collection, Iterator, Mapping

from gemini_hpc.core.messages import NodeDrains, NodeExited, Suspend
from gemini_hpc.slurm.control import SlurmError, SlurmJob

ASK_S = 2.0
"""Between two looks at the states of the nodes."""

IN_ORDER_S = 10.0
"""How long a node that is DOWN, but works, may take to be left in good order: when its slurmd is back that will kill
all that runs there."""

LIMIT_S = 60.0
"""The longest pause between two looks at the time that is left: a limit can be changed."""

Word = NodeExited | NodeDrains | Suspend


class Witness:
    """Asks Slurm about a job, in a thread, for it may take its time."""

    def __init__(self, job: SlurmJob, node: str, nodes: tuple[str, ...], silence_s: float, notice_s: float) -> None:
        """`silence_s`: a node that was not heard of for so long is silent. `notice_s`: when so much time is left, the
        run is to be saved; the batch script, which Slurm tells, may be gone."""
        self._notice_s = notice_s
        self._job, self._node, self._nodes, self._silence_s = job, node, nodes, silence_s
        self._wanted = threading.Event()
        self._wanted_since = 0.0
        self._heard: dict[str, float] = {}
        self._told: queue.SimpleQueue[Word] = queue.SimpleQueue()
        threading.Thread(target=self._ask, daemon=True).start()

    def want(self, wanted: bool) -> None:
        """Look after the nodes from now on, or do not."""
        if not wanted:
            self._wanted.clear()
        elif not self._wanted.is_set():
            self._wanted_since = time.monotonic()
            self._wanted.set()

    def hears(self, node: str) -> None:
        self._heard[node] = time.monotonic()

    def next(self) -> Word | None:
        try:
            return self._told.get_nowait()
        except queue.Empty:
            return None

    def _ask(self) -> None:
        down: dict[str, float] = {}  # since when
        gone: set[str] = set()
        look_again = 0.0
        while True:
            self._wanted.wait()
            if time.monotonic() > look_again:
                look_again = time.monotonic() + self._watch_limit()
            try:
                states = self._job.node_states(self._nodes)
            except SlurmError:
                states = {}  # it is busy, or away: no evidence against anybody
            now = time.monotonic()
            down = {node: down.get(node, now) for node, state in states.items() if state == "gone"}
            dead = {node for node, since in down.items() if self._is_silent(node) or now - since > IN_ORDER_S}
            for word in words(states, dead):
                if word.node not in gone:
                    self._told.put(word)
                if isinstance(word, NodeExited):
                    gone.add(word.node)
            time.sleep(ASK_S)

    def _watch_limit(self) -> float:
        """Say so when the time limit is near; return after how many seconds to look again."""
        try:
            left_s = self._job.left_s()
        except SlurmError:
            return ASK_S
        if left_s <= self._notice_s:
            self._told.put(Suspend("", f"Slurm ends the job in {left_s:.0f} s, at its time limit"))
        return min(max(ASK_S, left_s - self._notice_s), LIMIT_S)

    def _is_silent(self, node: str) -> bool:
        """Whether nothing was heard of it, though those who live had the time to answer."""
        heard = max(self._heard.get(node, 0.0), self._wanted_since)
        return node != self._node and time.monotonic() - heard > self._silence_s


def words(states: Mapping[str, str], dead: Collection[str]) -> Iterator[NodeExited | NodeDrains]:
    """Return what the states of `SlurmJob.node_states` mean, when those of `dead` are not to be waited for.

    DOWN says that slurmd does not answer, not that nothing runs there: a node that is still heard of is drained at
    first. And where all are DOWN it is Slurm that is cut off.
    """
    for node, state in states.items():
        if node in dead and set(states.values()) != {"gone"}:
            yield NodeExited(node, "Slurm says that it is down")
        else:
            yield NodeDrains(node, state != "up")  # each time: whoever leads now perhaps did not before
