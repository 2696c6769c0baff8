"""Arenas and worlds for the tests of this room."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gemini_hpc.arena import Arena, Geometry
from tests.windows.worlds import MIB, World


@pytest.fixture
def arenas() -> Iterator[Callable[..., list[Arena]]]:
    """Make arenas of two areas in /dev/shm, as agents do; removed afterwards."""
    made: list[Arena] = []

    def make(nodes: int, snapshot_bytes: int = 20 * MIB) -> list[Arena]:
        new = [
            Arena.create(
                Path(f"/dev/shm/gemini-test-{os.getpid()}-{len(made) + i}"),
                Geometry(2, snapshot_bytes),
                "test",
            )
            for i in range(nodes)
        ]
        made.extend(new)
        return new

    yield make
    for arena in made:
        arena.path.unlink()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., World]]:
    """Start worlds, in a directory with a space; after the test nothing of them may be left, in /dev/shm either."""
    before = set(os.listdir("/dev/shm"))
    place = tmp_path / "a place"
    place.mkdir()
    worlds: list[World] = []

    def start_world(arenas: list[Arena], number: int = 1) -> World:
        worlds.append(World(place, arenas, number))
        return worlds[-1]

    yield start_world
    for world in worlds:
        world.close()
    left = {name for name in set(os.listdir("/dev/shm")) - before if not name.startswith("gemini-test")}
    assert not left
