"""The parser of messages: any bytes are refused, or are a message that encodes back to itself; at a bounded cost."""

import json
import tracemalloc
from dataclasses import fields
from typing import Any, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemini_hpc.core import messages
from gemini_hpc.core.codec import MAX_MESSAGE_BYTES, Message, MessageError, decode
from gemini_hpc.core.coordinator import step
from gemini_hpc.core.learn import OF_AGENTS
from gemini_hpc.core.messages import Note, Stepped
from gemini_hpc.core.state import Cluster, Phase, new_cluster
from gemini_hpc.core.view import describe
from tests.scenarios.simulation import rules
from tests.scenarios.test_recoveries import started

FUZZ = settings(max_examples=300, deadline=None, derandomize=True)
BOUND_BYTES = 96 * MAX_MESSAGE_BYTES
"""An empty list is 3 bytes of JSON and 64 of memory: no parser of JSON into objects is cheaper."""

SAMPLES = [
    messages.Heartbeat("node1", 1.5),
    Stepped("node1", 1, 0, 7, 0.5, 3.0, -1.0),
    messages.StartWorld("", 1, ("node0", "node1")),
    messages.Gone("node1", 1, (1, 2)),
    messages.Publish("node1", 3, 40, {"0": ["rank-0000.h5", 100, 2**64 - 1]}),
    messages.Pull("node1", 3, 3, 0, 7, "node0", 1, 1, 0, 1, 1, 0, 5000, 2**63, 5.0),
    Note("", "plan", {"moves": [{"rank": 0, "node": "node1", "tier": None}], "x": 1.5}),
    messages.Published("node1", 40, "checkpoints/step-00000040", True, ""),
]


def outcome(raw: bytes) -> Message | None:
    """Decode; what is accepted is written and read again without a difference (bytes, since NaN is not itself)."""
    try:
        message = decode(raw)
    except MessageError:
        return None
    again = message.encode()
    assert decode(again).encode() == again
    assert type(decode(again)) is type(message)
    return message


@pytest.mark.parametrize("message", SAMPLES, ids=lambda message: type(message).__name__)
def test_the_samples_are_messages(message: Message) -> None:
    assert outcome(message.encode()) == message


@FUZZ
@given(st.binary(max_size=300))
def test_any_bytes(raw: bytes) -> None:
    outcome(raw)


PIECES = [b"", b"-", b"0", b"1e999", b"NaN", b"-Infinity", b"null", b"true", b'"', b"[", b"]", b"{", b"}", b",", b":"]
PIECES += [b"\\", b"\\ud800", b"\\u0000", b"\xff", b"\xc3", b"9" * 4299, b"9" * 5000, b'"kind":"Abort",', b'"node":1,']


@FUZZ
@given(st.sampled_from(SAMPLES), st.data())
def test_changed_messages(message: Message, data: Any) -> None:
    raw = bytearray(message.encode())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(raw)))
        raw[place : place + data.draw(st.integers(0, 4))] = data.draw(st.sampled_from(PIECES))
    outcome(bytes(raw))


@FUZZ
@given(st.sampled_from(SAMPLES), st.sampled_from(SAMPLES), st.data())
def test_the_head_of_one_and_the_tail_of_another(one: Message, other: Message, data: Any) -> None:
    head, tail = one.encode(), other.encode()
    outcome(head[: data.draw(st.integers(0, len(head)))] + tail[data.draw(st.integers(0, len(tail))) :])


@FUZZ
@given(st.sampled_from(SAMPLES), st.sampled_from(["utf-16", "utf-16-le", "utf-32-be", "utf-8-sig", "latin-1"]))
def test_other_encodings(message: Message, encoding: str) -> None:
    """json guesses among the encodings of Unicode: then it is the same message, or none."""
    assert outcome(message.encode().decode().encode(encoding)) in (message, None)


def note(details: str) -> bytes:
    return f'{{"kind":"Note","node":"","event":"x","details":{details}}}'.encode()


