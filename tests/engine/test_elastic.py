"""The elastic group: it forms, it is given up, and an abort ends every wait inside it."""

import os
import signal
import socket
import threading
import time
from typing import Any

import pytest

from tests.engine.harness import Cluster, Clusters, Undisturbed
from tests.engine.job import Case

HERE = "tests.engine.test_elastic"
LONG = 16_000_000  # float32: more than the kernel takes from a sender
PROMPT_S = 20.0  # torch takes seconds to word an error on a busy machine; a wait ends by itself after 60 s


def send_join(run: Cluster, number: int, store: str | None = None) -> None:
    store = store or run.stores[run.ranks[0].pid]
    run.ranks[number].send("join", generation=run.generation + 1, rank=number, store=store)


def join_later(run: Cluster) -> None:
    """All ranks meet in a later generation, and train."""
    for number, rank in enumerate(run.ranks):
        run.stores[rank.pid] = rank.call("leave")
        rank.call("hot_swap", rank=number)
    run.generation += 1
    run.start()
    run.train(1, 1)


@pytest.mark.parametrize("number", [0, 1])
def test_an_abort_wakes_a_rank_whose_peer_never_comes(number: int, cluster: Clusters) -> None:
    """Rank 0 waits at its own store, the others at rank 0's."""
    run = cluster(Case(), size=2, spares=0)
    rank = run.ranks[number]
    send_join(run, number)
    rank.settle()
    begin = time.monotonic()
    rank.send("abort", generation=run.generation + 1)
    rank.failure(wait_s=PROMPT_S)
    assert time.monotonic() - begin < PROMPT_S
    join_later(run)


def test_a_store_whose_owner_is_gone_is_given_up_at_once(cluster: Clusters) -> None:
    """Rank 0's process died between its offer of a store and the join: nobody listens there."""
    run = cluster(Case(), size=2, spares=0)
    with socket.socket() as unused:  # bound but not listening: connections are refused
        unused.bind(("127.0.0.1", 0))
        send_join(run, 1, f"127.0.0.1:{unused.getsockname()[1]}")
        assert run.ranks[1].failure(wait_s=PROMPT_S).peer
    join_later(run)


def test_an_abort_that_comes_before_the_join_is_not_forgotten(cluster: Clusters) -> None:
    """The control thread reads the abort while the main thread still resets or rebuilds its engine."""
    run = cluster(Case(), size=2, spares=0)
    run.ranks[1].send("abort", generation=run.generation + 1)
    run.ranks[1].call("census")  # the abort was carried out: it was read first
    send_join(run, 1)
    run.ranks[1].failure(wait_s=PROMPT_S)


def test_an_abort_at_any_moment_of_the_join_ends_it(cluster: Clusters) -> None:
    """Before the store is reached, while the peers are awaited, and in between."""
    run = cluster(Case(), size=2, spares=0)
    for number, rank in enumerate(run.ranks):
        for moment in range(12):
            run.generation += 1
            rank.send("join", generation=run.generation, rank=number, store=run.stores[run.ranks[0].pid])
            time.sleep(moment * 0.0005)
            rank.send("abort", generation=run.generation)
            rank.failure(wait_s=PROMPT_S)
            rank.call("hot_swap", rank=number)
    join_later(run)


