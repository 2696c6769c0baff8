"""The archiver as its agent deals with it: orders in a queue, a deadline for each, another process when it fails."""

import time
from collections.abc import Callable

from gemini_hpc.core.codec import Message
from gemini_hpc.core.messages import Command, Copied, Event, Load, Persist, Persisted, Publish, Published
from gemini_hpc.runtime.household import Household

MODULE = "gemini_hpc.runtime.archiver"

RESTART_S = 1.0
"""Between the death of an archiver and the start of the next: one that cannot start must not fill the machine."""


class Archiving:
    """Every order is answered: by the archiver, or for it when it hangs or dies."""

    def __init__(self, household: Household, bound_s: float, tell: Callable[[Event], None]) -> None:
        self._household, self._bound_s, self._tell = household, bound_s, tell
        self._orders: list[tuple[float, Command]] = []  # not answered yet; the first is being carried out, since then
        self._due = 0.0  # when one that died is started again; 0 = it lives
        household.start("archiver", MODULE)

    def order(self, order: Command) -> None:
        """Have it carried out. What is told again while it is in the queue is not done twice."""
        if any(order == waiting for _, waiting in self._orders):
            return
        self._orders.append((time.monotonic(), order))
        self._household.send("archiver", order)

    def end_loads(self) -> None:
        """Make sure that nothing more is loaded into the arena: what was wanted is in it, or is not wanted any more."""
        loads = [order for _, order in self._orders if isinstance(order, Load)]
        if loads:
            self._restart("a load was overtaken", loads)

    def greet(self) -> None:
        """It has connected: give it what was ordered before it was up."""
        for _, order in self._orders:
            self._household.send("archiver", order)

    def answered(self, message: Message) -> None:
        """Go on to the next order, if this is an answer to the first."""
        loaded = isinstance(message, Copied) and not message.source  # the others are of the window host
        if loaded or isinstance(message, (Persisted, Published)):
            self._orders = [(time.monotonic(), order) for _, order in self._orders[1:]]

    def ended(self) -> None:
        """Its process is gone."""
        self._due = time.monotonic() + RESTART_S

    def watch(self, now: float) -> None:
        """Kill one that hangs, follow one that died."""
        if self._orders and now - self._orders[0][0] > self._bound_s:
            self._restart(f"no answer within {self._bound_s:.0f} s", [order for _, order in self._orders])
        elif 0 < self._due <= now:  # perhaps of what it was doing; the rest is for the next one
            self._restart("it died", [order for _, order in self._orders[:1]])

    def _restart(self, reason: str, failed: list[Command]) -> None:
        self._orders = [(time.monotonic(), order) for _, order in self._orders if order not in failed]
        self._due = 0.0
        for order in failed:
            self._tell(_failure(order, f"the archiver failed: {reason}"))
        self._household.start("archiver", MODULE)


def _failure(order: Command, reason: str) -> Event:
    if isinstance(order, Persist):
        return Persisted(order.node, order.rank, order.step, "", 0, order.checksum, False, reason, 0.0)
    if isinstance(order, Load):
        at = (order.generation, order.rank, order.step, "", order.area, order.half)
        return Copied(order.node, *at, 0, order.checksum, False, reason, 0.0)
    assert isinstance(order, Publish)
    return Published(order.node, order.step, "", False, reason)
