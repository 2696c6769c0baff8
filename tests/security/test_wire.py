"""Who has not the run's keys gets nowhere, whatever he sends; who has them and talks nonsense changes nothing."""

import contextlib
import os
import select
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import zmq

from gemini_hpc.core.codec import MAX_MESSAGE_BYTES, Message
from gemini_hpc.core.messages import Abort, Finish, Heartbeat
from gemini_hpc.errors import GeminiError
from gemini_hpc.runtime import wire as wire_module
from gemini_hpc.runtime.wire import Client, Server, Tally, Wire, make_keys, read_keys

pytestmark = pytest.mark.filterwarnings("ignore:[Uu]nclosed:ResourceWarning")
"""ZeroMQ's sockets are closed with their context, at the end of each test."""

SOON_S = 5.0
QUIET_S = 0.3
HELLO = Heartbeat("node1", 1.5)

GREETING = b"\xff" + bytes(8) + b"\x7f"
"""How every ZMTP 3 connection begins: the signature; then version, mechanism, as-server, filler."""


def greeting(mechanism: bytes, minor: int = 1) -> bytes:
    return GREETING + bytes([3, minor]) + mechanism.ljust(20, b"\0") + bytes(32)


@pytest.fixture
def wire(tmp_path: Path) -> Iterator[Wire]:
    make_keys(tmp_path / "keys.json")
    one = Wire(tmp_path / "keys.json")
    yield one
    one.close()


@pytest.fixture
def server(wire: Wire) -> Server:
    return wire.listen("127.0.0.1")


@pytest.fixture
def strangers() -> Iterator[zmq.Context]:
    with zmq.Context() as context:
        yield context
        context.destroy(linger=0)


def until(look: Callable[[], Any], timeout_s: float = SOON_S) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := look()) and time.monotonic() < deadline:
        time.sleep(0.005)
    return found


def port_of(server: Server) -> int:
    return int(server.endpoint.rpartition(":")[2])


def plain(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port_of(server)), timeout=SOON_S)


def heard(server: Server, timeout_s: float = SOON_S) -> tuple[str, Message] | None:
    return until(server.receive, timeout_s)


def assert_friends_are_served(wire: Wire, server: Server, name: str = "friend") -> None:
    """A new one is heard, and hears the answer."""
    friend = wire.call(server.endpoint, name)
    friend.send(HELLO)
    assert heard(server) == (name, HELLO)
    server.send(name, Abort("node1", 7))
    assert until(friend.receive) == Abort("node1", 7)
    friend.close()


def test_the_run_s_own_processes_understand_one_another(wire: Wire, server: Server) -> None:
    assert_friends_are_served(wire, server)
    time.sleep(0.1)
    assert server.receive() is None
    assert (wire.tally.refused, wire.tally.strangers, wire.tally.unsent) == (0, 0, 0)


# --- without the keys -------------------------------------------------------------------------------------


def stranger(context: zmq.Context, wire: Wire, kind: str) -> "zmq.Socket[bytes]":
    dealer = context.socket(zmq.DEALER)
    dealer.linger, dealer.identity = 0, b"node1"
    own, secret = zmq.curve_keypair()
    if kind == "own keys":  # and somehow the public key of the run
        dealer.curve_publickey, dealer.curve_secretkey, dealer.curve_serverkey = own, secret, wire._public
    elif kind == "wrong server key":
        dealer.curve_publickey, dealer.curve_secretkey, dealer.curve_serverkey = own, secret, own
    elif kind == "the run's public key as his own":
        dealer.curve_publickey, dealer.curve_secretkey, dealer.curve_serverkey = wire._public, secret, wire._public
    elif kind == "a password":
        dealer.plain_username, dealer.plain_password = b"admin", b"admin"
    return dealer


@pytest.mark.parametrize(
    "kind", ["no security", "own keys", "wrong server key", "the run's public key as his own", "a password"]
)
def test_a_stranger_is_not_heard_but_counted(wire: Wire, server: Server, strangers: zmq.Context, kind: str) -> None:
    dealer = stranger(strangers, wire, kind)
    dealer.connect(server.endpoint)
    with contextlib.suppress(zmq.Again):  # his own ZeroMQ gives up as soon as it sees what the server wants
        for _ in range(3):
            dealer.send(HELLO.encode(), zmq.DONTWAIT)
    assert heard(server, QUIET_S) is None
    assert until(lambda: server.receive() or wire.tally.strangers) >= 1
    server.send("node1", Abort("node1", 7))
    assert not dealer.poll(100)
    assert_friends_are_served(wire, server)
    assert wire.tally.refused == 0


