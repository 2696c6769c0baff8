"""gloo's inside: the sockets and threads of its groups, by which a group can be ended at once.

gloo has no abort that wakes every wait, and when a peer is lost it forgets to wake whoever waits for a message that
is half sent or half received (FACTS.md section 1, DECISIONS.md 30). As of torch 2.13.
"""

import datetime
import os
import re
import socket
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup, ProcessGroupGloo

_LOOK = datetime.timedelta(milliseconds=20)
"""How often a wait for a collective looks whether its group has ended."""

_READER, _WORKER = "gloo_tcp_loop", "pt_gloo_runloop"
"""Names of the thread that reads from all sockets, and of those that run collectives."""

_AS_THEY_ARE = ("send", "recv", "recv_anysource", "monitored_barrier", "_start_coalescing")
"""Not collectives, or not asynchronous. When a wait for one message is cut short gloo breaks the whole group."""

_REST_S = 0.001

_ALL_BYTES = 1 << 28
"""More than the kernel holds for one socket."""

Sockets = Mapping[int, int]
"""Inode -> descriptor of open sockets: the number of a descriptor may be given to another file."""


class Device:
    """What groups communicate through; it has a thread, whose end takes 10 ms, so one is for all groups."""

    def __init__(self, address: str) -> None:
        before = _polls()
        self.c10d = ProcessGroupGloo.create_device(hostname=address)
        self._poll = next(poll for poll in _polls() - before if any(map(_listens, _polled(poll).values())))

    def connections(self) -> Sockets:
        """Return the connections of all its groups; not its listener, at whose end gloo would abort.

        One that still connects is among them: to be shut is the end of its wait.
        """
        return {inode: fd for inode, fd in _polled(self._poll).items() if not _listens(fd)}


def _polls() -> set[int]:
    """Return the epoll descriptors of this process: every device reads all its sockets through one."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # closed meanwhile
            if os.readlink(f"/proc/self/fd/{name}") == "anon_inode:[eventpoll]":
                found.add(int(name))
    return found


def _polled(poll: int) -> Sockets:
    """Return the sockets that an epoll descriptor watches."""
    watched = re.findall(r"^tfd: +([0-9]+) .* ino:([0-9a-f]+)", Path(f"/proc/self/fdinfo/{poll}").read_text(), re.M)
    found = {}
    for descriptor, inode in ((int(fd), int(inode, 16)) for fd, inode in watched):
        with suppress(OSError):  # closed meanwhile
            status = os.fstat(descriptor)
            if stat.S_ISSOCK(status.st_mode) and status.st_ino == inode:
                found[inode] = descriptor
    return found


def _listens(descriptor: int) -> bool:
    with suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as line:
        return line.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 1
    return True  # closed meanwhile: nothing to be shut


class Group:
    """A group over gloo whose collectives end with it. Has what `torch.distributed` calls on a process group."""

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        size: int,
        device: Device,
        timeout: datetime.timedelta,
        ended: Callable[[], bool],
    ) -> None:
        """Connect to all other ranks (all ranks); `timeout` bounds that, and every collective.

        `ended` says whether the group has ended and has come to rest, see `settle`.
        """
        self._rank, self._size, self._ended = rank, size, ended
        options = ProcessGroupGloo._Options()
        options._devices = [device.c10d]
        options._timeout = timeout
        self._group = ProcessGroup(store, rank, size)
        backend = ProcessGroupGloo(store, rank, size, options)
        backend._set_sequence_number_for_group()
        self._group._set_default_backend(ProcessGroup.BackendType.GLOO)
        self._group._register_backend(torch.device("cpu"), ProcessGroup.BackendType.GLOO, backend)

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._group, name)
        if name in _AS_THEY_ARE:
            return function
        return lambda *args, **kwargs: Work([function(*args, **kwargs)], self._ended)

    def reduce_scatter_tensor_coalesced(
        self, outputs: list[torch.Tensor], inputs: list[torch.Tensor], options: Any = None
    ) -> "Work":
        """Reduce everything and keep a part, as torch does over gloo, but with a wait that ends with the group."""
        reduce = dist.AllreduceOptions()
        reduce.reduceOp = (options or dist.ReduceScatterOptions()).reduceOp
        sums = [tensor.clone() for tensor in inputs]
        parts = [total.chunk(self._size)[self._rank] for total in sums]

        def keep() -> None:
            for output, part in zip(outputs, parts, strict=True):
                output.copy_(part.view_as(output))

        return Work([self._group.allreduce([total], reduce) for total in sums], self._ended, keep)

    def reduce_scatter_single(self, output: torch.Tensor, full: torch.Tensor, options: Any = None) -> "Work":
        return self.reduce_scatter_tensor_coalesced([output], [full], options)

    def reduce_scatter(
        self, outputs: list[torch.Tensor], inputs: list[list[torch.Tensor]], options: Any = None
    ) -> "Work":
        return self.reduce_scatter_tensor_coalesced(outputs, [torch.cat(parts) for parts in inputs], options)

    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_single_coalesced = reduce_scatter_tensor_coalesced


class Work:
    """Collectives under way, whose wait ends with their group though gloo may sleep on."""

    def __init__(self, parts: list[Any], ended: Callable[[], bool], finish: Callable[[], None] = lambda: None) -> None:
        """`parts`: as torch returned them; `finish` is called when all are done, by whoever waits."""
        self._parts, self._ended, self._finish = parts, ended, finish

    def wait(self, timeout: datetime.timedelta = datetime.timedelta.max) -> bool:
        """Block until all is done; raises RuntimeError when it failed, or the group has ended."""
        end = time.monotonic() + timeout.total_seconds()
        for part in self._parts:
            while not self._look(part):
                if self._ended():
                    raise RuntimeError("gloo: the group ended in the middle of a collective")
                if time.monotonic() > end:
                    raise RuntimeError(f"gloo: a collective was not done within {timeout}")
        self._finish()
        return True

    def _look(self, part: Any) -> bool:
        try:
            return bool(part.wait(_LOOK))
        except RuntimeError as error:
            if "Operation timed out" in str(error):
                return False
            raise

    def is_completed(self) -> bool:
        return all(part.is_completed() for part in self._parts)

    def when_done(self, callback: Callable[[], None]) -> None:
        """Have `callback` called when all parts are done or failed, by a thread of gloo's; never if it sleeps on."""
        left = list(range(len(self._parts)))

        def one_done(_: Any) -> None:
            if left.pop() == 0:
                callback()

        for part in self._parts:
            part.get_future().add_done_callback(one_done)


