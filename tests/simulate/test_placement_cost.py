"""The command line that shows what forms of placement protect from."""

import json

import pytest

from gemini_hpc import simulate
from gemini_hpc.errors import UserError


def test_five_nodes_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate.main(["--placement", "5", "--lost", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = {row["placement"]: row for row in found["placements"]}
    chances = {name: row["probability"]["2"] for name, row in rows.items()}
    assert chances == pytest.approx({"mixed": 0.6, "ring": 0.5, "overlap": 0.7, "full_tail": 0.9})
    assert rows["overlap"]["bound"]["3"] == pytest.approx(0.1) != rows["overlap"]["probability"]["3"]
    costs = {name: (row["snapshots_held"], row["read_per_step"], row["sent_per_step"]) for name, row in rows.items()}
    assert costs == {"mixed": (2, 1, 1), "ring": (2, 1, 1), "overlap": (3, 2, 1), "full_tail": (3, 2, 2)}
    assert found["upper_bound"] == pytest.approx(chances["overlap"])


def test_the_table_calls_nothing_certain_that_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate.main(["--placement", "16384", "--replicas", "3", "--lost", "4"]) == 0
    (row,) = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("mixed")]
    assert row[1:5] == ["100.00", "100.00", ">99.99", ">99.99"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--placement", "0"], "between 1 and"),
        (["--placement", "3", "--replicas", "4"], "each copy needs its own of the 3 nodes"),
        (["--placement", "3", "--replicas", "0"], "--replicas 0"),
        (["--placement", "9", "--lost", "10"], "between 1 and 9"),
        ([], "--placement"),
    ],
)
def test_what_cannot_be_is_refused(arguments: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        simulate.main(arguments)
