"""The partition of checkpoint traffic into idle spans, and the three defects of the printed Algorithm 2."""

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemini_hpc.core.schedule import (
    DEVIATIONS,
    SHARE,
    SMALLEST_BYTES,
    Link,
    chunk,
    partition,
    profile,
    steps_per_snapshot,
)

MB = 1 << 20
LINK = Link(startup_s=0.001, bytes_per_s=100 * MB)


def test_a_span_is_shortened_by_what_a_chunk_costs_and_not_by_all_that_is_left() -> None:
    """The printed text takes off the cost of the remaining bytes, and so puts one chunk into a span."""
    found = partition([0.1], [100 * MB], 2 * MB, LINK)
    each = LINK.cost_s(2 * MB)
    assert len(found.chunks[0]) == int(0.1 / each) + 1  # the last one fills up what is left
    assert sum(map(LINK.cost_s, found.chunks[0])) == pytest.approx(0.1, abs=1e-6)


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_each_node_reads_one_copy_less_than_there_are(replicas: int) -> None:
    """The printed loop sends m; a snapshot's first copy is the owner's, which no network carries."""
    found = partition([10.0], [5 * MB] * (replicas - 1), MB, LINK)
    assert sum(map(sum, found.chunks)) == (replicas - 1) * 5 * MB
    assert found.left_bytes == 0


@pytest.mark.parametrize("span_s", [0.0, 0.0005, 0.001, 0.00101])
def test_a_span_that_is_too_short_for_any_byte_ends(span_s: float) -> None:
    """The printed loop goes on for ever where 0 < remaining span <= alpha."""
    found = partition([span_s, 1.0], [3 * MB], MB, LINK)
    assert found.chunks[0] == ()
    assert sum(found.chunks[1]) == 3 * MB


def test_a_chunk_holds_bytes_of_one_snapshot_and_at_most_a_buffer() -> None:
    found = partition([10.0], [MB + 5, 2 * MB], MB, LINK)
    assert found.chunks == ((MB, 5, MB, MB),)


SPANS = st.lists(st.floats(0, 2), max_size=20)
LINKS = st.builds(Link, st.floats(0, 0.1), st.floats(1e3, 1e12))


@given(SPANS, st.lists(st.integers(0, 1 << 34), max_size=4), st.integers(SMALLEST_BYTES, 1 << 27), LINKS)
def test_whatever_is_asked_for_nothing_is_lost_and_no_span_is_overrun(
    spans: list[float], copies: list[int], chunk_bytes: int, link: Link
) -> None:
    chunk_bytes = max(chunk_bytes, sum(copies) // 1000)  # so many chunks that it ends soon
    found = partition(spans, copies, chunk_bytes, link)
    assert sum(map(sum, found.chunks)) + found.left_bytes == sum(copies)
    for span, chunks in zip(spans, found.chunks, strict=True):
        assert sum(map(link.cost_s, chunks)) <= span + 1e-9 * len(chunks)
        assert all(0 < size <= chunk_bytes for size in chunks)


def test_a_slow_link_takes_the_idle_spans_of_several_steps_and_none_for_ever() -> None:
    spans = [0.05] * 4  # 49 ms of bytes each
    per_step = 4 * int(0.049 * LINK.bytes_per_s)
    assert steps_per_snapshot(spans, per_step, 1 << 30, LINK) == 1
    assert steps_per_snapshot(spans, per_step + 1, 1 << 30, LINK) == 2
    assert steps_per_snapshot([0.0] * 4, 1, 1 << 30, LINK) == inf
    assert steps_per_snapshot([], 1, 1 << 30, LINK) == inf


@pytest.mark.parametrize("link", [Link(0.0, 0.0), Link(0.0, -1.0), Link(-0.1, 1.0)])
def test_a_link_that_carries_nothing_is_refused(link: Link) -> None:
    with pytest.raises(ValueError, match="carry"):
        partition([1.0], [1], MB, link)


def test_a_small_chunk_is_read_only_when_it_is_the_last() -> None:
    span = LINK.cost_s(SMALLEST_BYTES // 2)
    assert chunk(span, 10 * MB, MB, LINK) == 0
    assert chunk(span, SMALLEST_BYTES // 4, MB, LINK) == SMALLEST_BYTES // 4


def test_a_profile_has_the_mean_and_the_spread_of_each_span() -> None:
    found = profile([1.0, 3.0], [[0.1, 0.4], [0.3, 0.4]])
    assert found.step_s == 2.0
    assert found.idle_s == pytest.approx(0.6)
    assert found.spread == pytest.approx(0.1 / 0.6)
    assert profile([1.0], [[]]).spread == 0.0
    assert not found.is_like(profile([1.0], [[0.1, 0.2]]))
    assert found.is_like(profile([9.0], [[0.15, 0.45]]))


def test_of_a_span_is_used_what_nearly_every_step_has_of_it() -> None:
    """The paper's mu alone would put reads into a span that half of the steps do not have."""
    steady, erratic, never = [0.1, 0.1], [0.05, 0.15], [0.0, 0.02]
    found = profile([1.0, 1.0], list(zip(steady, erratic, never, strict=True)))
    assert found.spans_s == pytest.approx((SHARE * 0.1, 0.1 - DEVIATIONS * 0.05, 0.0))
