"""The control plane: ZeroMQ sockets with CURVE keys made for this run.

Whoever has the run's keys file (mode 0600) may speak; everybody else fails the handshake. Both sides use the one
key pair of the run, and the server's side checks that the client's key is that one. What is turned away changes
nothing, and is counted (`Tally`).
"""

import contextlib
import itertools
import json
import os
import stat
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zmq
import zmq.auth.thread
from zmq.utils.monitor import parse_monitor_message

from gemini_hpc.core.codec import MAX_MESSAGE_BYTES, Message, MessageError, decode
from gemini_hpc.errors import GeminiError

HANDSHAKE_S = 3.0
"""A connection that has not shown the run's keys by then is closed: it costs a descriptor."""

REVIVE_S = 0.2
"""How long ZeroMQ gets to begin a reconnection by itself, before the line is made anew."""

_DOMAIN = b"gemini"
_ENVELOPE_BYTES = 64  # what CURVE puts around a message, and some more
_monitors = itertools.count()  # their names: one that was used is free again only some time later
_SERVER_EVENTS = zmq.EVENT_ACCEPTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
_CLIENT_EVENTS = zmq.EVENT_CONNECT_RETRIED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED


@dataclass
class Tally:
    """What the sockets of one process turned away since its start. The numbers only grow."""

    refused: int = 0
    """Frames from somebody who has the keys that were none of our messages, or came under no proper name; and what
    came over the node's own socket that was no message, or from nobody who belongs there."""
    stale: int = 0
    """Messages that came too late, or to the wrong node: orders of an earlier term or generation, words of the past."""
    strangers: int = 0
    """Connections whose other end did not show that it has the keys."""
    unsent: int = 0
    """Messages of our own that were dropped: too large to be sent, or for a peer that has not read for long."""


def make_keys(path: Path) -> None:
    """Write a fresh key pair, readable by the owner alone."""
    public, secret = zmq.curve_keypair()
    path.unlink(missing_ok=True)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "w") as file:
        json.dump({"public": public.decode(), "secret": secret.decode()}, file)


def read_keys(path: Path) -> tuple[bytes, bytes]:
    """Return the (public, secret) key of a run. Raises GeminiError for a file that others may read, or is damaged."""
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
                raise GeminiError(f"{path} is not yours alone: whoever read it can speak in the run; start a new run")
            raw = json.loads(file.read(4096))
        public, secret = raw["public"].encode(), raw["secret"].encode()
        if zmq.curve_public(secret) != public:
            raise ValueError("not a pair")
    except OSError as error:
        raise GeminiError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, zmq.ZMQError) as error:
        raise GeminiError(f"{path} does not hold the keys of a run: start a new run") from error
    return public, secret


class _OnlyTheRun:
    def __init__(self, public: bytes) -> None:
        self._public = public

    def callback(self, _domain: str, key: bytes) -> bool:
        return key == self._public


class Wire:
    """The sockets of one process on the control plane."""

    def __init__(self, keys: Path) -> None:
        self.tally = Tally()
        self._public, self._secret = read_keys(keys)
        self._context = zmq.Context()
        self._guard = zmq.auth.thread.ThreadAuthenticator(self._context)
        self._guard.start()
        self._guard.configure_curve_callback(_DOMAIN.decode(), _OnlyTheRun(self._public))

    def listen(self, address: str) -> "Server":
        socket = self._socket(zmq.ROUTER)
        socket.curve_server = True
        # without an enforced domain whoever knows the public key is let in while the guard's thread is not there
        socket.setsockopt(zmq.ZAP_DOMAIN, _DOMAIN)
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        # a peer that comes back under its name before we know that its old connection is dead takes its place
        socket.router_handover = True
        monitor = _monitor(socket, _SERVER_EVENTS)
        port = socket.bind_to_random_port(f"tcp://{address}")
        return Server(socket, f"tcp://{address}:{port}", monitor, self.tally)

    def call(self, endpoint: str, identity: str) -> "Client":
        """Connect to a server; reconnects by itself for as long as the client lives."""
        socket = self._socket(zmq.DEALER)
        socket.identity = identity.encode()
        socket.curve_serverkey = self._public
        socket.reconnect_ivl = 20
        socket.reconnect_ivl_max = 200
        monitor = _monitor(socket, _CLIENT_EVENTS)
        socket.connect(endpoint)
        return Client(socket, endpoint, monitor, self.tally)

    def close(self) -> None:
        """Send what is queued (at most a second) and close."""
        self._guard.stop()
        self._context.destroy(linger=1000)

    def _socket(self, kind: int) -> "zmq.Socket[bytes]":
        socket = self._context.socket(kind)
        socket.curve_publickey, socket.curve_secretkey = self._public, self._secret
        socket.linger = 1000
        socket.maxmsgsize = MAX_MESSAGE_BYTES + _ENVELOPE_BYTES
        socket.handshake_ivl = int(HANDSHAKE_S * 1000)
        return socket


