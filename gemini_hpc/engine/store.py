"""The store of a generation: rank 0 keeps what each rank posts, how it is reached above all, for all to read.

One of our own, because c10d's TCPStore asks the name service for its peer's name whenever it connects (socket.cpp of
torch 2.13): an answer that is lost costs five seconds in the middle of a recovery. Nobody is asked who it is, as with
TCPStore and gloo's own connections; what is posted is bounded in size.
"""

import datetime
import socket
import struct
import threading
import time
from contextlib import suppress
from typing import BinaryIO

import torch.distributed as dist

MAX_BYTES = 1 << 20
"""Of a posted value. gloo's are some 200 bytes a peer."""

_REST_S = 0.01

_REQUEST = struct.Struct("!cHI")  # what, bytes of the key, bytes of the value
_ANSWER = struct.Struct("!I")  # bytes of the value
_POST, _READ = b"P", b"R"


class StoreServer:
    """Rank 0's side: it listens at `address` ("host:port") until it is closed."""

    def __init__(self, host: str) -> None:
        self._listener = socket.create_server((host, 0), backlog=socket.SOMAXCONN)
        self.address = f"{host}:{self._listener.getsockname()[1]}"
        self._posted: dict[str, bytes] = {}
        self._visitors: set[socket.socket] = set()
        self._changed = threading.Condition()
        self._open = True
        threading.Thread(target=self._admit, daemon=True).start()

    def close(self) -> None:
        """End it: whoever still reads is told by the end of the connection."""
        with self._changed:
            self._open = False
            self._changed.notify_all()
            for line in [self._listener, *self._visitors]:
                _shut(line)

    def _admit(self) -> None:
        with self._listener:
            while self._open:
                try:
                    line, _ = self._listener.accept()
                except OSError:  # closed; or whoever came is gone again; or there is no descriptor left
                    time.sleep(_REST_S)
                    continue
                with self._changed:
                    self._visitors.add(line)
                threading.Thread(target=self._attend, args=(line,), daemon=True).start()

    def _attend(self, line: socket.socket) -> None:
        try:
            with line.makefile("rwb") as stream:
                while self._open:
                    self._answer(stream)
        except (EOFError, OSError, ValueError):
            pass  # it went away, or speaks another language
        with self._changed:
            self._visitors.discard(line)
        line.close()

    def _answer(self, stream: BinaryIO) -> None:
        what, key_bytes, value_bytes = _REQUEST.unpack(_exactly(stream, _REQUEST.size))
        if value_bytes > MAX_BYTES or what not in (_POST, _READ):
            raise ValueError("not a request")
        key, value = _exactly(stream, key_bytes).decode(), _exactly(stream, value_bytes)
        with self._changed:
            if what == _POST:
                self._posted[key] = value
                self._changed.notify_all()
            else:
                self._changed.wait_for(lambda: key in self._posted or not self._open)
                value = self._posted.get(key, b"")
        if what == _READ and self._open:
            stream.write(_ANSWER.pack(len(value)) + value)
            stream.flush()


class StoreClient(dist.Store):
    """A rank's side, rank 0's too: the part of c10d's interface that a group needs to form. A value is posted once."""

    def __init__(self, address: str, timeout_s: float) -> None:
        """Of the store at `address`, an IPv4 address and a port; to be connected first."""
        super().__init__()
        self._address = address
        self._line = socket.socket()
        self._line.settimeout(timeout_s)
        self._line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._stream = self._line.makefile("rwb")
        self._read: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def connect(self) -> None:
        """Raises dist.DistNetworkError when there is nobody, which no waiting would change."""
        host, port = self._address.rsplit(":", 1)
        try:
            self._line.connect((host, int(port)))
        except OSError as error:
            raise self._lost(error) from error

    def set(self, key: str, value: bytes | str) -> None:
        self._ask(_POST, key, value if isinstance(value, bytes) else value.encode())

    def get(self, key: str) -> bytes:
        """Return what is posted under `key`; waits for it, at most the timeout."""
        with self._lock:
            known = self._read.get(key)
        if known is None:
            known = self._ask(_READ, key, b"")
            with self._lock:
                self._read[key] = known
        return known

    def wait(self, keys: list[str], timeout: datetime.timedelta | None = None) -> None:
        if timeout is not None:
            self._line.settimeout(timeout.total_seconds())
        for key in keys:
            self.get(key)

    def shut(self) -> None:
        """Wake a thread that waits here, or still connects; from any other."""
        _shut(self._line)

    def close(self) -> None:
        _shut(self._line)
        with suppress(OSError):  # of what could not be sent any more
            self._stream.close()
        self._line.close()

    def _ask(self, what: bytes, key: str, value: bytes) -> bytes:
        raw = key.encode()
        try:
            with self._lock:
                self._stream.write(_REQUEST.pack(what, len(raw), len(value)) + raw + value)
                self._stream.flush()
                if what == _POST:
                    return b""
                (nbytes,) = _ANSWER.unpack(_exactly(self._stream, _ANSWER.size))
                return _exactly(self._stream, nbytes)
        except (EOFError, OSError) as error:
            raise self._lost(error) from error

    def _lost(self, error: Exception) -> dist.DistNetworkError:
        return dist.DistNetworkError(f"rank 0's store at {self._address}: {error}")


def _exactly(stream: BinaryIO, nbytes: int) -> bytes:
    read = stream.read(nbytes)
    if len(read) < nbytes:
        raise EOFError("the connection ended")
    return read


def _shut(line: socket.socket) -> None:
    with suppress(OSError):  # shut by the other side
        line.shutdown(socket.SHUT_RDWR)
