"""The proof of identical losses sees one bit, in a replayed step too."""

import json
import math
from pathlib import Path

import pytest

from gemini_hpc.analysis.compare import compare, read_reference
from gemini_hpc.errors import GeminiError
from tests.analysis.synthetic import Loss, build, reference_of, write_run

EVENTS = build(20, [Loss(10, rank=1, replayed=2)])


def test_all_equal_counting_replayed_steps() -> None:
    proof = compare(EVENTS, reference_of(20))
    assert proof.identical
    assert (proof.compared, proof.equal) == (4 * 20 + 2 * 4, 88)
    assert (proof.first_difference, proof.missing, proof.unknown) == (None, (), ())
    assert str(proof) == "all 88 losses equal those of the undisturbed run to the last bit"


@pytest.mark.parametrize("instance", [0, 1])
def test_one_bit_of_one_instance_is_found(instance: int) -> None:
    events = [dict(event) for event in EVENTS]
    changed = [e for e in events if e["kind"] == "step" and (e["rank"], e["step"]) == (3, 9)][instance]
    good = changed["loss"]
    changed["loss"] = math.nextafter(good, math.inf)
    proof = compare(events, reference_of(20))
    assert not proof.identical and (proof.compared, proof.equal) == (88, 87)
    first = proof.first_difference
    assert first is not None and (first.rank, first.step, first.reference) == (3, 9, good)
    assert repr(changed["loss"]) in str(proof) and repr(good) in str(proof) and "rank 3, step 9" in str(proof)


def test_the_first_difference_is_the_one_at_the_lowest_step() -> None:
    events = [{**e, "loss": e["loss"] + (e["step"] >= 7)} if e["kind"] == "step" else e for e in EVENTS]
    first = compare(events, reference_of(20)).first_difference
    assert first is not None and (first.step, first.rank) == (7, 0)


def test_zeros_of_two_signs_differ_and_nan_equals_itself() -> None:
    line = {"rank": 0, "step": 1}
    assert not compare([line | {"loss": 0.0}], [line | {"loss": -0.0}]).identical
    assert compare([line | {"loss": math.nan}], [line | {"loss": math.nan}]).identical
    assert "0x8000000000000000" in str(compare([line | {"loss": 0.0}], [line | {"loss": -0.0}]))


def test_what_one_side_lacks_is_told() -> None:
    lost = [e for e in EVENTS if not (e["kind"] == "step" and (e["rank"], e["step"]) == (2, 5))]
    proof = compare(lost, reference_of(21))
    assert proof.identical and proof.missing == ((0, 21), (1, 21), (2, 5), (2, 21), (3, 21))
    assert str(proof).endswith("; 5 not logged")
    proof = compare(EVENTS, reference_of(19))
    assert proof.unknown == tuple((rank, 20) for rank in range(4))
    assert str(proof).endswith("; 4 not in the reference")


def test_a_restored_snapshot_tells_the_loss_of_its_step() -> None:
    done = next(e for e in EVENTS if e["kind"] == "step" and (e["rank"], e["step"]) == (2, 5))
    lost = [e for e in EVENTS if e is not done]
    restored = {"kind": "resumed", "rank": 2, "step": 5, "generation": 2, "loss": done["loss"]}
    assert compare(lost, reference_of(20)).missing == ((2, 5),)
    assert compare([*lost, restored], reference_of(20)).missing == ()
    assert not compare([*lost, restored | {"loss": 0.5}], reference_of(20)).identical
    assert compare([*EVENTS, restored | {"step": 0, "loss": None}], reference_of(20)).unknown == ()


def test_nothing_to_compare_proves_nothing() -> None:
    assert not compare([], reference_of(3)).identical
    assert not compare(EVENTS, []).identical
    assert "no losses" in str(compare(EVENTS, []))


def test_losses_survive_the_files(tmp_path: Path) -> None:
    write_run(tmp_path, steps=20)
    assert read_reference(tmp_path) == reference_of(20)
    assert read_reference(tmp_path / "absent") == []


def test_a_reference_that_is_being_made_can_be_read(tmp_path: Path) -> None:
    write_run(tmp_path, steps=20)
    path = tmp_path / "reference" / "losses.jsonl"
    path.write_text(path.read_text()[:-5])
    assert read_reference(tmp_path) == reference_of(20)[:-1]


def test_a_damaged_reference_is_named(tmp_path: Path) -> None:
    path = tmp_path / "reference" / "losses.jsonl"
    path.parent.mkdir()
    path.write_text(json.dumps(reference_of(1)[0]) + '\n{"rank": 1, "st\n')
    with pytest.raises(GeminiError, match=r"losses\.jsonl.*line 2"):
        read_reference(tmp_path)
