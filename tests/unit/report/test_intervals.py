"""Headline numbers and their intervals against hand-computed values and identities."""

import math

import numpy as np
import pytest

from azeotrope.report.intervals import (
    Accuracy,
    gain_removed,
    mean_accuracy,
    utility_kept,
    wilson,
    wilson_quantile,
)


def test_wilson_of_eight_in_ten() -> None:
    assert wilson(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)


def test_wilson_at_the_edges_has_the_closed_form() -> None:
    z = 1.959964
    assert wilson(0, 50) == pytest.approx((0.0, z * z / (50 + z * z)), abs=1e-6)
    assert wilson(50, 50) == pytest.approx((50 / (50 + z * z), 1.0), abs=1e-6)


@pytest.mark.parametrize(("successes", "n"), [(1, 0), (3, 2), (-1, 4)])
def test_wilson_refuses_what_is_no_proportion(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match="0 <= successes <= n"):
        wilson(successes, n)


def test_quantiles_of_the_draws_are_the_ends_of_the_wilson_interval() -> None:
    ends = wilson_quantile(np.array([0.8]), np.array([10.0]), np.array([-1.959964, 0.0, 1.959964]))
    low, high = wilson(8, 10)
    assert ends == pytest.approx([low, 0.8, high], abs=1e-6)


def test_one_seed_gives_the_wilson_interval() -> None:
    estimate = mean_accuracy([Accuracy(0.8, 100)])
    assert estimate.value == 0.8
    assert (estimate.lo, estimate.hi) == pytest.approx(wilson(80, 100), abs=0.012)


def test_seeds_that_disagree_widen_the_interval() -> None:
    same = mean_accuracy([Accuracy(0.5, 1000)] * 3)
    apart = mean_accuracy([Accuracy(value, 1000) for value in (0.2, 0.5, 0.8)])
    assert same.value == pytest.approx(apart.value)
    assert apart.lo < 0.3 < same.lo
    assert apart.hi > 0.7 > same.hi


def test_gain_removed_at_its_two_landmarks() -> None:
    clean, base = [Accuracy(0.6, 400)] * 3, [Accuracy(0.1, 400)]
    nothing = gain_removed(clean, clean, base)
    assert nothing.value == 0.0
    assert nothing.lo < 0 < nothing.hi
    everything = gain_removed(clean, base, base)
    assert everything.value == 1.0
    assert everything.lo < 1 < everything.hi
    assert gain_removed(clean, [Accuracy(0.35, 400)], base).value == pytest.approx(0.5)
    assert gain_removed(clean, [Accuracy(0.8, 400)], base).hi < 0


def test_no_gain_leaves_nothing_to_remove() -> None:
    base = [Accuracy(0.3, 100)]
    assert gain_removed(base, [Accuracy(0.1, 100)], base).bound == "undefined"


def test_a_gain_within_chance_leaves_the_interval_open() -> None:
    estimate = gain_removed([Accuracy(0.32, 50)], [Accuracy(0.2, 50)], [Accuracy(0.30, 50)])
    assert (estimate.lo, estimate.hi) == (-math.inf, math.inf)


def test_utility_kept() -> None:
    estimate = utility_kept([Accuracy(0.8, 500)], [Accuracy(0.6, 500)])
    assert estimate.value == pytest.approx(0.75)
    assert 0.65 < estimate.lo < 0.75 < estimate.hi < 0.85
    assert utility_kept([Accuracy(0.0, 9)], [Accuracy(0.0, 9)]).bound == "undefined"


def test_intervals_of_a_seed_are_reproducible() -> None:
    arguments = ([Accuracy(0.8, 500)], [Accuracy(0.6, 500)])
    assert utility_kept(*arguments) == utility_kept(*arguments)
    assert utility_kept(*arguments) != utility_kept(*arguments, seed=1)
