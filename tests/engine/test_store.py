"""The store in which a group forms: c10d's interface over lines of our own."""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
import torch.distributed as dist

from gemini_hpc.engine.store import MAX_BYTES, StoreClient, StoreServer

WAIT_S = 30.0

Connect = Callable[..., StoreClient]


@pytest.fixture
def server() -> Iterator[StoreServer]:
    server = StoreServer("127.0.0.1")
    yield server
    server.close()


@pytest.fixture
def connect(server: StoreServer) -> Iterator[Connect]:
    clients = []

    def connect(timeout_s: float = WAIT_S) -> StoreClient:
        clients.append(StoreClient(server.address, timeout_s))
        clients[-1].connect()
        return clients[-1]

    yield connect
    for client in clients:
        client.close()


def in_thread(work: Callable[[], object]) -> Callable[[], object]:
    """Begin `work`; what is returned waits for it, and returns its result or the error that it raised."""
    found: list[object] = []

    def run() -> None:
        try:
            found.append(work())
        except Exception as error:  # noqa: BLE001  handed to the test
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def result() -> object:
        thread.join(WAIT_S)
        assert found, "still at it"
        return found[0]

    return result


def test_what_one_posts_another_reads(connect: Connect) -> None:
    one, other = connect(), connect()
    one.set("a", b"\0\xff" * 100)
    one.set("b", "text")
    other.wait(["a", "b"], timedelta(seconds=WAIT_S))
    assert (other.get("a"), other.get("b")) == (b"\0\xff" * 100, b"text")


def test_c10d_uses_it_as_its_own(connect: Connect) -> None:
    store = connect()
    prefixed = dist.PrefixStore("generation-1", store)
    prefixed.set("key", "value")
    assert prefixed.get("key") == b"value"
    assert store.get("generation-1/key") == b"value"


def test_a_reader_waits_for_what_is_posted_later(connect: Connect) -> None:
    reader = connect()
    result = in_thread(lambda: reader.get("late"))
    connect().set("late", b"here")
    assert result() == b"here"


def test_a_reader_waits_no_longer_than_it_said(connect: Connect) -> None:
    reader = connect(0.05)
    with pytest.raises(dist.DistNetworkError, match="rank 0's store at 127"):
        reader.get("never")


@pytest.mark.parametrize("who", ["server", "client"])
def test_a_reader_wakes_when_either_side_ends(server: StoreServer, connect: Connect, who: str) -> None:
    reader = connect()
    result = in_thread(lambda: reader.get("never"))
    time.sleep(0.05)  # in most cases it waits by now; it must end in the others too
    {"server": server, "client": reader}[who].close()
    assert isinstance(result(), dist.DistNetworkError)


def test_nobody_listens_is_known_at_once(server: StoreServer, connect: Connect) -> None:
    server.close()
    began = time.monotonic()
    with pytest.raises(dist.DistNetworkError):
        connect().get("x")
    assert time.monotonic() - began < WAIT_S / 2


@pytest.mark.parametrize(
    "words",
    [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        b"P\0\1",  # and no more
        b"P\0\1\xff\xff\xff\xffk",  # 4 GB
        b"X\0\1\0\0\0\1kv",  # no such request
        b"P\0\1\0\0\0\1\xffv",  # a key that is no text
    ],
)
def test_strangers_change_nothing(server: StoreServer, connect: Connect, words: bytes) -> None:
    host, port = server.address.split(":")
    with socket.create_connection((host, int(port)), WAIT_S) as line:
        line.sendall(words)
        line.shutdown(socket.SHUT_WR)
        line.settimeout(WAIT_S)
        try:
            while line.recv(4096):
                pass  # it hangs up
        except ConnectionResetError:
            pass
    store = connect()
    store.set("k", b"mine")
    assert store.get("k") == b"mine"


def test_what_is_too_large_is_refused(connect: Connect) -> None:
    store = connect()
    with pytest.raises(dist.DistNetworkError):
        store.set("large", b"0" * (MAX_BYTES + 1))
        store.get("large")


def test_nothing_is_left_behind() -> None:
    def census() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    before = census()
    for _ in range(50):
        server = StoreServer("127.0.0.1")
        clients = [StoreClient(server.address, WAIT_S) for _ in range(3)]
        for client in clients:
            client.connect()
            client.set("k", b"v")
            assert client.get("k") == b"v"
            client.close()
        server.close()
    end = time.monotonic() + WAIT_S
    while any(now > was for now, was in zip(census(), before, strict=True)):
        assert time.monotonic() < end, (before, census())
        time.sleep(0.01)