def test_a_server_that_is_no_server_of_the_run_learns_nothing(wire: Wire, strangers: zmq.Context) -> None:
    router = strangers.socket(zmq.ROUTER)
    router.curve_publickey, router.curve_secretkey = zmq.curve_keypair()
    router.curve_server = True
    port = router.bind_to_random_port("tcp://127.0.0.1")
    client = wire.call(f"tcp://127.0.0.1:{port}", "node1")
    client.send(HELLO)
    assert not router.poll(QUIET_S * 1000)
    assert client.receive() is None and not client.broke()


def test_without_the_guard_nobody_is_let_in(wire: Wire, server: Server, strangers: zmq.Context) -> None:
    """ZeroMQ's own way, when nobody answers its question, is to accept every key."""
    wire._guard.stop()
    dealer = stranger(strangers, wire, "own keys")
    dealer.connect(server.endpoint)
    dealer.send(HELLO.encode())
    assert heard(server, 2 * QUIET_S) is None
    assert until(lambda: server.receive() or wire.tally.strangers) >= 1


GARBAGE = {
    "nothing": b"",
    "HTTP": b"GET / HTTP/1.1\r\nHost: a\r\n\r\n" * 9,
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)) * 2,
    "zeros": bytes(5000),
    "ones": b"\xff" * 5000,
    "ZMTP 1": b"\x01\x00" + b"\x00" * 30 + HELLO.encode(),
    "ZMTP 2": b"\xff" + bytes(8) + b"\x7f\x01\x05\x00\x00" + HELLO.encode(),
    "ZMTP 3, no security": greeting(b"NULL") + b"\x04\x19\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER",
    "unknown mechanism": greeting(b"\xfe" * 20) + bytes(200),
    "a message at once": greeting(b"CURVE") + b"\x00" + bytes([len(HELLO.encode())]) + HELLO.encode(),
    "a wrong HELLO": greeting(b"CURVE") + b"\x04\xc8\x05HELLO\x01\x00" + bytes(range(192)),
    "INITIATE first": greeting(b"CURVE") + b"\x06" + (300).to_bytes(8, "big") + b"\x08INITIATE" + bytes(291),
    "a frame of 2^62 bytes": greeting(b"CURVE") + b"\x06" + (1 << 62).to_bytes(8, "big") + bytes(1000),
    "a frame of no length": greeting(b"CURVE") + b"\x04\x00" * 50,
    "reserved flags": greeting(b"CURVE") + b"\xf8\x10" + bytes(16),
}


@pytest.mark.parametrize("what", GARBAGE)
def test_garbage_over_plain_tcp(wire: Wire, server: Server, what: str) -> None:
    with plain(server) as line:
        line.sendall(GARBAGE[what])
        time.sleep(0.02)
    assert until(lambda: server.receive() or wire.tally.strangers) == 1
    assert_friends_are_served(wire, server)
    assert (wire.tally.strangers, wire.tally.refused) == (1, 0)


class Recorder:
    """A man in the middle: hands everything on, and remembers what the client said."""

    def __init__(self, port: int) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.said = b""
        self.passing = True
        self.lines: list[socket.socket] = []
        self._server_port = port
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        near, _ = self._listener.accept()
        far = socket.create_connection(("127.0.0.1", self._server_port))
        self.lines = [near, far]
        while not self._over.is_set():
            ready, _, _ = select.select(self.lines if self.passing else [], [], [], 0.02)
            for line in ready:
                raw = line.recv(65536)
                if not raw:
                    return
                self.said += raw if line is near else b""
                (far if line is near else near).sendall(raw)

    def close(self) -> None:
        self._over.set()
        self._thread.join()
        for line in [*self.lines, self._listener]:
            line.close()


def test_recorded_bytes_cannot_be_replayed(wire: Wire, server: Server) -> None:
    middle = Recorder(port_of(server))
    friend = wire.call(f"tcp://127.0.0.1:{middle.port}", "node1")
    friend.send(Abort("node1", 3))
    assert heard(server) == ("node1", Abort("node1", 3))
    assert len(middle.said) > 400 and b"Abort" not in middle.said and b"node1" not in middle.said
    for _ in range(3):
        with plain(server) as line:
            line.sendall(middle.said)
            assert heard(server, 0.1) is None
    assert until(lambda: server.receive() or wire.tally.strangers == 3)
    # and once more in the very connection that they were recorded from
    middle.lines[1].sendall(middle.said[-90:])
    assert heard(server, QUIET_S) is None
    assert_friends_are_served(wire, server)
    middle.close()


