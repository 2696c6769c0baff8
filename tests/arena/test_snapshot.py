"""A snapshot's index: what is written is read, and whatever else is read is refused by name."""

import json
import struct
from math import prod
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemini_hpc.arena import INDEX_BYTES, SnapshotIndex, TensorSpec, checksum, layout
from gemini_hpc.config import capacity
from gemini_hpc.errors import GeminiError

SIZES = {"float32": 4, "float64": 8, "int64": 8, "int32": 4, "uint8": 1, "bool": 1}
SHAPES = [("group0/master", "float32", (1001,)), ("buffer/é", "bool", ()), ("empty", "int64", (0, 3))]

names = st.text(max_size=20)
shapes = st.lists(
    st.tuples(names, st.sampled_from(sorted(SIZES)), st.lists(st.integers(0, 50), max_size=3).map(tuple)), max_size=20
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=15,
)


def example() -> tuple[SnapshotIndex, bytearray]:
    specs, nbytes = layout(SHAPES)
    index = SnapshotIndex(1, 40, 4, nbytes, specs, {"overflow": False, "lr": [0.1, None]})
    payload = bytearray(nbytes)
    index.write(memoryview(payload))
    return index, payload


@given(shapes)
def test_tensors_lie_aligned_and_apart(wanted: list[tuple[str, str, tuple[int, ...]]]) -> None:
    specs, nbytes = layout(wanted)
    end = INDEX_BYTES
    for (name, dtype, shape), spec in zip(wanted, specs, strict=True):
        assert (spec.name, spec.dtype, spec.shape) == (name, dtype, shape)
        assert spec.nbytes == prod(shape) * SIZES[dtype]
        assert spec.offset % 64 == 0 and end <= spec.offset < end + 64
        end = spec.offset + spec.nbytes
    assert end <= nbytes < end + 64


@given(shapes, st.integers(0, 10**6), st.dictionaries(st.text(max_size=8), values, max_size=4))
def test_what_is_written_is_read(wanted: Any, step: int, state: dict[str, Any]) -> None:
    specs, nbytes = layout(wanted)
    index = SnapshotIndex(3, step, 4, nbytes, specs, state)
    payload = bytearray(b"\xff" * nbytes)
    index.write(memoryview(payload))
    assert SnapshotIndex.read(memoryview(payload)) == index
    assert payload[INDEX_BYTES:] == b"\xff" * (nbytes - INDEX_BYTES)


def test_the_same_index_makes_the_same_bytes() -> None:
    """Also over older bytes: the checksum covers all of them."""
    index, payload = example()
    used = bytearray(payload)
    SnapshotIndex(1, 41, 4, index.nbytes, index.tensors, {"long": "x" * 9000}).write(memoryview(used))
    index.write(memoryview(used))
    assert used == payload
    assert checksum(memoryview(used)) == checksum(memoryview(payload))
    used[-1] ^= 1
    assert checksum(memoryview(used)) != checksum(memoryview(payload))


def test_an_index_that_is_too_long_is_an_error_and_writes_nothing() -> None:
    index, payload = example()
    before = bytes(payload)
    with pytest.raises(GeminiError, match="reserved"):
        SnapshotIndex(1, 40, 4, index.nbytes, index.tensors, {"long": "x" * INDEX_BYTES}).write(memoryview(payload))
    assert payload == before


def refused(payload: bytes | bytearray) -> None:
    with pytest.raises(GeminiError):
        SnapshotIndex.read(memoryview(payload))


def with_index(text: bytes, size: int = INDEX_BYTES + 8192) -> bytearray:
    return bytearray((struct.pack("<Q", len(text)) + text).ljust(INDEX_BYTES).ljust(size, b"\0"))


@pytest.mark.parametrize(
    "payload", [b"", b"\0" * 7, b"\0" * 8, b"\0" * (INDEX_BYTES + 64), b"\xff" * (INDEX_BYTES + 64)]
)
def test_bytes_without_an_index(payload: bytes) -> None:
    refused(payload)


