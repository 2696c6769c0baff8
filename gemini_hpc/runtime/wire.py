"""The control plane: ZeroMQ sockets with CURVE keys made for this run.

Whoever has the run's keys file (mode 0600) may speak; everybody else fails the handshake. Both sides use the one
key pair of the run, and the server's side checks that the client's key is that one.
"""

import json
import os
from pathlib import Path
from typing import Any

import zmq
import zmq.auth.thread
from zmq.utils.monitor import parse_monitor_message

from gemini_hpc.core.messages import MAX_MESSAGE_BYTES, Message, MessageError, decode


def make_keys(path: Path) -> None:
    """Write a fresh key pair, readable by the owner alone."""
    public, secret = zmq.curve_keypair()
    path.unlink(missing_ok=True)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(fd, "w") as file:
        json.dump({"public": public.decode(), "secret": secret.decode()}, file)


class _OnlyTheRun:
    def __init__(self, public: bytes) -> None:
        self._public = public

    def callback(self, _domain: str, key: bytes) -> bool:
        return key == self._public


class Wire:
    """The sockets of one process on the control plane."""

    def __init__(self, keys: Path) -> None:
        raw = json.loads(keys.read_text())
        self._public, self._secret = raw["public"].encode(), raw["secret"].encode()
        self._context = zmq.Context()
        self._guard = zmq.auth.thread.ThreadAuthenticator(self._context)
        self._guard.start()
        self._guard.configure_curve_callback(domain="*", credentials_provider=_OnlyTheRun(self._public))

    def listen(self, address: str) -> "Server":
        socket = self._socket(zmq.ROUTER)
        socket.curve_server = True
        socket.setsockopt(zmq.ROUTER_HANDOVER, 1)  # who calls again is heard, though its old connection never ended
        port = socket.bind_to_random_port(f"tcp://{address}")
        return Server(socket, f"tcp://{address}:{port}")

    def call(self, endpoint: str, identity: str) -> "Client":
        """Connect to a server; reconnects by itself for as long as the client lives."""
        socket = self._socket(zmq.DEALER)
        socket.identity = identity.encode()
        socket.curve_serverkey = self._public
        socket.reconnect_ivl = 20
        socket.reconnect_ivl_max = 200
        monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        socket.connect(endpoint)
        return Client(socket, monitor)

    def close(self) -> None:
        """Send what is queued (at most a second) and close."""
        self._guard.stop()
        self._context.destroy(linger=1000)

    def _socket(self, kind: int) -> "zmq.Socket[bytes]":
        socket = self._context.socket(kind)
        socket.curve_publickey, socket.curve_secretkey = self._public, self._secret
        socket.linger = 1000
        socket.maxmsgsize = MAX_MESSAGE_BYTES
        return socket


class Server:
    """Accepts clients of the run and answers each by its identity."""

    def __init__(self, socket: "zmq.Socket[bytes]", endpoint: str) -> None:
        self.socket = socket
        self.endpoint = endpoint
        self.refused = 0  # frames that were not messages

    def receive(self) -> tuple[str, Message] | None:
        """Return the next (client identity, message) that waits, or None."""
        while self.socket.get(zmq.EVENTS) & zmq.POLLIN:
            frames = self.socket.recv_multipart()
            message = _parse(frames[1:])
            if message is not None:
                return frames[0].decode(errors="replace"), message
            self.refused += 1
        return None

    def send(self, identity: str, message: Message) -> None:
        self.socket.send_multipart([identity.encode(), message.encode()])


class Client:
    """A line to one server."""

    def __init__(self, socket: "zmq.Socket[bytes]", monitor: Any) -> None:
        self.socket = socket
        self.monitor = monitor

    def receive(self) -> Message | None:
        """Return the next message that waits, or None."""
        while self.socket.get(zmq.EVENTS) & zmq.POLLIN:
            message = _parse(self.socket.recv_multipart())
            if message is not None:
                return message
        return None

    def broke(self) -> bool:
        """Whether the connection broke since the last call."""
        broken = False
        while self.monitor.get(zmq.EVENTS) & zmq.POLLIN:
            broken |= parse_monitor_message(self.monitor.recv_multipart())["event"] == zmq.EVENT_DISCONNECTED
        return broken

    def send(self, message: Message) -> None:
        try:
            self.socket.send(message.encode(), zmq.DONTWAIT)
        except zmq.Again:
            return  # the queue is full: the peer has been silent for long, and its heartbeat says so too

    def close(self) -> None:
        self.socket.disable_monitor()
        self.socket.close(linger=0)


def _parse(frames: list[bytes]) -> Message | None:
    if len(frames) != 1:
        return None
    try:
        return decode(frames[0])
    except MessageError:
        return None