# --- many of them -----------------------------------------------------------------------------------------


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_half_open_connections_by_the_hundred(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strangers: zmq.Context
) -> None:
    """They cost a descriptor each, until the handshake's time is over; meanwhile everybody is served."""
    monkeypatch.setattr(wire_module, "HANDSHAKE_S", 0.5)
    make_keys(tmp_path / "keys.json")
    wire = Wire(tmp_path / "keys.json")
    server = wire.listen("127.0.0.1")
    old = wire.call(server.endpoint, "old friend")
    old.send(HELLO)
    assert heard(server) == ("old friend", HELLO)
    before = descriptors()
    mute = [plain(server) for _ in range(300)]
    for line in mute[::2]:
        line.sendall(greeting(b"CURVE"))
    assert_friends_are_served(wire, server)
    old.send(HELLO)
    assert heard(server) == ("old friend", HELLO)
    assert until(lambda: server.receive() or descriptors() - before - len(mute) <= 2)
    for line in mute:
        line.close()
    assert until(lambda: server.receive() or wire.tally.strangers == len(mute))
    assert not old.broke()
    wire.close()


CROWDED = """
import resource, sys, time
from pathlib import Path
from gemini_hpc.core.messages import Heartbeat
from gemini_hpc.runtime import wire as module
module.HANDSHAKE_S = 0.5
wire = module.Wire(Path(sys.argv[1]))
server = wire.listen("127.0.0.1")
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
print(server.endpoint, flush=True)
while True:
    while (received := server.receive()) is not None:
        server.send(*received)
    time.sleep(0.002)
"""


