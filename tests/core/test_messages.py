"""The wire form: what we write is read back exactly, and nothing else is ever accepted."""

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemini_hpc.core import messages
from gemini_hpc.core.codec import MAX_MESSAGE_BYTES, Message, MessageError, decode

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
NUMBER = st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | NUMBER | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
VALUES = {
    str: TEXT,
    int: st.integers(-(2**63), 2**64 - 1),
    float: NUMBER,
    bool: st.booleans(),
    Mapping[str, Any]: st.dictionaries(TEXT, JSON, max_size=3),
    tuple[str, ...]: st.lists(TEXT, max_size=3).map(tuple),
    tuple[int, ...]: st.lists(st.integers(0, 99), max_size=3).map(tuple),
    tuple[float, ...]: st.lists(NUMBER, max_size=3).map(tuple),
    tuple[tuple[float, ...], ...]: st.lists(st.lists(NUMBER, max_size=3).map(tuple), max_size=3).map(tuple),
    tuple[tuple[int, ...], ...]: st.lists(st.lists(st.integers(0, 99), max_size=3).map(tuple), max_size=3).map(tuple),
}
KINDS = sorted(
    {cls for cls in vars(messages).values() if isinstance(cls, type) and issubclass(cls, Message)}
    - {Message, messages.Event, messages.Command},
    key=lambda cls: cls.__name__,
)


def instances(kind: type[Message]) -> st.SearchStrategy[Message]:
    return st.builds(kind, **{name: VALUES[hint] for name, hint in get_type_hints(kind).items()})


ANY_MESSAGE = st.one_of([instances(kind) for kind in KINDS])


def refused_or_ours(raw: bytes) -> None:
    """Decode; a MessageError is fine, any other exception is not, and what comes out is exactly typed."""
    try:
        message = decode(raw)
    except MessageError:
        return
    for field in fields(message):
        well_typed(get_type_hints(type(message))[field.name], getattr(message, field.name))
    assert decode(message.encode()) == message


def well_typed(hint: Any, value: Any) -> None:
    if hint == Mapping[str, Any]:
        assert type(value) is dict
    elif getattr(hint, "__origin__", None) is tuple:
        assert type(value) is tuple
        for item in value:
            well_typed(hint.__args__[0], item)
    else:
        assert type(value) is hint


def good() -> dict[str, Any]:
    return {"kind": "Abort", "node": "node1", "generation": 3}


TIMED = messages.Stepped("node1", 1, 0, 7, 0.5, 3.0, -1.0)


def with_time(number: bytes) -> bytes:
    return TIMED.encode().replace(b"3.0", number)


def raw(**changes: Any) -> bytes:
    return json.dumps({**good(), **changes}).encode()


def test_there_is_a_strategy_for_every_message() -> None:
    assert len(KINDS) > 30
    assert all(hint in VALUES for kind in KINDS for hint in get_type_hints(kind).values())


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_round_trip_of_every_message(kind: type[Message]) -> None:
    @settings(max_examples=10, deadline=None, derandomize=True)
    @given(instances(kind))
    def check(message: Message) -> None:
        copy = decode(message.encode())
        assert copy == message
        assert type(copy) is kind
        refused_or_ours(message.encode())

    check()


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.binary(max_size=200))
def test_random_bytes_are_refused(noise: bytes) -> None:
    refused_or_ours(noise)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(JSON)
def test_random_json_is_refused(value: Any) -> None:
    refused_or_ours(json.dumps(value).encode())


@settings(max_examples=400, deadline=None, derandomize=True)
@given(ANY_MESSAGE, st.data())
def test_a_changed_field_is_refused_or_well_typed(message: Message, data: st.DataObject) -> None:
    values = json.loads(message.encode())
    name = data.draw(st.sampled_from([*values, "extra"]))
    values[name] = data.draw(JSON)
    refused_or_ours(json.dumps(values).encode())


@settings(max_examples=200, deadline=None, derandomize=True)
@given(ANY_MESSAGE, st.data())
def test_flipped_and_cut_bytes(message: Message, data: st.DataObject) -> None:
    wire = bytearray(message.encode())
    at = data.draw(st.integers(0, len(wire) - 1))
    refused_or_ours(bytes(wire[:at]))
    wire[at] ^= 1 << data.draw(st.integers(0, 7))
    refused_or_ours(bytes(wire))


