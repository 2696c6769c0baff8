"""The probability of recovery from memory against the paper's numbers, and against counting every set of lost nodes."""

from fractions import Fraction
from itertools import combinations
from math import comb

import pytest

from gemini_hpc.core.placement import FORMS, Form, holders
from gemini_hpc.core.probability import Keepers, recovery_probability, survivable, union_bound, upper_bound


def counted(keepers: Keepers, lost: int) -> Fraction:
    """The share of the sets of `lost` nodes after which every rank still has a holder, by trying them all."""
    masks = [sum(1 << keeper for keeper in row) for row in keepers]
    chosen = [sum(1 << node for node in nodes) for nodes in combinations(range(len(keepers)), lost)]
    return Fraction(sum(all(mask & ~gone for mask in masks) for gone in chosen), len(chosen))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("replicas", [1, 2, 3, 4])
def test_it_is_what_counting_gives(form: Form, replicas: int) -> None:
    for world_size in range(replicas, 12):
        keepers = holders(world_size, replicas, form)
        for lost in range(world_size + 1):
            assert recovery_probability(keepers, lost) == counted(keepers, lost), (world_size, lost)
            assert union_bound(keepers, lost) <= recovery_probability(keepers, lost)


def test_any_table_will_do_though_its_holders_are_far_apart() -> None:
    keepers = [(0, 5), (1, 4, 7), (2, 6), (3,), (4, 0, 2), (5, 6), (6, 3), (7, 1)]
    for lost in range(9):
        assert recovery_probability(keepers, lost) == counted(keepers, lost)


@pytest.mark.parametrize(
    ("world_size", "exact", "bound"),
    [
        (8, (85.71, 57.14, 22.86, 0.0), (85.71, 57.14, 14.29, 0.0)),
        (16, (93.33, 80.00, 61.54, 41.03), (93.33, 80.00, 60.00, 33.33)),
        (32, (96.77, 90.32, 80.98, 69.41), (96.77, 90.32, 80.65, 67.74)),
        (64, (98.41, 95.24, 90.55, 84.52), (98.41, 95.24, 90.48, 84.13)),
        (128, (99.21, 97.64, 95.29, 92.22), (99.21, 97.64, 95.28, 92.13)),
    ],
)
def test_the_paper_on_two_copies_in_groups(world_size: int, exact: tuple[float, ...], bound: tuple[float, ...]) -> None:
    """PAPER.md section 2: two to five nodes lost, and Corollary 1."""
    keepers = holders(world_size, 2)
    for lost, exactly, at_least in zip(range(2, 6), exact, bound, strict=True):
        assert 100 * recovery_probability(keepers, lost) == pytest.approx(exactly, abs=0.005)
        assert 100 * union_bound(keepers, lost) == pytest.approx(at_least, abs=0.005)
        corollary_1 = 1 - Fraction(world_size * comb(world_size - 2, lost - 2), 2 * comb(world_size, lost))
        assert union_bound(keepers, lost) == max(0, corollary_1)


@pytest.mark.parametrize(
    ("world_size", "two", "three", "three_bound"),
    [
        (8, 71.43, 28.57, 14.29),
        (16, 86.67, 62.86, 60.00),
        (32, 93.55, 81.29, 80.65),
        (64, 96.83, 90.63, 90.48),
        (128, 98.43, 95.31, 95.28),
    ],
)
def test_the_paper_on_the_ring_whose_number_is_a_bound(
    world_size: int, two: float, three: float, three_bound: float
) -> None:
    keepers = holders(world_size, 2, "ring")
    assert 100 * recovery_probability(keepers, 2) == pytest.approx(two, abs=0.005)
    assert 100 * recovery_probability(keepers, 3) == pytest.approx(three, abs=0.005)
    assert 100 * union_bound(keepers, 3) == pytest.approx(three_bound, abs=0.005)


@pytest.mark.parametrize(
    ("world_size", "replicas", "as_many", "one_more"),
    [
        (5, 2, (60.0, 70.0, 90.0), (0.0, 20.0, 60.0)),
        (7, 2, (76.2, 81.0, 90.5), (34.3, 45.7, 68.6)),
        (9, 2, (83.3, 86.1, 91.7), (52.4, 59.5, 73.8)),
        (8, 3, (89.3, 94.6, 98.2), (64.3, 78.6, 92.9)),
        (10, 3, (95.0, 96.7, 98.3), (81.4, 87.1, 92.9)),
    ],
)
def test_what_the_other_forms_gain(
    world_size: int, replicas: int, as_many: tuple[float, ...], one_more: tuple[float, ...]
) -> None:
    """PAPER.md section 2: mixed, overlap and full-tail; the overlap reaches what no placement of m copies exceeds."""
    for form, exactly, with_one_more in zip(("mixed", "overlap", "full_tail"), as_many, one_more, strict=True):
        keepers = holders(world_size, replicas, form)
        assert 100 * recovery_probability(keepers, replicas) == pytest.approx(exactly, abs=0.05)
        assert 100 * recovery_probability(keepers, replicas + 1) == pytest.approx(with_one_more, abs=0.05)
        assert recovery_probability(keepers, replicas - 1) == 1
    best = upper_bound(world_size, replicas)
    assert recovery_probability(holders(world_size, replicas, "overlap"), replicas) == best
    gap = best - recovery_probability(holders(world_size, replicas), replicas)
    assert gap <= Fraction(2 * replicas - 3, comb(world_size, replicas))  # Theorem 1


def test_large_clusters_are_counted_exactly() -> None:
    """Group placement has a closed form: [x^k] ((1+x)^m - x^m)^(N/m)."""
    size, replicas, most = 3000, 3, 9
    group = [comb(replicas, k) if k < replicas else 0 for k in range(most + 1)]
    power = [1] + [0] * most
    for _ in range(size // replicas):
        power = [sum(power[i] * group[k - i] for i in range(k + 1)) for k in range(most + 1)]
    assert survivable(holders(size, replicas), most) == power