def test_a_crowd_that_takes_all_descriptors(wire: Wire, tmp_path: Path) -> None:
    """Who is connected is served all the while; who is not, as soon as the crowd is gone."""
    command = [sys.executable, "-c", CROWDED, str(tmp_path / "keys.json")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        endpoint = process.stdout.readline().strip()
        old = wire.call(endpoint, "old friend")
        assert echoed(old)
        crowd = [socket.create_connection(("127.0.0.1", int(endpoint.rpartition(":")[2]))) for _ in range(150)]
        open_files = psutil.Process(process.pid).num_fds
        assert until(lambda: open_files() >= 63)
        assert echoed(old) and echoed(old)
        for line in crowd:
            line.close()
        assert echoed(wire.call(endpoint, "new friend"))
        assert process.poll() is None and until(lambda: open_files() < 40)
        process.kill()


def echoed(client: Client) -> bool:
    client.send(HELLO)
    return until(client.receive) == HELLO


def test_a_flood_that_nobody_looks_at_stops_nothing(wire: Wire, server: Server) -> None:
    """More connections than ZeroMQ keeps events for, while the server's process is busy with something else."""
    friend = wire.call(server.endpoint, "friend")
    friend.send(HELLO)
    assert heard(server) == ("friend", HELLO)
    for _ in range(1100):
        with plain(server) as line:
            line.sendall(b"\r\n" * 50)
    assert echo_without_looking(server, friend)
    assert until(lambda: server.receive() or wire.tally.strangers == 1100)


def echo_without_looking(server: Server, friend: Client) -> bool:
    friend.send(HELLO)
    return bool(server.socket.poll(SOON_S * 1000))


def test_claims_of_long_frames_cost_no_memory(wire: Wire, server: Server) -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    lines = [plain(server) for _ in range(100)]
    for line in lines:
        line.sendall(greeting(b"CURVE") + b"\x06" + MAX_MESSAGE_BYTES.to_bytes(8, "big") + bytes(10_000))
    time.sleep(QUIET_S)
    assert process.memory_info().rss - before < 64 << 20
    for line in lines:
        line.close()
    assert_friends_are_served(wire, server)


# --- with the keys, and nonsense --------------------------------------------------------------------------


def raw_client(wire: Wire, server: Server, identity: bytes = b"node1") -> "zmq.Socket[bytes]":
    dealer = wire._socket(zmq.DEALER)
    if identity:
        dealer.identity = identity
    dealer.curve_serverkey = wire._public
    dealer.connect(server.endpoint)
    return dealer


NONSENSE: dict[str, list[bytes]] = {
    "not a message": [b"\x80\x04nonsense"],
    "empty": [b""],
    "two frames": [HELLO.encode(), HELLO.encode()],
    "an empty frame first": [b"", HELLO.encode()],
    "a thousand frames": [HELLO.encode()] * 1000,
    "longer than allowed": [HELLO.encode().rjust(MAX_MESSAGE_BYTES + 1)],
}


@pytest.mark.parametrize("what", NONSENSE)
def test_nonsense_is_refused_and_counted(wire: Wire, server: Server, what: str) -> None:
    dealer = raw_client(wire, server)
    dealer.send_multipart(NONSENSE[what])
    dealer.send(HELLO.encode())
    assert heard(server) == ("node1", HELLO)
    assert (wire.tally.refused, wire.tally.strangers) == (1, 0)


@pytest.mark.parametrize("identity", [b"", b"\xff\xfe", b"node\xc3", b"\xed\xa0\x80"])
def test_who_has_no_proper_name_is_refused(wire: Wire, server: Server, identity: bytes) -> None:
    dealer = raw_client(wire, server, identity)
    dealer.send(HELLO.encode())
    assert until(lambda: server.receive() or wire.tally.refused) == 1
    assert_friends_are_served(wire, server)


def test_a_name_that_zeromq_made_up_is_none() -> None:
    """A zero byte and four others, which may happen to be text."""
    assert wire_module._name(b"\0abcd") == ""
    assert wire_module._name("nœud".encode()) == "nœud"


def test_nonsense_from_the_server_is_refused_and_counted(wire: Wire, server: Server) -> None:
    client = wire.call(server.endpoint, "node1")
    client.send(HELLO)
    assert heard(server) == ("node1", HELLO)
    server.socket.send_multipart([b"node1", b"nonsense"])
    server.socket.send_multipart([b"node1", HELLO.encode(), b""])
    server.send("node1", Abort("node1", 7))
    assert until(client.receive) == Abort("node1", 7)
    assert wire.tally.refused == 2


def full(nbytes: int) -> Finish:
    """A message of exactly that length on the wire."""
    return Finish("node1", "stopped", "x" * (nbytes - len(Finish("node1", "stopped", "").encode())))


def test_the_longest_message_arrives_and_a_longer_one_is_not_sent(wire: Wire, server: Server) -> None:
    """A longer one would break the connection, which counts as evidence against the node."""
    client = wire.call(server.endpoint, "node1")
    for message in (full(MAX_MESSAGE_BYTES), full(MAX_MESSAGE_BYTES + 1), HELLO):
        client.send(message)
    assert heard(server) == ("node1", full(MAX_MESSAGE_BYTES))
    assert heard(server) == ("node1", HELLO)
    for message in (full(MAX_MESSAGE_BYTES), full(MAX_MESSAGE_BYTES + 1), HELLO):
        server.send("node1", message)
    assert until(client.receive) == full(MAX_MESSAGE_BYTES)
    assert until(client.receive) == HELLO
    assert not client.broke()
    assert (wire.tally.unsent, wire.tally.refused, wire.tally.strangers) == (2, 0, 0)


def test_far_too_long_frames_break_the_connection_and_nothing_else(wire: Wire, server: Server) -> None:
    client = wire.call(server.endpoint, "node1")
    client.send(HELLO)
    assert heard(server) == ("node1", HELLO)
    client.socket.send(bytes(3 * MAX_MESSAGE_BYTES))
    assert until(client.broke)
    assert until(lambda: client.send(HELLO) or server.receive()) == ("node1", HELLO)
    assert wire.tally.strangers == 0


def test_a_client_survives_a_far_too_long_frame_too(wire: Wire, server: Server) -> None:
    client = wire.call(server.endpoint, "node1")
    client.send(HELLO)
    assert heard(server) == ("node1", HELLO)
    server.socket.send_multipart([b"node1", bytes(3 * MAX_MESSAGE_BYTES)])
    assert until(client.broke)
    assert until(lambda: client.send(HELLO) or client.receive() or server.receive()) == ("node1", HELLO)
    assert (wire.tally.refused, wire.tally.strangers) == (1, 0)


# --- lines that get lost ----------------------------------------------------------------------------------

IMPOSTORS: dict[str, bytes] = {
    "HTTP": b"HTTP/1.1 400 Bad Request\r\n\r\n" * 4,
    "no security": greeting(b"NULL") + bytes(50),
    "CURVE, then junk": greeting(b"CURVE") + b"\x04\x20" + b"z" * 32,
    "a refusal": greeting(b"CURVE") + b"\x04\x0a\x05ERROR\x03400",
}


@pytest.mark.parametrize("what", IMPOSTORS)
def test_a_line_outlives_an_impostor_on_its_port(wire: Wire, what: str) -> None:
    """ZeroMQ alone never connects again to an end that spoke nonsense once."""
    impostor = socket.create_server(("127.0.0.1", 0))
    port = impostor.getsockname()[1]
    client = wire.call(f"tcp://127.0.0.1:{port}", "node1")
    line, _ = impostor.accept()
    impostor.close()
    line.sendall(IMPOSTORS[what])
    time.sleep(0.05)
    line.close()
    ours = wire._socket(zmq.ROUTER)
    ours.curve_server, ours.zap_domain = True, wire_module._DOMAIN
    assert until(lambda: bind(ours, port))
    assert until(lambda: client.receive() or client.send(HELLO) or ours.poll(20))
    assert wire.tally.strangers == 1
    assert not client.broke(), "what was no connection to the run cannot break"


def bind(router: "zmq.Socket[bytes]", port: int) -> bool:
    try:
        router.bind(f"tcp://127.0.0.1:{port}")
    except zmq.ZMQError:
        return False
    return True


def test_an_end_is_told_once(wire: Wire, server: Server) -> None:
    client = wire.call(server.endpoint, "node1")
    client.send(HELLO)
    assert heard(server) == ("node1", HELLO)
    assert not client.broke()
    server.socket.close(linger=0)
    assert until(client.broke)
    time.sleep(3 * wire_module.REVIVE_S)
    assert client.receive() is None and not client.broke()


def test_who_comes_back_takes_the_place_of_his_dead_connection(wire: Wire, server: Server) -> None:
    """A cable was pulled, and nobody told the server: it must not keep the name for a connection that is dead."""
    middle = Recorder(port_of(server))
    first = wire.call(f"tcp://127.0.0.1:{middle.port}", "node1")
    first.send(HELLO)
    assert heard(server) == ("node1", HELLO)
    middle.passing = False
    again = wire.call(server.endpoint, "node1")
    again.send(Abort("node1", 4))
    assert heard(server) == ("node1", Abort("node1", 4))
    server.send("node1", Abort("node1", 5))
    assert until(again.receive) == Abort("node1", 5)
    middle.close()


def test_a_peer_that_does_not_read_fills_no_memory(wire: Wire) -> None:
    listener = socket.create_server(("127.0.0.1", 0))  # accepts, and never says a word
    client = wire.call(f"tcp://127.0.0.1:{listener.getsockname()[1]}", "node1")
    for _ in range(5000):
        client.send(HELLO)
    assert wire.tally.unsent >= 3000
    listener.close()


# --- the keys ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_keys_are_the_owner_s_alone_under_any_umask(tmp_path: Path, mask: int) -> None:
    path = tmp_path / "keys.json"
    path.write_text("left by an earlier attempt")
    path.chmod(0o666)
    before = os.umask(mask)
    try:
        make_keys(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_keys(path) == read_keys(path)


def test_every_run_has_keys_of_its_own(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_keys(tmp_path / name)
    assert read_keys(tmp_path / "a") != read_keys(tmp_path / "b")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o666])
def test_keys_that_others_may_have_read_are_not_used(tmp_path: Path, mode: int) -> None:
    make_keys(tmp_path / "keys.json")
    (tmp_path / "keys.json").chmod(mode)
    with pytest.raises(GeminiError, match=r"keys\.json"):
        Wire(tmp_path / "keys.json")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[1]",
        b"\xff",
        b"[" * 4000,
        b"{}",
        b'{"public": 1, "secret": 2}',
        b'{"public": "x", "secret": "y"}',
        b'{"public": "' + b"a" * 40 + b'", "secret": "' + b"b" * 40 + b'"}',
        b'{"public": "\xc3\xa9", "secret": "\\ud800"}',
    ],
)
def test_a_damaged_key_file_is_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "keys.json"
    path.touch(mode=0o600)
    path.write_bytes(content)
    with pytest.raises(GeminiError) as caught:
        Wire(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_descriptors_of_closed_lines_come_back(wire: Wire, server: Server) -> None:
    assert_friends_are_served(wire, server)
    before = descriptors()
    for number in range(100):
        assert_friends_are_served(wire, server, f"friend{number}")
    assert wire.tally == Tally()
    assert until(lambda: server.receive() or descriptors() <= before + 2)