def test_a_connection_of_the_users_own_outlives_the_group_that_formed_meanwhile(cluster: Clusters) -> None:
    run = cluster(Case(), size=2, spares=0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(PROMPT_S)
        run.ranks[1].call("call", module=HERE, function="call_home", port=server.getsockname()[1])
        send_join(run, 1)
        line = server.accept()[0]
    with line:
        line.settimeout(PROMPT_S)
        run.ranks[1].send("abort", generation=run.generation + 1)
        run.ranks[1].failure(wait_s=PROMPT_S)
        join_later(run)
        run.ranks[1].call("leave")
        line.sendall(b"still there?")
        assert line.recv(100) == b"still there?"


def test_an_abort_that_comes_late_does_not_harm_the_next_group(cluster: Clusters, undisturbed: Undisturbed) -> None:
    """A rank saw the failure by itself, and is in the next generation already."""
    run = cluster(Case(), size=2, spares=0).start()
    run.train(1, 2)
    for rank in run.ranks:
        rank.send("abort", generation=1)
    run.recover([])
    for rank in run.ranks:
        rank.send("abort", generation=1)
        rank.call("census")  # the abort was read first
    run.train(3, 7)
    assert run.losses() == undisturbed(Case(), 2, 7)


def test_an_abort_wakes_a_rank_whose_message_is_half_sent(cluster: Clusters) -> None:
    """gloo itself forgets to: the peer stopped reading, and the rank waits for the rest to be sent."""
    run = cluster(Case(), size=2, spares=0).start()
    run.ranks[1].send("call", module=HERE, function="stop_while_receiving")
    run.ranks[1].wait_struck("T")
    run.ranks[0].send("call", module=HERE, function="broadcast")
    run.ranks[0].settle()
    run.ranks[0].send("abort", generation=run.generation)
    run.ranks[0].failure(wait_s=PROMPT_S)
    run.ranks[0].send("leave")
    run.ranks[0].answer(PROMPT_S)


def test_an_abort_in_the_middle_of_small_collectives_wakes_every_rank(cluster: Clusters) -> None:
    """Whatever they are at; without `gloo.Work` one in twenty waits sleeps on until its timeout."""
    run = cluster(Case(), size=3, spares=0).start()
    for generation in range(25):
        for rank in run.ranks:
            rank.send("call", module=HERE, function="talk")
        time.sleep(0.05 + generation * 0.0003)
        for rank in run.ranks:
            rank.send("abort", generation=run.generation)
        for rank in run.ranks:
            assert rank.failure(wait_s=PROMPT_S).peer
        run.recover([])
    run.train(1, 1)


def stop_while_receiving(rank: Any) -> None:
    import torch
    import torch.distributed as dist

    dist.broadcast(torch.empty(LONG), 0, async_op=True)
    time.sleep(1.0)  # so that it is asked for
    os.kill(os.getpid(), signal.SIGSTOP)


def call_home(rank: Any, port: int) -> None:
    """While the next group forms, open a connection, and send back what comes."""

    def echo() -> None:
        while not rank._world._forming:
            time.sleep(0.001)
        with socket.create_connection(("127.0.0.1", port)) as line:
            while text := line.recv(100):
                line.sendall(text)

    threading.Thread(target=echo, daemon=True).start()


def broadcast(rank: Any) -> None:
    import torch
    import torch.distributed as dist

    dist.broadcast(torch.empty(LONG), 0)


def talk(rank: Any) -> None:
    """Vote and reduce until that fails."""
    import torch
    import torch.distributed as dist

    number = torch.ones(1)
    while True:
        outcome = rank._world.vote(True)
        dist.all_reduce(number)
        outcome()


def test_errors_of_a_killed_peer_are_peer_failures(cluster: Clusters) -> None:
    """Without any abort: what gloo says when the other process is gone, in a collective and in the join."""
    run = cluster(Case(), size=2, spares=0).start()
    run.train_until_struck(1, 3, 1, "forward", 2)
    (failure,) = run.survivors_fail(1, abort=False)
    assert failure.kind == "RuntimeError"


def test_a_peer_that_dies_while_the_group_forms_is_a_peer_failure(cluster: Clusters) -> None:
    """Rank 0 takes its store with it."""
    run = cluster(Case(), size=3, spares=0)
    for number in (0, 1):
        send_join(run, number)
    run.ranks[0].settle()
    run.ranks[1].settle()
    run.ranks[0].end()
    assert run.ranks[1].failure(wait_s=PROMPT_S).peer


@pytest.mark.parametrize("text", ["boom", "expected m1 and m2 to have the same dtype"])
def test_errors_of_the_training_are_not(text: str) -> None:
    from gemini_hpc.engine.elastic import is_peer_failure

    assert not is_peer_failure(RuntimeError(text))
    assert not is_peer_failure(ValueError("gloo"))


def test_swaps_in_a_row_leak_nothing(cluster: Clusters) -> None:
    """Thirty generations of one pair of processes: descriptors, threads and memory stay flat."""
    run = cluster(Case(), size=2, spares=0).start()
    run.train(1, 1)
    step, seen = 1, []
    for _ in range(30):
        for rank in run.ranks:
            rank.send("abort", generation=run.generation)
        assert run.recover([]) == step
        run.train(step + 1, step + 1)
        step += 1
        seen.append(run.ranks[0].call("census"))
    for what in ("threads", "fds", "groups"):
        assert seen[-1][what] == seen[2][what], [count[what] for count in seen]
    assert seen[-1]["rss_kib"] - seen[4]["rss_kib"] < 8 << 10, [count["rss_kib"] for count in seen]