def shut(sockets: Sockets) -> None:
    """Shut those that are still open, which wakes gloo."""
    for line in _still_open(sockets):
        with line, suppress(OSError):  # shut by the other side
            line.shutdown(socket.SHUT_RDWR)


def settle(sockets: Sockets) -> None:
    """Block until no group whose `sockets` were shut can write to a tensor any more.

    Then nothing is left to read, the thread that reads has handed on what it had read, and none that computes runs:
    one that sleeps is idle, or waits for what will never come, or is about to find out that its socket is shut.
    """
    while not all(_drain(line) for line in _still_open(sockets)):
        time.sleep(_REST_S)
    before = _threads(_READER)
    while not all(thread.sleeps or thread.ran_since(before) for thread in _threads(_READER).values()):
        time.sleep(_REST_S)
    still = 0
    while still < 2:  # at the first look one may have been but waiting for a lock
        still = still + 1 if all(thread.sleeps for thread in _threads(_WORKER).values()) else 0
        time.sleep(_REST_S)


def _still_open(sockets: Sockets) -> Iterator[socket.socket]:
    for inode, descriptor in sockets.items():
        with suppress(OSError):  # closed meanwhile
            if os.fstat(descriptor).st_ino == inode:
                yield socket.socket(fileno=os.dup(descriptor))


def _drain(line: socket.socket) -> bool:
    """Throw away what was not read from a socket that was shut; whether nothing can follow.

    gloo leaves it unread when whoever waited for it has already failed on another socket. All of it goes in one call,
    so that gloo, should it read on, finds the end rather than the middle of a message.
    """
    with line:
        try:
            return not line.recv(_ALL_BYTES, socket.MSG_TRUNC | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True


@dataclass(frozen=True)
class _Thread:
    id: str
    sleeps: bool
    ticks: int  # of processor time

    def ran_since(self, before: Mapping[str, "_Thread"]) -> bool:
        return self.id not in before or self.ticks - before[self.id].ticks >= 2


def _threads(name: str) -> dict[str, _Thread]:
    found = {}
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # ended meanwhile
            called, _, rest = (task / "stat").read_text().partition("(")[2].rpartition(")")
            state, *numbers = rest.split()
            if called == name:
                found[task.name] = _Thread(task.name, state == "S", int(numbers[10]) + int(numbers[11]))
    return found