@given(st.binary(max_size=300))
def test_random_text(text: bytes) -> None:
    refused(with_index(text))


@given(values)
def test_random_json(value: Any) -> None:
    refused(with_index(json.dumps(value).encode()))


@pytest.mark.parametrize("text", [b"[" * 60_000, b'{"a":' * 12_000, b"9" * 5000, b'{"format": 1e999}', b"\xff\xfe{}"])
def test_hostile_json(text: bytes) -> None:
    refused(with_index(text))


KEYS = ["format", "rank", "step", "world_size", "nbytes", "tensors", "state"]


@pytest.mark.parametrize("key", KEYS)
@given(value=values)
@settings(max_examples=50)
def test_any_value_at_any_place_is_refused_or_harmless(key: str, value: Any) -> None:
    """What is accepted has the declared types, and places tensors inside the payload only."""
    _, payload = example()
    (length,) = struct.unpack_from("<Q", payload)
    raw = json.loads(payload[8 : 8 + length])
    raw[key] = value
    check_harmless(with_index(json.dumps(raw).encode(), len(payload)))


@pytest.mark.parametrize("key", ["name", "dtype", "shape", "offset", "nbytes"])
@given(value=values | st.integers(-(2**70), 2**70) | st.lists(st.integers(-5, 2000), max_size=3))
@settings(max_examples=50)
def test_any_value_in_a_tensor_is_refused_or_harmless(key: str, value: Any) -> None:
    _, payload = example()
    (length,) = struct.unpack_from("<Q", payload)
    raw = json.loads(payload[8 : 8 + length])
    raw["tensors"][0][key] = value
    check_harmless(with_index(json.dumps(raw).encode(), len(payload)))


def check_harmless(payload: bytearray) -> None:
    try:
        found = SnapshotIndex.read(memoryview(payload))
    except GeminiError:
        return
    assert all(type(number) is int for number in (found.rank, found.step, found.world_size, found.nbytes)), found
    assert isinstance(found.state, dict), found
    for tensor in found.tensors:
        check_tensor(tensor, found.nbytes)
    assert 0 <= found.nbytes <= len(payload)


def check_tensor(tensor: TensorSpec, nbytes: int) -> None:
    assert isinstance(tensor.name, str) and tensor.dtype in SIZES
    assert all(type(size) is int and size >= 0 for size in tensor.shape), tensor
    assert type(tensor.offset) is int and type(tensor.nbytes) is int, tensor
    assert tensor.offset >= INDEX_BYTES and tensor.nbytes >= 0 and tensor.offset + tensor.nbytes <= nbytes


@given(st.data())
def test_flipped_bytes_are_refused_or_harmless(data: st.DataObject) -> None:
    _, payload = example()
    (length,) = struct.unpack_from("<Q", payload)
    for _ in range(data.draw(st.integers(1, 4))):
        payload[data.draw(st.integers(0, 8 + length))] = data.draw(st.integers(0, 255))
    check_harmless(payload)


@given(st.integers(0, INDEX_BYTES + 5000))
def test_cut_payloads(size: int) -> None:
    _, payload = example()
    if size < len(payload):
        refused(payload[:size])


@pytest.mark.parametrize("ranks", [1, 3, 4, 128])
def test_capacity_s_sizes_are_the_arena_s(ranks: int) -> None:
    """What `submit` computes without torch is an upper bound of a snapshot of two parameter groups."""
    parameters = [("a", (100, 77)), ("b", (13,)), ("c", (1,)), ("d", (3, 5, 7))]
    large = sum(-(-prod(shape) // ranks) for _, shape in parameters if len(shape) > 1)
    small = sum(-(-prod(shape) // ranks) for _, shape in parameters if len(shape) == 1)
    wanted = [(f"group{i}/{m}", "float32", (n,)) for i, n in enumerate((large, small)) for m in ("x", "m", "v")]
    _, nbytes = layout(wanted)
    assert nbytes <= capacity.snapshot_bytes(parameters, ranks) <= nbytes + 4096
    assert capacity.INDEX_BYTES == INDEX_BYTES
