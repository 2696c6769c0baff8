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
        for _ in range(nodes):
            path = Path(f"/dev/shm/gemini-test-{os.getpid()}-{len(made)}")
            made.append(Arena.create(path, Geometry(2, snapshot_bytes), "test"))
        return made[-nodes:]

    yield make
    for arena in made:
        arena.path.unlink()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., World]]:
    """Start worlds, in a directory with a space; after the test nothing of them may be left."""
    place = tmp_path / "a place"
    place.mkdir()
    worlds: list[World] = []

    def start_world(arenas: list[Arena], number: int = 1) -> World:
        worlds.append(World(place, arenas, number))
        return worlds[-1]

    yield start_world
    for world in worlds:
        world.close()
        assert not world.files()