def filled(before: str, piece: str, after: str) -> bytes:
    """As long as a message may be."""
    room = MAX_MESSAGE_BYTES - len(note(before + after))
    return note(before + piece * (room // len(piece)) + after)


BOMBS = {
    "nested lists": filled('{"a":', "[", "}"),
    "nested and closed": note('{"a":' + "[" * 100_000 + "]" * 100_000 + "}"),
    "nested objects": filled("", '{"a":', "}"),
    "empty lists": filled('{"a":[', "[],", "[]]}"),
    "empty objects": filled('{"a":[', "{},", "{}]}"),
    "small numbers": filled('{"a":[', "300,", "0]}"),
    "fractions": filled('{"a":[', "1.5,", "0]}"),
    "long numbers": filled('{"a":[', "9" * 4000 + ",", "0]}"),
    "one number": filled('{"a":', "9", "}"),
    "a long exponent": filled('{"a":1e', "9", "}"),
    "short texts": filled('{"a":[', '"ab",', "0]}"),
    "one text": filled('{"a":"', "x", '"}'),
    "the same key": filled("{", '"a":0,', '"b":0}'),
    "keys": note("{" + ",".join(f'"{n:x}":0' for n in range(90_000)) + "}"),
    "spaces": filled("{", " ", "}"),
    "backslashes": filled('{"a":"', "\\\\", '"}'),
}


@pytest.mark.parametrize("what", BOMBS)
def test_bombs_cost_a_bounded_amount_of_memory(what: str) -> None:
    assert len(BOMBS[what]) <= MAX_MESSAGE_BYTES
    tracemalloc.start()
    try:
        outcome(BOMBS[what])
        assert tracemalloc.get_traced_memory()[1] < BOUND_BYTES
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "word", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 400, '"3"', "true", "null", "[]"]
)
def test_what_is_no_number_is_refused_where_a_time_is_due(word: str) -> None:
    assert outcome(SAMPLES[1].encode().replace(b"3.0", word.encode())) is None


@pytest.mark.parametrize("word", ["3.0", "1e3", "NaN", "true", "null", '"3"', "[3]", "{}"])
def test_what_is_no_whole_number_is_refused_where_one_is_due(word: str) -> None:
    raw = json.dumps({"kind": "Abort", "node": "a", "generation": 0}).replace(": 0", f": {word}")
    assert outcome(raw.encode()) is None


# --- what somebody who has the keys may say, to the decision core ----------------------------------------


def _moments() -> dict[str, tuple[Cluster, float]]:
    """Coordinators in the middle of things."""
    found = {"new": (new_cluster(rules(), 0.0), 0.1)}
    sim = started()
    found["running"] = (sim.cluster, sim.now)
    sim.kill_node("n1")
    for phase in (Phase.GATHERING, Phase.JOINING):
        sim.run(lambda c, phase=phase: c.cluster.phase is phase)
        found[phase.value] = (sim.cluster, sim.now)
    sim = started(persist_every=1000)
    sim.suspend()
    sim.run(lambda c: c.cluster.phase is Phase.SAVING)
    found["saving"] = (sim.cluster, sim.now)
    return found


MOMENTS = _moments()
NUMBERS = st.sampled_from([-(2**63), -1, 0, 1, 2, 3, 4, 7, 30, 99, 2**63 - 1])
WORDS = st.sampled_from(
    ["", "n0", "n1", "n4", "host", "archiver", "lost", "busy", "idle", "checksum", "deadline", "gone"]
)
OF_TYPE = {
    int: NUMBERS,
    float: st.sampled_from([-1.0, 0.0, 1.0, 1e308]),
    bool: st.booleans(),
    str: WORDS,
    tuple[str, ...]: st.lists(WORDS, max_size=5).map(tuple),
    tuple[tuple[int, ...], ...]: st.lists(st.lists(NUMBERS, min_size=7, max_size=7).map(tuple), max_size=3).map(tuple),
}


@pytest.mark.parametrize("kind", sorted(OF_AGENTS, key=lambda kind: kind.__name__), ids=lambda kind: kind.__name__)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(moment=st.sampled_from(sorted(MOMENTS)), data=st.data())
def test_any_word_of_an_agent_leaves_the_core_able_to_decide(
    kind: type[messages.Event], moment: str, data: Any
) -> None:
    cluster, now = MOMENTS[moment]
    hints = get_type_hints(kind)
    values = {field.name: data.draw(OF_TYPE[hints[field.name]]) for field in fields(kind)}
    cluster, _ = step(cluster, now, kind(**values))
    for beat in range(1, 5):
        cluster, _ = step(cluster, now + 0.2 * beat, messages.Tick(""))
    describe(cluster, now + 1.0)
