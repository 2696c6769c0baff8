"""Pulls between real window hosts, and what is left of them when ranks are killed."""

import os
import signal
from collections.abc import Callable

import pytest

from gemini_hpc.arena import OWN, Arena, Record, State, checksum
from gemini_hpc.windows import mpi_leftovers
from tests.windows.worlds import MIB, World, alive, parent, until

pytestmark = pytest.mark.cluster

SIZE = 20 * MIB  # more than one read
Arenas = Callable[..., list[Arena]]
Start = Callable[..., World]


def test_a_sealed_snapshot_is_pulled_and_verified(arenas: Arenas, start: Start) -> None:
    world = start(arenas(3)).ready()
    sealed = world.publish(0, SIZE)
    assert sealed.checksum == checksum(world.arenas[0].payload(OWN, 0)[:SIZE])
    for rank in (1, 2):
        world.pull(rank, 0)
    for rank in (1, 2):
        reply = world.pulled(rank)
        assert reply["ok"] and reply["reason"] == ""
        assert world.holds(rank, sealed)


def test_a_seal_needs_a_written_half_that_stays_as_it_is(arenas: Arenas, start: Start) -> None:
    world = start(arenas(1)).ready()
    world.send(0, "Written", half=1)  # the half is FREE
    written = Record(State.WRITTEN, 0, 7, 1, SIZE)
    world.arenas[0].write_record(OWN, 0, written)
    world.send(0, "Written", half=0)
    world.arenas[0].write_record(OWN, 0, written._replace(state=State.WRITING, step=9))
    world.arenas[0].write_record(OWN, 1, written)
    world.send(0, "Written", half=1)
    assert world.wait(0, "Sealed")["half"] == 1  # the first that is sealed at all
    assert world.arenas[0].record(OWN, 0).state is State.WRITING


def test_a_half_already_sealed_is_reported_again(arenas: Arenas, start: Start) -> None:
    world = start(arenas(1)).ready()
    sealed = world.publish(0, SIZE)
    world.send(0, "Written", half=0)
    assert world.wait(0, "Sealed", half=0)["checksum"] == sealed.checksum


def test_a_flipped_byte_at_the_source_is_found(arenas: Arenas, start: Start) -> None:
    world = start(arenas(2)).ready()
    world.publish(0, SIZE)
    world.arenas[0].payload(OWN, 0)[SIZE - 1] ^= 1
    reply = world.pull_now(1, 0)
    assert not reply["ok"] and reply["reason"] == "checksum"
    assert world.arenas[1].record(1, 0) == Record()


def test_a_pull_that_is_ordered_twice_does_not_touch_what_it_brought(arenas: Arenas, start: Start) -> None:
    world = start(arenas(2)).ready()
    sealed = world.publish(0, SIZE)
    assert world.pull_now(1, 0)["ok"]
    world.stop(0)  # nothing can be read any more
    assert world.pull_now(1, 0)["ok"]
    assert world.holds(1, sealed)


def test_a_damaged_half_is_pulled_anew(arenas: Arenas, start: Start) -> None:
    world = start(arenas(2)).ready()
    sealed = world.publish(0, SIZE)
    assert world.pull_now(1, 0)["ok"]
    world.arenas[1].payload(1, 0)[SIZE - 1] ^= 1
    assert world.pull_now(1, 0)["ok"]
    assert world.holds(1, sealed)


def test_a_partner_killed_in_mid_pull_costs_only_that_pull(arenas: Arenas, start: Start) -> None:
    world = start(arenas(3)).ready()
    world.publish(0, SIZE)
    sealed = world.publish(2, SIZE)
    world.stop(0)  # so that the read is certainly outstanding
    world.pull(1, 0)
    until(lambda: world.arenas[1].record(1, 0).state is State.WRITING)
    world.kill(0)
    world.send(1, "Gone", world=world.number, targets=[0])
    assert world.pulled(1)["reason"] == "gone"
    assert world.arenas[1].record(1, 0) == Record()
    assert world.pull_now(1, 0)["reason"] == "gone"
    assert world.pull_now(1, 2)["ok"]
    assert world.holds(1, sealed)


@pytest.mark.parametrize("reason", ["gone", "deadline"])
def test_an_abandoned_read_that_completes_later_changes_nothing(arenas: Arenas, start: Start, reason: str) -> None:
    world = start(arenas(3)).ready()
    world.publish(0, SIZE)
    sealed = world.publish(2, SIZE)
    world.stop(0)
    world.pull(1, 0, deadline_s=0.2 if reason == "deadline" else 20.0)
    until(lambda: world.arenas[1].record(1, 0).state is State.WRITING)
    if reason == "gone":
        world.send(1, "Gone", world=world.number, targets=[0])
    assert world.pulled(1)["reason"] == reason
    assert world.pull_now(1, 2)["ok"]
    world.resume(0)  # it answers the abandoned read first, then the next one
    assert world.pull_now(2, 0)["ok"]
    world.publish(1, MIB)  # the host of rank 1 has been through its loop again
    assert world.holds(1, sealed)


def test_two_worlds_side_by_side(arenas: Arenas, start: Start) -> None:
    first, second = start(arenas(2), 1), start(arenas(2), 2)
    for world in (first.ready(), second.ready()):
        world.publish(0, SIZE, step=world.number)
    first.launcher.kill()
    assert second.pull_now(1, 0)["ok"]
    assert second.holds(1, second.arenas[0].record(OWN, 0))


def test_a_fresh_world_over_the_same_arenas(arenas: Arenas, start: Start) -> None:
    first = start(arenas(3), 1).ready()
    sealed = first.publish(0, SIZE)
    assert first.pull_now(1, 0)["ok"]
    for rank in range(3):
        first.kill(rank)
    second = start(first.arenas, 2).ready()
    assert second.holds(1, sealed)
    assert second.pull_now(2, 0)["ok"]
    assert second.holds(2, sealed)


def test_a_host_leaves_with_its_agent(arenas: Arenas, start: Start) -> None:
    world = start(arenas(3)).ready()
    world.channels[0].close()
    until(lambda: not alive(world.pids[0]))
    world.publish(2, SIZE)
    assert world.launcher.poll() is None and all(map(alive, world.shields))


@pytest.mark.parametrize("victim", ["mpiexec", "proxy"])
def test_nothing_outlives_the_launcher(arenas: Arenas, start: Start, victim: str) -> None:
    world = start(arenas(3)).ready()
    world.kill(1)
    world.stop(2)
    proxy = parent(world.shields[0])
    assert parent(proxy) == world.launcher.pid
    os.kill(world.launcher.pid if victim == "mpiexec" else proxy, signal.SIGKILL)
    until(lambda: not any(map(alive, [proxy, *world.pids, *world.shields])))


def test_what_a_kill_during_the_start_leaves_is_found(arenas: Arenas, start: Start) -> None:
    world = start(arenas(3))
    until(lambda: world.find_mpich_id(0))
    world.close()
    assert set(world.files()) <= set(mpi_leftovers(age_s=0))
    for path in world.files():
        path.unlink()
