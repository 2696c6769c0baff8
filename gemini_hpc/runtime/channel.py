"""The line between an agent and the processes it watches: packets on a Unix socket, one message each.

A sequenced-packet socket keeps message boundaries, its end tells each side at once that the other died, and the
kernel vouches for who speaks: only this user can open it.
"""

import os
import socket
import struct
from pathlib import Path

from gemini_hpc.core.codec import Message, MessageError, decode

MAX_PACKET_BYTES = 256 << 10
"""A Publish of some 4000 ranks. Linux's default bounds (net.core.wmem_max) let this much through."""

_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid


class Channel:
    """One end of the line. `send` may be called from any thread, `receive` from one."""

    def __init__(self, line: socket.socket) -> None:
        self._line = line
        self.spoke_nonsense = False
        """Whether the other side sent what is no message."""
        line.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MAX_PACKET_BYTES)  # the kernel doubles it

    @classmethod
    def connect(cls, path: Path) -> "Channel":
        line = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        line.connect(str(path))
        return cls(line)

    def fileno(self) -> int:
        return self._line.fileno()

    def send(self, message: Message) -> bool:
        """Send one message; False when the other side is gone, or does not read, or the message is too large."""
        packet = message.encode()
        if len(packet) > MAX_PACKET_BYTES:
            return False  # the other side would see its first part, and hang up
        try:
            self._line.send(packet)
        except OSError:
            return False
        return True

    def receive(self) -> Message | None:
        """Wait for one message; None when the other side is gone or does not keep to the protocol."""
        try:
            raw = self._line.recv(MAX_PACKET_BYTES)
            return decode(raw) if raw else None
        except MessageError:
            self.spoke_nonsense = True
            return None
        except OSError:
            return None

    def peer(self) -> int:
        """Return the process at the other end, as the kernel noted it."""
        credentials = self._line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        return int(_CREDENTIALS.unpack(credentials)[0])

    def close(self) -> None:
        self._line.close()


class Listener:
    """The agent's end: accepts its children."""

    def __init__(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        self._line = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        mask = os.umask(0o177)
        try:
            self._line.bind(str(path))
        finally:
            os.umask(mask)
        self._line.listen(16)

    def fileno(self) -> int:
        return self._line.fileno()

    def accept(self) -> Channel | None:
        """Take the next child; sending to it never blocks: one that is frozen must not freeze its agent.

        None when it cannot be had now: it hung up again, or this process has no descriptor left.
        """
        try:
            line, _ = self._line.accept()
        except OSError:
            return None
        line.setblocking(False)
        return Channel(line)
