"""Slurm as a witness: what its word about the nodes comes to, beside what is heard of them."""

import queue
import threading
import time
from collections.abc import Collection, Iterator, Mapping

from gemini_hpc.core.messages import NodeDrains, NodeExited
from gemini_hpc.slurm.control import SlurmError, SlurmJob

ASK_S = 2.0
"""Between two looks at the states of the nodes."""

IN_ORDER_S = 10.0
"""How long a node that is DOWN, but works, may take to be left in good order: when its slurmd is back that will kill
all that runs there."""

Word = NodeExited | NodeDrains


class Witness:
    """Asks Slurm about the nodes of a job, in a thread, for it may take its time."""

    def __init__(self, job: SlurmJob, node: str, nodes: tuple[str, ...], silence_s: float) -> None:
        """`silence_s`: a node that was not heard of for so long is silent."""
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
        while True:
            self._wanted.wait()
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

    def _is_silent(self, node: str) -> bool:
        """Whether nothing was heard of it, though those who live had the time to answer."""
        heard = max(self._heard.get(node, 0.0), self._wanted_since)
        return node != self._node and time.monotonic() - heard > self._silence_s


def words(states: Mapping[str, str], dead: Collection[str]) -> Iterator[Word]:
    """Return what the states of `SlurmJob.node_states` mean, when those of `dead` are not to be waited for.

    DOWN says that slurmd does not answer, not that nothing runs there: a node that is still heard of is drained at
    first. And where all are DOWN it is Slurm that is cut off.
    """
    for node, state in states.items():
        if node in dead and set(states.values()) != {"gone"}:
            yield NodeExited(node, "Slurm says that it is down")
        else:
            yield NodeDrains(node, state != "up")  # each time: whoever leads now perhaps did not before
