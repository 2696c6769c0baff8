"""What a user can get wrong in a job is answered by one line that says so."""

import pytest

from gemini_hpc import versions
from tests.engine.harness import CallFailed, Clusters, Fork, Undisturbed
from tests.engine.job import Case, fields_of


def test_these_versions_are_the_tested_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    assert versions.mismatch() == ""
    monkeypatch.setitem(versions.TESTED, "deepspeed", "0.0.1")
    assert "instead of 0.0.1" in versions.mismatch()
    monkeypatch.setattr(versions.metadata, "version", lambda name: "9.9.9+cpu")
    assert "torch 9.9.9 instead of" in versions.mismatch()


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("tests.engine.job:build_sgd", "SGD"),
        ("tests.engine.job:build_amsgrad", "amsgrad"),
        ("tests.engine.job:build_tensor_lr", "lr is a Tensor"),
        ("tests.engine.job:build_odd_schedule", "LambdaLR holds a object"),
        ("tests.engine.job:build_stage_2", "stage"),
        ("tests.engine.job:build_nothing", "Training"),
        ("tests.engine.job:WORDS", "WORDS"),  # there, but no function
        ("tests.engine.job:missing", "missing"),
        ("tests.engine.job", "module:function"),
        ("tests.engine.nowhere:build", "nowhere"),
        ("no/such/file.py:build", "no/such/file.py"),
        ("", "module:function"),
    ],
)
def test_an_entry_point_that_is_wrong(entry: str, words: str, fork: Fork) -> None:
    rank = fork()
    with pytest.raises(CallFailed) as caught:
        rank.call("build", case=fields_of(Case()), rank=0, size=2, entry=entry)
    assert caught.value.kind == "UserError", caught.value
    assert words in caught.value.text and "\n" not in caught.value.text
    assert not caught.value.peer


def test_a_config_that_needs_other_groups(fork: Fork) -> None:
    """Hierarchical partitioning splits the ranks into groups that cannot be exchanged."""
    rank = fork()
    with pytest.raises(CallFailed) as caught:
        rank.call("build", case=fields_of(Case(hpz=2)), rank=0, size=4)
    assert caught.value.kind in ("UserError", "GeminiError"), caught.value


def test_a_snapshot_of_another_shape_is_refused_and_changes_nothing(
    cluster: Clusters, undisturbed: Undisturbed
) -> None:
    run = cluster(Case(), size=2, spares=0).start()
    run.train(1, 3)
    other = cluster(Case(groups=2), size=1, spares=0).start()
    for rank in run.ranks:
        payload = rank.arena.payload(0, 0)
        payload[:] = bytes(other.ranks[0].arena.payload(0, 0)[: len(payload)]).ljust(len(payload), b"\0")
        with pytest.raises(CallFailed) as caught:
            rank.call("restore", half=0)
        assert caught.value.kind == "UserError" and not caught.value.peer
    run.train(4, 7)
    assert run.losses() == undisturbed(Case(), 2, 7)
