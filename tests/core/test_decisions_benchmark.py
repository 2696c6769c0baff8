"""The benchmark of the coordinator's decisions still speaks its language: it is run by hand, and seldom."""

from benchmarks.decisions import measure


def test_it_measures_every_kind_of_decision() -> None:
    found = measure(20)
    assert found["nodes"] == 20 and found["loss_ms"] > 0
    assert all(ms > 0 for ms in found["routine_ms"].values())
