"""The agent's Unix socket: this user's alone, and a process that talks nonsense on it only ends its own line."""

import os
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from gemini_hpc.core.messages import Hello, Parked, WorkerLost
from gemini_hpc.runtime.channel import MAX_PACKET_BYTES, Channel, Listener
from gemini_hpc.runtime.household import Household, LineEnded, ProcessEnded
from gemini_hpc.runtime.paths import RunPaths
from gemini_hpc.runtime.processes import wait_exit
from gemini_hpc.runtime.wire import Tally

HELLO = Hello("node0", "worker", 4711, 0)


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder with a short name: the path of a Unix socket has 107 bytes."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="gemini-test-") as folder:
        yield Path(folder)


@pytest.fixture
def paths(place: Path) -> RunPaths:
    return RunPaths(place, place)


@pytest.fixture
def household(paths: RunPaths) -> Iterator[Household]:
    one = Household(paths, "node0", zmq.Poller(), Tally())
    yield one
    one.end_all()
    for line in one._strangers:
        line.close()
    one._listener._line.close()


def stranger(paths: RunPaths) -> socket.socket:
    line = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    line.settimeout(5)
    line.connect(str(paths.socket("node0")))
    return line


def said(household: Household, rounds: int = 8) -> list[object]:
    """What the household passes on within some turns of its loop."""
    return [news for _ in range(rounds) for news in household.news()]


def hung_up(line: socket.socket) -> bool:
    try:
        return line.recv(100) == b""
    except ConnectionError:
        return True


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_the_socket_is_the_owner_s_alone_under_any_umask(place: Path, mask: int) -> None:
    path = place / "agent.sock"
    path.write_text("left by an earlier attempt")
    before = os.umask(mask)
    try:
        listener = Listener(path)
        assert os.umask(mask) == mask, "the umask of the process is what it was"
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_ISSOCK(path.stat().st_mode)
    listener._line.close()


NONSENSE = {
    "bytes": b"\x00\xff nonsense",
    "half a hello": HELLO.encode()[:-5],
    "two hellos in one": HELLO.encode() * 2,
    "an unknown role": Hello("node0", "coordinator", 1, 0).encode(),
    "no hello": Parked("node0", 3, "store").encode(),
    "deep nesting": b"[" * 60_000,
    "nothing": b"",
}


@pytest.mark.parametrize("what", NONSENSE)
def test_nonsense_ends_its_own_line_and_nothing_else(household: Household, paths: RunPaths, what: str) -> None:
    worker = Channel.connect(paths.socket("node0"))
    worker.send(HELLO)
    assert said(household) == [("worker", HELLO)]
    with stranger(paths) as line:
        line.send(NONSENSE[what])
        assert said(household) == []
        assert hung_up(line)
    assert household._tally.refused == (what != "nothing")
    worker.send(WorkerLost("node0", "still here", False))
    assert said(household) == [("worker", WorkerLost("node0", "still here", False))]
    household.send("worker", Parked("node0", 1, ""))
    assert worker.receive() == Parked("node0", 1, "")
    worker.close()


def test_nonsense_after_hello_is_the_end_of_that_line(household: Household, paths: RunPaths) -> None:
    with stranger(paths) as line:
        line.send(HELLO.encode())
        line.send(b"nonsense")
        assert said(household) == [("worker", HELLO), ("worker", LineEnded())]
        assert hung_up(line)
    assert household._tally.refused == 1


def test_lines_that_end_give_their_descriptors_back(household: Household, paths: RunPaths) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for number in range(60):
        with stranger(paths) as line:
            said(household, 2)
            if number % 3 == 1:
                line.send(b"nonsense")
            elif number % 3 == 2:
                line.send(HELLO.encode())
            said(household, 2)
    said(household)
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_last_words_of_a_process_are_heard_though_it_is_gone(
    household: Household, paths: RunPaths, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "talker.py").write_text(TALKER)
    paths.logs.mkdir()
    monkeypatch.setenv("PYTHONPATH", f"{place}:{os.environ.get('PYTHONPATH', '')}")
    household.start("worker", "talker")
    assert wait_exit(household._children["worker"].pidfd, 60.0)
    news = said(household, 40)
    assert [word.reason for _, word in news if isinstance(word, WorkerLost)] == [str(n) for n in range(20)]
    assert news[-1] == ("worker", ProcessEnded("exit status 3"))


TALKER = """
import os, sys
from gemini_hpc.core.messages import Hello, WorkerLost
from gemini_hpc.runtime.channel import Channel
from gemini_hpc.runtime.paths import RunPaths
from pathlib import Path
line = Channel.connect(RunPaths(Path(sys.argv[1]), Path(sys.argv[1])).socket("node0"))
line.send(Hello("node0", "worker", os.getpid(), 0))
for number in range(20):
    line.send(WorkerLost("node0", str(number), False))
os._exit(3)
"""


def pair() -> tuple[Channel, Channel]:
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return Channel(ends[0]), Channel(ends[1])


def full(nbytes: int) -> WorkerLost:
    return WorkerLost("node0", "x" * (nbytes - len(WorkerLost("node0", "", False).encode())), False)


def test_the_longest_message_arrives_and_a_longer_one_is_not_sent() -> None:
    """Half of it would be taken for nonsense, and cost the line."""
    one, other = pair()
    assert one.send(full(MAX_PACKET_BYTES))
    assert other.receive() == full(MAX_PACKET_BYTES)
    assert not one.send(full(MAX_PACKET_BYTES + 1))
    assert one.send(HELLO) and other.receive() == HELLO
    one.close()
    assert other.receive() is None and not other.send(HELLO)
    other.close()


def test_a_child_that_does_not_read_does_not_stop_its_agent(place: Path) -> None:
    listener = Listener(place / "agent.sock")
    child = Channel.connect(place / "agent.sock")
    line = listener.accept()
    start = time.monotonic()
    sent = [line.send(full(8192)) for _ in range(500)]
    assert sent[0] and not sent[-1], "the kernel keeps only so much for it"
    assert time.monotonic() - start < 5
    assert child.receive() == full(8192), "and what was sent is whole"
    for end in (line, child):
        end.close()
    listener._line.close()
