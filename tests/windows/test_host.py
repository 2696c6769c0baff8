"""Pulls between real window hosts, and what is left of them when ranks are killed."""

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from gemini_hpc.arena import OWN, Arena, Record, State, checksum
from tests.windows.worlds import MIB, World, alive, holds, until

pytestmark = pytest.mark.cluster

SIZE = 20 * MIB  # more than one chunk
Arenas = Callable[..., list[Arena]]
Start = Callable[..., World]


def test_a_sealed_snapshot_is_pulled_and_verified(arenas: Arenas, start: Start) -> None:
    world = start(arenas(3)).ready()
    sealed = world.publish(0, SIZE)
    assert sealed.checksum == checksum(world.arenas[0].payload(OWN, 0)[:SIZE])
    orders = [world.pull(1, 0), world.pull(2, 0)]
    for rank, order in zip((1, 2), orders, strict=True):
        reply = world.pulled(rank, order)
        assert reply["ok"] and reply["reason"] == ""
        assert holds(world.arenas[rank], sealed)


def test_a_seal_needs_a_written_half_that_stays_as_it_is(arenas: Arenas, start: Start) -> None:
    world = start(arenas(1, 256 * MIB)).ready()
    world.send(0, "seal", half=1)
    assert world.wait(0, "seal_failed", half=1)["reason"] == "the half is FREE"
    written = Record(State.WRITTEN, 0, 7, 1, 256 * MIB)
    world.arenas[0].write_record(OWN, 0, written)
    world.send(0, "seal", half=0)
    world.arenas[0].write_record(OWN, 0, replace(written, state=State.WRITING, step=9))
    assert world.wait(0, "seal_failed", half=0)["reason"] in ("changed meanwhile", "the half is WRITING")
    assert world.arenas[0].record(OWN, 0).state is State.WRITING


def test_a_half_already_sealed_is_reported_again(arenas: Arenas, start: Start) -> None:
    world = start(arenas(1)).ready()
    sealed = world.publish(0, SIZE)
    world.send(0, "seal", half=0)
    assert world.wait(0, "sealed", half=0)["checksum"] == sealed.checksum


def test_a_flipped_byte_at_the_source_is_found(arenas: Arenas, start: Start) -> None:
    world = start(arenas(2)).ready()
    world.publish(0, SIZE)
    world.arenas[0].payload(OWN, 0)[SIZE - 1] ^= 1
    reply = world.pulled(1, world.pull(1, 0))
    assert not reply["ok"] and reply["reason"] == "checksum"
    assert world.arenas[1].record(1, 0) == Record()


def test_a_partner_killed_in_mid_pull_costs_only_that_pull(arenas: Arenas, start: Start) -> None:
    world = start(arenas(3)).ready()
    world.publish(0, SIZE)
    sealed = world.publish(2, SIZE)
    os.kill(world.pids[0], signal.SIGSTOP)  # so that the read is certainly outstanding
    order = world.pull(1, 0)
    until(lambda: world.arenas[1].record(1, 0).state is State.WRITING)
    world.kill(0)
    world.send(1, "gone", targets=[0])
    assert world.pulled(1, order)["reason"] == "gone"
    assert world.arenas[1].record(1, 0) == Record()
    assert world.pulled(1, world.pull(1, 0))["reason"] == "gone"
    assert world.pulled(1, world.pull(1, 2))["ok"]
    assert holds(world.arenas[1], sealed)


@pytest.mark.parametrize("told", [True, False], ids=["gone", "deadline"])
def test_an_abandoned_read_that_completes_later_changes_nothing(
    arenas: Arenas, start: Start, told: bool
) -> None:
    world = start(arenas(3)).ready()
    world.publish(0, SIZE)
    sealed = world.publish(2, SIZE)
    assert world.pulled(1, world.pull(1, 0))["ok"]  # connected: the request of the next pull gets through
    os.kill(world.pids[0], signal.SIGSTOP)
    order = world.pull(1, 0, deadline_s=20.0 if told else 0.2)
    until(lambda: world.arenas[1].record(1, 0).state is State.WRITING)
    if told:
        world.send(1, "gone", targets=[0])
    assert world.pulled(1, order)["reason"] == ("gone" if told else "deadline")
    assert world.pulled(1, world.pull(1, 2))["ok"]
    os.kill(world.pids[0], signal.SIGCONT)
    late = world.pull(2, 0)  # served by the same host, after what it still owed to rank 1
    assert world.pulled(2, late)["ok"]
    assert world.pulled(1, world.pull(1, 2, half=0))["ok"]
    assert holds(world.arenas[1], sealed)


def test_two_worlds_side_by_side(arenas: Arenas, start: Start) -> None:
    first, second = start(arenas(2), 1), start(arenas(2), 2)
    for world in (first.ready(), second.ready()):
        world.publish(0, SIZE, step=world.number)
    first.launcher.kill()
    sealed = second.arenas[0].record(OWN, 0)
    assert second.pulled(1, second.pull(1, 0))["ok"]
    assert holds(second.arenas[1], sealed)


def test_a_fresh_world_over_the_same_arenas(arenas: Arenas, start: Start) -> None:
    first = start(arenas(3), 1).ready()
    sealed = first.publish(0, SIZE)
    assert first.pulled(1, first.pull(1, 0))["ok"]
    for rank in range(3):
        first.kill(rank)
    second = start(first.arenas, 2).ready()
    assert holds(second.arenas[1], sealed)
    assert second.pulled(2, second.pull(2, 0))["ok"]
    assert holds(second.arenas[2], sealed)


def test_a_host_leaves_with_its_agent_and_on_request(arenas: Arenas, start: Start) -> None:
    world = start(arenas(3)).ready()
    world.channels[0].close()
    world.send(1, "quit")
    until(lambda: not alive(world.pids[0]) and not alive(world.pids[1]))
    world.publish(2, SIZE)
    assert world.launcher.poll() is None and all(map(alive, world.shields))


@pytest.mark.parametrize("victim", ["mpiexec", "proxy"])
def test_nothing_outlives_the_launcher(arenas: Arenas, start: Start, victim: str) -> None:
    world = start(arenas(3)).ready()
    world.kill(1)
    proxy = int(Path(f"/proc/{world.shields[0]}/stat").read_text().split()[3])
    assert proxy != world.launcher.pid
    os.kill(world.launcher.pid if victim == "mpiexec" else proxy, signal.SIGKILL)
    until(lambda: not any(map(alive, [proxy, *world.pids, *world.shields])))


def test_a_launcher_killed_during_the_start_leaves_no_process(arenas: Arenas, start: Start) -> None:
    world = start(arenas(3))  # said hello, but not yet ready
    world.close()
