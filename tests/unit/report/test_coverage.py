"""95 % intervals hold the truth in about 95 % of simulated runs, also with few seeds.

The truth is known: seeds have a true accuracy around a mean, and answer the same problems, some of
which are hard for all of them. Intervals may be a little too wide (they are built for problems that
are harder to average out than most), but not too narrow.
"""

from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import norm

from azeotrope.report.intervals import (
    Accuracy,
    Estimate,
    gain_removed,
    mean_accuracy,
    utility_kept,
)
from azeotrope.report.prices import price_multiplier

N, RUNS = 600, 300
LEAST = 0.925
"""Of 300 runs at a coverage of .95, fewer hold the truth with a probability of 3 %."""
Measure = Callable[[float, int], list[Accuracy]]


def simulated(rng: np.random.Generator, deviation: float, hardness: float) -> Measure:
    """Accuracies of seeds around a mean; `hardness` is the share of a problem's own difficulty."""
    problems = rng.standard_normal(N)

    def measure(mean: float, seeds: int) -> list[Accuracy]:
        true = np.clip(mean + deviation * rng.standard_normal(seeds), 0.001, 0.999)
        luck = rng.standard_normal((seeds, N))
        latent = np.sqrt(hardness) * problems + np.sqrt(1 - hardness) * luck
        right = latent < norm.ppf(true)[:, None]
        return [Accuracy(float(row.mean()), N) for row in right]

    return measure


def mean(measure: Measure, seeds: int) -> tuple[Estimate, float]:
    return mean_accuracy(measure(0.7, seeds)), 0.7


def gain(measure: Measure, seeds: int) -> tuple[Estimate, float]:
    clean, defended, base = measure(0.8, seeds), measure(0.6, seeds), measure(0.3, 1)
    return gain_removed(clean, defended, base), 0.4


def kept(measure: Measure, seeds: int) -> tuple[Estimate, float]:
    return utility_kept(measure(0.9, seeds), measure(0.81, seeds)), 0.9


def price(measure: Measure, seeds: int) -> tuple[Estimate, float]:
    """Two straight lines over log2(traces), of which one lies a factor of 2 to the right."""
    budgets = {250: 0.4, 500: 0.5, 1000: 0.6, 2000: 0.7, 4000: 0.8}
    clean = {traces: measure(level, seeds) for traces, level in budgets.items()}
    defended = {traces: measure(level - 0.1, seeds) for traces, level in budgets.items()}
    return price_multiplier(clean, defended), 2.0


def coverage(
    kind: Callable[[Measure, int], tuple[Estimate, float]],
    seeds: int,
    deviation: float,
    hardness: float,
    runs: int = RUNS,
) -> float:
    rng = np.random.default_rng([seeds, round(1000 * deviation), round(10 * hardness)])
    held = 0
    for _ in range(runs):
        estimate, truth = kind(simulated(rng, deviation, hardness), seeds)
        held += estimate.lo <= truth <= estimate.hi
    return held / runs


@pytest.mark.parametrize("hardness", [0.0, 0.5])
@pytest.mark.parametrize("deviation", [0.01, 0.028, 0.055, 0.077])
@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("kind", [mean, gain])
def test_several_seeds_cover_the_truth(
    kind: Callable[[Measure, int], tuple[Estimate, float]],
    seeds: int,
    deviation: float,
    hardness: float,
) -> None:
    assert coverage(kind, seeds, deviation, hardness) >= LEAST


@pytest.mark.parametrize("seeds", [3])
@pytest.mark.parametrize("deviation", [0.028, 0.055])
@pytest.mark.parametrize("kind", [kept, price])
def test_ratios_cover_the_truth(
    kind: Callable[[Measure, int], tuple[Estimate, float]], seeds: int, deviation: float
) -> None:
    assert coverage(kind, seeds, deviation, 0.5, runs=150) >= 0.91


@pytest.mark.parametrize("kind", [mean, gain, kept])
def test_one_seed_covers_the_accuracy_of_that_seed(
    kind: Callable[[Measure, int], tuple[Estimate, float]],
) -> None:
    """Without a spread of seeds, the choice of problems is all there is."""
    assert coverage(kind, 1, 0.0, 0.5) >= LEAST


def test_one_seed_promises_nothing_about_other_seeds() -> None:
    """Why tables say `problems only`."""
    assert coverage(mean, 1, 0.055, 0.5) < 0.7


def test_intervals_are_not_wide_for_nothing() -> None:
    wide = coverage(mean, 3, 0.055, 0.5)
    assert wide <= 0.99