class Server:
    """Accepts clients of the run and answers each by its identity."""

    def __init__(self, socket: "zmq.Socket[bytes]", endpoint: str, monitor: Any, tally: Tally) -> None:
        self.socket = socket
        self.endpoint = endpoint
        self.tally = tally
        self._monitor = monitor
        self._unproven: list[int] = []  # descriptors of connections in their handshake, the newest last

    def receive(self) -> tuple[str, Message] | None:
        """Return the next (client identity, message) that waits, or None."""
        self._watch()
        while self.socket.get(zmq.EVENTS) & zmq.POLLIN:
            frames = self.socket.recv_multipart()
            name, message = _name(frames[0]), _parse(frames[1:])
            if name and message is not None:
                return name, message
            self.tally.refused += 1
        return None

    def send(self, identity: str, message: Message) -> None:
        """Send; lost when there is no such client, or it has not read for long."""
        raw = _fitting(message, self.tally)
        if raw is not None:
            self.socket.send_multipart([identity.encode(), raw])

    def _watch(self) -> None:
        """Count the connections that ended without a handshake.

        ZeroMQ does not say whose handshake it was that succeeded: it counts for the newest, which may exchange a
        stranger and a friend who came within the same milliseconds, but keeps their numbers.
        """
        for event in _events(self._monitor):
            if event["event"] == zmq.EVENT_ACCEPTED:
                self._unproven.append(int(event["value"]))
            elif event["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                del self._unproven[-1:]
            elif int(event["value"]) in self._unproven:
                self._unproven.remove(int(event["value"]))
                self.tally.strangers += 1


class Client:
    """A line to one server."""

    def __init__(self, socket: "zmq.Socket[bytes]", endpoint: str, monitor: Any, tally: Tally) -> None:
        self.socket = socket
        self.monitor = monitor
        self.tally = tally
        self._endpoint = endpoint
        self._proven = False  # whether the present connection is one to our server
        self._broken = False
        self._spoke_with_stranger = False
        self._ended: float | None = None  # when a connection ended and ZeroMQ began no new one

    def receive(self) -> Message | None:
        """Return the next message that waits, or None."""
        self._watch()
        while self.socket.get(zmq.EVENTS) & zmq.POLLIN:
            message = _parse(self.socket.recv_multipart())
            if message is not None:
                return message
            self.tally.refused += 1
        return None

    def broke(self) -> bool:
        """Whether the connection broke since the last call."""
        self._watch()
        broken, self._broken = self._broken, False
        return broken

    def send(self, message: Message) -> None:
        """Send; lost when the queue is full: the peer has been silent for long, and its heartbeat says so too."""
        raw = _fitting(message, self.tally)
        if raw is None:
            return
        try:
            self.socket.send(raw, zmq.DONTWAIT)
        except zmq.Again:
            self.tally.unsent += 1

    def close(self) -> None:
        self.socket.disable_monitor()
        self.monitor.close(linger=0)
        self.socket.close(linger=0)

    def _watch(self) -> None:
        for event in _events(self.monitor):
            self._note(event["event"])
        if self._ended is not None and time.monotonic() - self._ended > REVIVE_S:
            self._revive()

    def _note(self, event: int) -> None:
        if event == zmq.EVENT_CONNECT_RETRIED:
            self._ended = None
        elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._proven, self._ended = True, None
        else:
            self._broken |= self._proven
            self._spoke_with_stranger = not self._proven
            self._proven, self._ended = False, time.monotonic()

    def _revive(self) -> None:
        """Make the line anew: ZeroMQ gives one up for ever whose other end spoke nonsense or did not have the keys."""
        self._ended = None
        if self._spoke_with_stranger:
            self.tally.strangers += 1
        else:
            self.tally.refused += 1
        with contextlib.suppress(zmq.ZMQError):  # it may have forgotten the endpoint
            self.socket.disconnect(self._endpoint)
        self.socket.connect(self._endpoint)


def _monitor(socket: "zmq.Socket[bytes]", events: int) -> Any:
    """Watch a socket. Without a bound on what waits to be read: at a bound ZeroMQ's own thread would stop."""
    address = f"inproc://monitor-{next(_monitors)}"
    socket.monitor(address, events)
    monitor = socket.context.socket(zmq.PAIR)
    monitor.rcvhwm = 0
    monitor.connect(address)
    return monitor


def _events(monitor: Any) -> list[Any]:
    found = []
    while monitor.get(zmq.EVENTS) & zmq.POLLIN:
        found.append(parse_monitor_message(monitor.recv_multipart()))
    return found


def _fitting(message: Message, tally: Tally) -> bytes | None:
    """Return the message as bytes; None for one at which the other side would break the connection."""
    raw = message.encode()
    if len(raw) > MAX_MESSAGE_BYTES:
        tally.unsent += 1
        return None
    return raw


def _name(identity: bytes) -> str:
    """Return the name that a client gave itself; "" for none (ZeroMQ's own begin with a zero byte) or no text."""
    try:
        return "" if identity.startswith(b"\0") else identity.decode()
    except UnicodeDecodeError:
        return ""


def _parse(frames: list[bytes]) -> Message | None:
    if len(frames) != 1:
        return None
    try:
        return decode(frames[0])
    except MessageError:
        return None
