"""The lines between agents, and between agents and the cluster: late, and as a schedule wants it cut or unreliable.

Orderly, a line is what TCP makes of a network: what was sent arrives once and in order, or after the cut heals, or not
at all, when the line broke. Disorderly, every message goes its own way: late, twice, or never.
"""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

Line = tuple[str, str]
"""(sender, receiver): a cut may be of one direction only."""


class Clock(Protocol):
    now: float

    def some(self, seconds: float) -> float: ...
    def chance(self, share: float) -> bool: ...
    def after(self, seconds: float, action: Callable[..., None], *args: Any) -> None: ...


class Network:
    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.delay_s = 0.001
        self.disorder = 0.0  # share of the messages that are lost; as many arrive twice, and four times as many late
        self.cuts: dict[Line, int] = {}  # how many cuts this line suffers
        self._held: dict[Line, list[tuple[Callable[..., None], tuple[Any, ...]]]] = {}
        self._last: dict[Line, float] = {}  # when the last message arrives

    def send(self, line: Line, arrive: Callable[..., None], *args: Any) -> None:
        """Call `arrive(*args)` when, and as often as, the message reaches the other end."""
        clock = self._clock
        if self.cuts and line in self.cuts:
            if not self.disorder:
                self._held.setdefault(line, []).append((arrive, args))  # the transport will send it again
        elif not self.disorder:
            due = max(self._last.get(line, 0.0), clock.now + clock.some(self.delay_s))
            self._last[line] = due
            clock.after(due - clock.now, arrive, *args)
        elif not clock.chance(self.disorder):
            for _ in range(1 + clock.chance(self.disorder)):
                delay_s = clock.some(self.delay_s) * (100 if clock.chance(4 * self.disorder) else 1)
                clock.after(delay_s, arrive, *args)

    def quiet_at(self, line: Line) -> float:
        """When the last message that is on its way will have arrived."""
        return self._last.get(line, 0.0)

    def cut(self, lines: Iterable[Line]) -> None:
        for line in lines:
            self.cuts[line] = self.cuts.get(line, 0) + 1

    def heal(self, lines: Iterable[Line], broken: bool) -> None:
        """End a cut; what was sent meanwhile arrives now, unless the line broke."""
        for line in lines:
            self.cuts[line] -= 1
            if self.cuts[line]:
                continue
            del self.cuts[line]
            for arrive, args in self._held.pop(line, []):
                if not broken:
                    self.send(line, arrive, *args)
