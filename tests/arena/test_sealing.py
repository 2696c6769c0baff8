"""What no window host seals, the agent does."""

from pathlib import Path

from gemini_hpc.arena import OWN, Arena, Geometry, Record, State, checksum
from gemini_hpc.runtime.sealing import Sealer
from tests.cluster.runs import EVENT_S, until


def test_what_waits_for_too_long_is_sealed_and_nothing_else(tmp_path: Path) -> None:
    arena = Arena.create(tmp_path / "arena", Geometry(1, 1000), "run")
    arena.payload(OWN, 0)[:3] = b"abc"
    written = Record(State.WRITTEN, 2, 7, 5, 3)
    arena.write_record(OWN, 0, written)
    arena.write_record(OWN, 1, Record(State.WRITING, 2, 8, 5))
    sealer = Sealer()
    assert list(sealer.look(arena, 100.0, 10.0)) == []
    assert list(sealer.look(arena, 109.0, 10.0)) == [] and arena.record(OWN, 0) == written
    found = until(lambda: list(sealer.look(arena, 111.0, 10.0)), "a seal", EVENT_S)
    sealed = written._replace(state=State.SEALED, checksum=checksum(arena.payload(OWN, 0)[:3]))
    assert found == [(sealed, 0)] and arena.record(OWN, 0) == sealed
    assert arena.record(OWN, 1).state is State.WRITING
