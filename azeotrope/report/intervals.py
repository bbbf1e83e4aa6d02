"""Accuracies of teachers and students -> headline numbers with 95 % intervals.

Two sources of chance are in the headline intervals: the choice of the test problems, and the seed
that trained the student. One seed says nothing of the second: its intervals cover problems only.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

DRAWS = 2000
"""Draws behind each interval: 50 of them lie beyond each of its ends."""
SHARED = 0.5
"""Correlation of two seeds' verdicts on one problem. Pairs of pocket students of one kind, which
differ by training data or seed, have .26 (middle half .19 to .31, 134 pairs). The value is above
them, so that intervals are rather wide. At 1, seeds would not average out luck with problems."""

Array = NDArray[np.float64]
Bound = Literal["exact", "at_least", "at_most", "undefined"]


class Accuracy(NamedTuple):
    """The accuracy of one training seed on n problems."""

    value: float
    n: int


Curve = Mapping[int, Sequence[Accuracy]]
"""Number of traces -> one accuracy per seed."""


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval; never NaN.

    `bound` says how to read `value`: as it stands, as a lower or an upper bound, or not at all. An
    end of the interval that the data do not limit is infinite.
    """

    value: float
    lo: float
    hi: float
    bound: Bound = "exact"

    @property
    def defined(self) -> bool:
        return self.bound != "undefined"

    def overlaps(self, estimate: "Estimate") -> bool:
        """Whether the two intervals share a number."""
        return self.lo <= estimate.hi and estimate.lo <= self.hi


UNDEFINED = Estimate(0.0, -math.inf, math.inf, "undefined")


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion.

    Raises:
        ValueError: if n is not positive, or the successes are not between 0 and n.

    Reference:
        Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"a proportion needs 0 <= successes <= n and n > 0: {successes} of {n}")
    ends = stats.binomtest(successes, n).proportion_ci(0.95, method="wilson")
    return float(ends.low), float(ends.high)


def mean_accuracy(measured: Sequence[Accuracy], *, seed: int = 0) -> Estimate:
    """Mean accuracy over training seeds, with an interval over seeds and problems.

    With one seed this is Wilson's interval, which covers the choice of problems only. See
    `draw_means` for several.

    Raises:
        ValueError: if there is no accuracy, or one is not in [0, 1] over at least one problem.
    """
    value, draws = average(measured), draw_means(measured, np.random.default_rng(seed))
    return Estimate(value, *interval_of(draws, draws))


def utility_kept(
    clean: Sequence[Accuracy], defended: Sequence[Accuracy], *, seed: int = 0
) -> Estimate:
    """Accuracy of the defended teacher / accuracy of the clean one; 1 means no harm to users.

    The two are drawn independently, which makes the interval wider than needed if both answer the
    same problems; `paired.PairedTest` is the sharper test for that case. Undefined if the clean
    teacher solves nothing.

    Raises:
        ValueError: if there is no accuracy, or one is not in [0, 1] over at least one problem.
    """
    rng = np.random.default_rng(seed)
    above, below = average(defended), average(clean)
    aboves, belows = draw_means(defended, rng), draw_means(clean, rng)
    return _ratio(above, below, aboves, belows, least=0.0)


def gain_removed(
    clean: Sequence[Accuracy],
    defended: Sequence[Accuracy],
    base: Sequence[Accuracy],
    *,
    seed: int = 0,
) -> Estimate:
    """Share of the student's gain from distillation that the defense takes away.

        (clean - defended) / (clean - base)

    0 is no effect, 1 means that distillation taught nothing, above 1 it did harm, below 0 the
    defense helped the attacker. Undefined if the clean student is no better than the base student;
    an end of the interval is infinite if that cannot be ruled out at 95 %.

    Raises:
        ValueError: if there is no accuracy, or one is not in [0, 1] over at least one problem.
    """
    rng = np.random.default_rng(seed)
    high, low, floor = average(clean), average(defended), average(base)
    high_draws, low_draws, floor_draws = (
        draw_means(measured, rng) for measured in (clean, defended, base)
    )
    return _ratio(high - low, high - floor, high_draws - low_draws, high_draws - floor_draws)


def average(measured: Sequence[Accuracy]) -> float:
    """The mean of some accuracies.

    Raises:
        ValueError: if there is no accuracy, or one is not in [0, 1] over at least one problem.
    """
    if not measured:
        raise ValueError("there is no accuracy to average")
    for accuracy in measured:
        if accuracy.n < 1 or not 0 <= accuracy.value <= 1:
            raise ValueError(f"an accuracy is in [0, 1] over at least one problem, got {accuracy}")
    return sum(accuracy.value for accuracy in measured) / len(measured)


def draw_means(
    measured: Sequence[Accuracy], rng: np.random.Generator, normal: Array | None = None
) -> Array:
    """What the true mean over all seeds and problems could be, one value per draw.

        m = W(p, n / rho, z) + t s / sqrt(k)

    p is the mean and s the standard deviation of the k seeds' accuracies, z is standard normal and
    t has Student's distribution with k - 1 degrees of freedom: few seeds say little about their
    own spread, and resampling two or three of them (a bootstrap) would say far too much. W is the
    quantile of Wilson's interval. The seeds answer the same problems, and their luck with these is
    shared in part (rho = `SHARED`); the other part differs between seeds, so that s contains it.
    With one seed, m = W(p, n, z).

    Args:
        normal: z of each draw; drawn from `rng` if None.
    """
    values = np.array([accuracy.value for accuracy in measured])
    size = float(np.mean([accuracy.n for accuracy in measured]))
    normal = rng.standard_normal(DRAWS) if normal is None else normal
    seeds = len(values)
    if seeds == 1:
        return wilson_quantile(values, np.array([size]), normal)
    problems = wilson_quantile(np.full(DRAWS, values.mean()), np.array(size / SHARED), normal)
    spread = values.std(ddof=1) / math.sqrt(seeds)
    return np.clip(problems + spread * rng.standard_t(seeds - 1, DRAWS), 0.0, 1.0)


def wilson_quantile(value: Array, n: Array, normal: Array) -> Array:
    """The end of Wilson's interval that lies `normal` standard deviations from the proportion.

        (p + z^2 / 2n + z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)

    With z drawn from a standard normal it draws the unknown proportion; unlike a binomial draw it
    still has a spread at 0 and at 1.
    """
    square = normal**2 / n
    spread = np.sqrt(value * (1 - value) / n + square / (4 * n))
    return np.clip((value + square / 2 + normal * spread) / (1 + square), 0.0, 1.0)


def interval_of(lows: Array, highs: Array) -> tuple[float, float]:
    """95 % interval of draws that are intervals themselves.

    Quantiles are draws, not interpolated: there is no arithmetic between infinities.
    """
    return (
        float(np.quantile(lows, 0.025, method="lower")),
        float(np.quantile(highs, 0.975, method="higher")),
    )


def _ratio(
    above: float, below: float, aboves: Array, belows: Array, *, least: float = -math.inf
) -> Estimate:
    if below <= 0:
        return UNDEFINED
    positive = belows > 0
    ratios = aboves / np.where(positive, belows, 1.0)
    # A draw without a positive denominator does not limit the ratio, so it widens both ends.
    ends = interval_of(np.where(positive, ratios, least), np.where(positive, ratios, math.inf))
    return Estimate(above / below, *ends)
