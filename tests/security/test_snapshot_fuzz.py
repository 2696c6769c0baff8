"""A snapshot's index: whatever it says is refused in one line, or places every tensor inside the payload."""

import json
import struct
from math import prod
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemini_hpc.arena import INDEX_BYTES, SnapshotIndex, layout
from gemini_hpc.errors import GeminiError

FUZZ = settings(max_examples=150, deadline=None, derandomize=True)
ITEM_BYTES = {"float32": 4, "float64": 8, "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1}
SIZE = INDEX_BYTES + 4096
NUMBERS = st.integers(-5, 2000) | st.floats() | st.booleans() | st.none() | st.sampled_from(["4", [4], {"a": 4}])


def good() -> dict[str, Any]:
    specs, nbytes = layout([("a", "float32", (10, 2)), ("b", "bool", ()), ("c", "int64", (0, 3))])
    tensors = [{**spec._asdict(), "shape": list(spec.shape)} for spec in specs]
    return {"format": 1, "rank": 1, "step": 40, "world_size": 4, "nbytes": nbytes, "state": {}, "tensors": tensors}


def payload_of(value: Any, size: int = SIZE) -> memoryview:
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return memoryview(bytearray((struct.pack("<Q", len(text)) + text).ljust(INDEX_BYTES).ljust(size, b"\0")))


def read(payload: memoryview) -> SnapshotIndex | None:
    """Read it and use it as capture and persist do; None when it is refused."""
    try:
        index = SnapshotIndex.read(payload)
    except GeminiError as error:
        assert "\n" not in str(error)
        return None
    assert INDEX_BYTES <= index.nbytes <= len(payload)
    assert 0 <= index.rank < index.world_size and index.step >= 0
    end = INDEX_BYTES
    for tensor in index.tensors:
        assert type(tensor.name) is str and type(tensor.offset) is int
        assert end <= tensor.offset <= tensor.offset + tensor.nbytes <= index.nbytes
        assert len(payload[tensor.offset : tensor.offset + tensor.nbytes]) == tensor.nbytes
        assert all(type(size) is int and size >= 0 for size in tensor.shape)
        assert tensor.nbytes == prod(tensor.shape) * ITEM_BYTES[tensor.dtype]
        end = tensor.offset + tensor.nbytes
    return index


def test_the_good_one_is_read() -> None:
    assert read(payload_of(good())) is not None


@FUZZ
@given(shape=st.lists(NUMBERS, max_size=4), dtype=st.sampled_from(sorted(ITEM_BYTES)), data=st.data())
def test_sizes_that_agree_with_one_another(shape: list[Any], dtype: str, data: Any) -> None:
    """Fractions and negative numbers multiply to the right size as well."""
    raw = good()
    tensor = raw["tensors"][0] | {"shape": shape, "dtype": dtype}
    try:
        agreed = prod(shape) * ITEM_BYTES[dtype]
    except TypeError:
        agreed = 80
    tensor["nbytes"] = data.draw(st.just(agreed) | NUMBERS)
    tensor["offset"] = data.draw(st.just(tensor["offset"]) | NUMBERS | st.floats(INDEX_BYTES, SIZE))
    raw["tensors"] = data.draw(st.sampled_from([[tensor], [tensor, *raw["tensors"][1:]], [tensor] * 3]))
    read(payload_of(raw))


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [2.0, 10]},
        {"shape": [True, 20]},
        {"shape": [-4, -5]},
        {"shape": [-20], "nbytes": -80},
        {"offset": float(INDEX_BYTES)},
        {"offset": INDEX_BYTES - 64},
        {"dtype": ["float32"]},
        {"dtype": "object", "nbytes": 160},
        {"name": None},
        {"more": 1},
    ],
    ids=str,
)
def test_a_tensor_that_cannot_be(change: dict[str, Any]) -> None:
    raw = good()
    raw["tensors"][0] |= change
    assert read(payload_of(raw)) is None


@pytest.mark.parametrize(
    "change",
    [
        {"nbytes": -1, "tensors": []},
        {"nbytes": 0, "tensors": []},
        {"nbytes": INDEX_BYTES - 1, "tensors": []},
        {"nbytes": SIZE + 1},
        {"rank": 4},
        {"rank": -1},
        {"world_size": 0, "rank": 0},
        {"step": -1},
        {"format": 2},
        {"state": None},
        {"more": 1},
    ],
    ids=str,
)
def test_an_index_that_cannot_be(change: dict[str, Any]) -> None:
    assert read(payload_of({**good(), **change})) is None


def test_tensors_that_lie_upon_one_another() -> None:
    raw = good()
    raw["tensors"][1]["offset"] = raw["tensors"][0]["offset"]
    assert read(payload_of(raw)) is None


@FUZZ
@given(st.integers(0, 2**64 - 1) | st.integers(0, 70_000), st.integers(0, SIZE))
def test_any_length_in_any_payload(length: int, size: int) -> None:
    payload = payload_of(good())
    struct.pack_into("<Q", payload, 0, length)
    read(payload[:size])


BOMBS = {
    "lists": b"[" * 60_000,
    "closed lists": b"[" * 30_000 + b"]" * 30_000,
    "objects": b'{"a":' * 12_000,
    "one long number": b"9" * 60_000,
    "a product of long numbers": b'{"format":1,"tensors":[{"shape":[' + b"9," * 29_000 + b"9]}]}",
    "many small lists": b'{"format":1,"tensors":[' + b"[]," * 19_000 + b"[]]}",
    "NaN": b'{"format":NaN}',
    "the same key": b"{" + b'"format":1,' * 5000 + b'"format":1}',
}


@pytest.mark.parametrize("what", BOMBS)
def test_bombs(what: str) -> None:
    assert read(payload_of(BOMBS[what])) is None


@FUZZ
@given(st.data())
def test_changed_text(data: Any) -> None:
    text = bytearray(json.dumps(good()).encode())
    for _ in range(data.draw(st.integers(1, 5))):
        place = data.draw(st.integers(0, len(text) - 1))
        piece = data.draw(st.sampled_from([b"", b"-", b".", b"0", b"1", b"e9", b"null", b'"', b"[", b"}", b"\xff"]))
        text[place : place + data.draw(st.integers(0, 3))] = piece
    read(payload_of(bytes(text)))
