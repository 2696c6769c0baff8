"""The processes of one node, as its agent deals with them: started, spoken to, watched, ended."""

import signal
from collections.abc import Iterator
from dataclasses import dataclass

import zmq

from gemini_hpc.core.codec import Message
from gemini_hpc.core.messages import Hello
from gemini_hpc.runtime.channel import Channel, Listener
from gemini_hpc.runtime.children import Child, python
from gemini_hpc.runtime.paths import RunPaths
from gemini_hpc.runtime.processes import NODE_MARK, RUN_MARK, kill, state_of, wait_exit
from gemini_hpc.runtime.wire import Tally

WORKER, ARCHIVER = "worker", "archiver"
ROLES = (WORKER, "host", ARCHIVER)
MAX_STRANGERS = 16
"""So many may be connected without having said who they are; the oldest goes when another comes."""


@dataclass(frozen=True)
class LineEnded:
    """The process closed its line, most likely by dying."""


@dataclass(frozen=True)
class ProcessEnded:
    """A process that this agent had started is gone."""

    how: str


News = Message | LineEnded | ProcessEnded


class Household:
    """Workers and archivers are children of the agent; a window host comes from the launcher of its MPI world.

    All of them connect to the agent's socket and say hello; the newest of each role counts.
    """

    def __init__(self, paths: RunPaths, node: str, poller: zmq.Poller, tally: Tally) -> None:
        self._tally = tally
        self._paths, self._node, self._poller = paths, node, poller
        self._listener = Listener(paths.socket(node))
        self._strangers: list[Channel] = []  # connected, not introduced yet
        self._lines: dict[str, Channel] = {}
        self._children: dict[str, Child] = {}
        self._unborn: list[tuple[str, str]] = []  # could not be started: role, and why
        poller.register(self._listener, zmq.POLLIN)

    def start(self, role: str, module: str, **environment: str) -> None:
        """Start `python -m module RUN_DIR NODE` in place of what has this role now."""
        self.end(role)
        marks = {RUN_MARK: self._paths.run_id, NODE_MARK: f"{self._paths.run_id}:{self._node}"}
        command = python(module, str(self._paths.run_dir), self._node)
        try:
            child = Child(command, {**marks, **environment}, self._paths.logs / f"{role}-{self._node}.log")
        except OSError as error:
            self._unborn.append((role, f"it could not be started ({error.strerror})"))
            return
        self._children[role] = child
        self._poller.register(child.pidfd, zmq.POLLIN)

    def end(self, role: str) -> None:
        """Kill the process of a role, if it is a child, and hang up on it."""
        child = self._children.pop(role, None)
        if child is not None:
            self._poller.unregister(child.pidfd)
            child.end()
        self._hang_up(role)

    def kill(self, role: str) -> None:
        """Kill the process of a role, a child or not; `news` tells when it is gone."""
        if role in self._children:
            kill(self._children[role].pid, signal.SIGKILL)
        elif role in self._lines:
            kill(self._lines[role].peer(), signal.SIGKILL)

    def is_stopped(self, role: str) -> bool:
        """Whether the process of a role is stopped by a signal."""
        return role in self._children and state_of(self._children[role].pid) in ("T", "t")

    def end_all(self) -> None:
        for role in ROLES:
            self.end(role)

    def send(self, role: str, message: Message) -> None:
        """Pass a message on; it is lost when the process is not there, or does not read."""
        line = self._lines.get(role)
        if line is not None:
            line.send(message)

    def news(self) -> Iterator[tuple[str, News]]:
        """Yield what was said and what ended, as (role, news): a word of each role, its end after its last."""
        while self._unborn:
            role, why = self._unborn.pop()
            yield role, ProcessEnded(why)
        ready = dict(self._poller.poll(0))
        speaking = {role: line for role, line in self._lines.items() if line.fileno() in ready}
        strangers = [line for line in self._strangers if line.fileno() in ready]
        comes = self._listener.fileno() in ready
        for line in strangers:
            yield from self._introduce(line, line.receive())
        if comes:
            self._admit(self._listener.accept())
        for role, line in speaking.items():
            if self._lines.get(role) is line:  # not replaced a moment ago
                yield from self._read(role, line)
        for role, child in list(self._children.items()):
            if not (strangers or comes or role in speaking) and wait_exit(child.pidfd, 0.0):
                del self._children[role]
                self._poller.unregister(child.pidfd)
                self._hang_up(role)
                yield role, ProcessEnded(child.reap())

    def _admit(self, stranger: Channel | None) -> None:
        if stranger is None:
            return
        self._strangers.append(stranger)
        self._poller.register(stranger.fileno(), zmq.POLLIN)
        if len(self._strangers) > MAX_STRANGERS:
            oldest = self._strangers.pop(0)
            self._poller.unregister(oldest.fileno())
            oldest.close()

    def _introduce(self, line: Channel, hello: Message | None) -> Iterator[tuple[str, News]]:
        self._strangers.remove(line)
        if not isinstance(hello, Hello) or hello.role not in ROLES or hello.node != self._node:
            self._tally.refused += line.spoke_nonsense or hello is not None
            self._poller.unregister(line.fileno())
            line.close()
            return
        if self._hang_up(hello.role):
            yield hello.role, LineEnded()
        self._lines[hello.role] = line
        yield hello.role, hello

    def _read(self, role: str, line: Channel) -> Iterator[tuple[str, News]]:
        message = line.receive()
        if message is None:
            self._tally.refused += line.spoke_nonsense
            self._hang_up(role)
            yield role, LineEnded()
        else:
            yield role, message

    def _hang_up(self, role: str) -> bool:
        line = self._lines.pop(role, None)
        if line is None:
            return False
        self._poller.unregister(line.fileno())
        line.close()
        return True