@pytest.mark.parametrize(
    "wire",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"7",
        b'"Abort"',
        b'["kind"]',
        b"\xff\xfe\x00",
        b"{" * 50_000,
        b"[" * 50_000,
        b'{"kind":[]}',
        b'{"kind":{}}',
        b'{"kind":null}',
        b'{"kind":"Message","node":"a"}',
        b'{"kind":"abort","node":"a","generation":1}',
        b'{"kind":"__class__"}',
        raw(kind="Nonsense"),
        raw(extra=1),
        json.dumps({"kind": "Abort", "node": "a"}).encode(),
        raw(generation="3"),
        raw(generation=3.0),
        raw(generation=True),
        raw(generation=None),
        raw(generation=[3]),
        raw(node=1),
        raw(node=None),
        raw(node=["node1"]),
    ],
)
def test_malformed_messages_are_refused(wire: bytes) -> None:
    with pytest.raises(MessageError):
        decode(wire)


def test_what_is_too_long_is_refused_unread() -> None:
    with pytest.raises(MessageError, match="at most"):
        decode(b" " * MAX_MESSAGE_BYTES + raw())
    assert decode(b" " * (MAX_MESSAGE_BYTES - len(raw())) + raw()) == messages.Abort("node1", 3)


def test_whole_numbers_are_accepted_where_a_float_is_due() -> None:
    message = decode(with_time(b"3"))
    assert message == TIMED
    assert type(message.step_s) is float


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_time_that_is_no_number_is_refused(word: str) -> None:
    with pytest.raises(MessageError):
        decode(with_time(word.encode()))


def test_a_whole_number_beyond_all_floats_is_refused() -> None:
    with pytest.raises(MessageError):
        decode(with_time(b"1" + b"0" * 400))


@pytest.mark.parametrize("targets", [["x"], [None], [1.5], [True], [[1]], [{}]])
def test_wrong_items_of_a_list_are_refused(targets: list[Any]) -> None:
    with pytest.raises(MessageError):
        decode(json.dumps({"kind": "Gone", "node": "a", "world": 1, "targets": targets}).encode())


def test_wrong_names_in_a_list_are_refused() -> None:
    with pytest.raises(MessageError):
        decode(b'{"kind":"StartWorld","node":"","world":1,"members":["a",2]}')


@pytest.mark.parametrize("held", [[1], [["x"]], [[1.5]], [[True]], [[[1]]], "x", [{}]])
def test_wrong_items_of_an_inventory_are_refused(held: Any) -> None:
    good = messages.Inventory("a", 1, "idle", "", 1, 0, 0, "s", 9, 1, ("a",), True, 7, ((0, 1, 2, 3, 4, 5, 6),))
    assert decode(good.encode()) == good
    with pytest.raises(MessageError):
        decode(json.dumps({**json.loads(good.encode()), "held": held}).encode())


@pytest.mark.parametrize("kind", ["Event", "Command"])
def test_the_bases_are_no_messages(kind: str) -> None:
    with pytest.raises(MessageError):
        decode(json.dumps({"kind": kind, "node": "a"}).encode())


def test_a_loss_that_is_no_number_is_still_told() -> None:
    """Training may diverge. A worker whose steps cannot be told would be taken for a broken one."""
    message = messages.Stepped("node1", 1, 0, 7, float("nan"), 0.1, 0.0)
    copy = decode(message.encode())
    assert (copy.step, copy.step_s) == (7, 0.1)


@pytest.mark.parametrize("wrong", [2**64, -(2**63) - 1, 10**400], ids=["2**64", "-2**63-1", "10**400"])
def test_numbers_that_no_record_can_hold_are_refused(wrong: int) -> None:
    with pytest.raises(MessageError, match="64 bits"):
        decode(json.dumps({"kind": "Written", "node": "n0", "half": wrong}).encode())


@pytest.mark.parametrize("text", ["a\0b", "\udc80"])
def test_text_that_cannot_be_written_out(text: str) -> None:
    """As a name it is refused; as the reason of an error, which may quote any file's name, it arrives readable."""
    with pytest.raises(MessageError, match="no text"):
        decode(json.dumps({"kind": "WorkerLost", "node": text, "reason": "", "final": False}).encode())
    message = decode(messages.WorkerLost("n0", f"no file {text}", False).encode())
    assert isinstance(message, messages.WorkerLost)
    assert message.reason == repr(f"no file {text}")
