"""Scores, result rows and the three headline numbers, with their intervals.

Every interval here is a 95 % one. Two sources of chance are in the headline intervals: which
problems were asked, and which seed trained the student.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError
from scipy import stats

from azeotrope.config import Config, explain

SCHEMA = 1
DRAWS = 2000
GRID = 32
NGRAM = 4
NGRAM_LIMIT = 4

Array = NDArray[np.float64]
Bound = Literal["exact", "at_least", "at_most", "undefined"]


class Row(Config):
    """One measured number of `results.json`."""

    role: Literal["teacher", "student", "suspect"]
    model: str = Field(description="short name of the checkpoint")
    defense: str = "none"
    strength: float | None = Field(default=None, allow_inf_nan=False)
    attack: str = Field(default="none", description="`none` is the base student")
    cleanup: str = "none"
    decoding: str = Field(default="greedy", description="`greedy` or `sampled@T`")
    traces: int = Field(default=0, ge=0, description="how many traces the thief took")
    task: str
    metric: str
    value: float = Field(allow_inf_nan=False)
    n: int = Field(ge=0, description="problems behind the value")
    ci95: tuple[float, float]
    seed: int = 0
    seconds: float = Field(default=0.0, ge=0)


def results_document(run: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """What `results.json` holds: the schema version, facts about the run, and the rows."""
    return {"schema": SCHEMA, "run": dict(run), "rows": [row.dump() for row in rows]}


def read_document(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """The run's facts and the rows of a results file.

    Raises:
        ValueError: if the file is missing, is not JSON, has another schema version, or holds a
            row that does not fit; the message names the file and the row.
    """
    if not path.is_file():
        raise ValueError(f"no results at {path}")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(document, dict) or "schema" not in document:
        raise ValueError(f"{path} is not a results file: it has no schema version")
    if document["schema"] != SCHEMA:
        raise ValueError(
            f"{path} has schema {document['schema']!r}, but only schema {SCHEMA} can be read"
        )
    run, items = document.get("run", {}), document.get("rows")
    if not isinstance(run, dict) or not isinstance(items, list):
        raise ValueError(f"{path} must hold a mapping 'run' and a list 'rows'")
    return run, [_row(item, index, path) for index, item in enumerate(items)]


def read_results(path: Path) -> list[Row]:
    """The rows of a results file; raises as `read_document` does."""
    return read_document(path)[1]


def _row(item: Any, index: int, path: Path) -> Row:
    try:
        return Row.model_validate(item)
    except ValidationError as error:
        raise ValueError(f"{path}, row {index}: {explain(error, Row, whole='row')}") from None


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


def mcnemar_p(correct_a: Sequence[bool], correct_b: Sequence[bool]) -> float:
    """Exact two-sided McNemar test that two models solve the same share of the same problems.

    Only the problems that one model alone solved count; under the null hypothesis each of the two
    is equally likely to be that one. Without such problems the value is 1.

    Raises:
        ValueError: if the two lists are not of one length.
    """
    if len(correct_a) != len(correct_b):
        raise ValueError(
            f"a paired test needs the same problems: {len(correct_a)} against {len(correct_b)}"
        )
    only_a = sum(a and not b for a, b in zip(correct_a, correct_b, strict=True))
    only_b = sum(b and not a for a, b in zip(correct_a, correct_b, strict=True))
    if only_a + only_b == 0:
        return 1.0
    return float(stats.binomtest(only_a, only_a + only_b, 0.5).pvalue)


@dataclass(frozen=True)
class Scored:
    """What became of one problem; `tokens` counts the completion alone."""

    problem_id: str
    correct: bool
    finished: bool
    tokens: int
    repeated: bool


class Measurement(NamedTuple):
    """A mean over n problems with its 95 % interval."""

    value: float
    n: int
    ci95: tuple[float, float]


def repeats(ids: Sequence[int]) -> bool:
    """Whether a completion has fallen into a loop.

    It has if one run of 4 tokens occurs 4 times or more, overlaps included, or if more than half
    of its runs of 4 tokens are copies of an earlier one.
    """
    grams = Counter(tuple(ids[start : start + NGRAM]) for start in range(len(ids) - NGRAM + 1))
    total = grams.total()
    if total == 0:
        return False
    return max(grams.values()) >= NGRAM_LIMIT or 2 * (total - len(grams)) > total


def summarise(scored: Sequence[Scored]) -> dict[str, Measurement]:
    """Accuracy and the three rates with Wilson intervals; mean tokens with Student's t interval.

    Raises:
        ValueError: if nothing was scored.
    """
    if not scored:
        raise ValueError("nothing was scored, so there is nothing to summarise")
    flags = {
        "accuracy": [item.correct for item in scored],
        "eos_rate": [item.finished for item in scored],
        "truncation_rate": [not item.finished for item in scored],
        "repetition_rate": [item.repeated for item in scored],
    }
    n = len(scored)
    summary = {
        name: Measurement(sum(values) / n, n, wilson(sum(values), n))
        for name, values in flags.items()
    }
    summary["tokens"] = _mean_tokens([item.tokens for item in scored])
    return summary


def _mean_tokens(tokens: Sequence[int]) -> Measurement:
    n, mean = len(tokens), float(np.mean(tokens))
    if n == 1:
        return Measurement(mean, n, (mean, mean))
    half = float(stats.t.ppf(0.975, n - 1) * np.std(tokens, ddof=1) / math.sqrt(n))
    return Measurement(mean, n, (mean - half, mean + half))


class Accuracy(NamedTuple):
    """The accuracy of one training seed on n problems."""

    value: float
    n: int


Curve = Mapping[int, Sequence[Accuracy]]
"""Number of traces -> one accuracy a seed."""


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

    def overlaps(self, other: "Estimate") -> bool:
        """Whether the two intervals share a number."""
        return self.lo <= other.hi and other.lo <= self.hi


UNDEFINED = Estimate(0.0, -math.inf, math.inf, "undefined")


def mean_accuracy(measured: Sequence[Accuracy], *, seed: int = 0) -> Estimate:
    """Mean accuracy over training seeds, with an interval over seeds and problems.

    Seeds are drawn with replacement. All seeds answer the same problems, so the chance in the
    choice of problems does not average out over them: each draw moves every seed to the same
    quantile of Wilson's interval. With one seed this is Wilson's interval itself.

    Raises:
        ValueError: if there is no accuracy, or one is not in [0, 1] over at least one problem.
    """
    return _interval(_mean(measured), _draw(measured, np.random.default_rng(seed)))


def utility_kept(
    clean: Sequence[Accuracy], defended: Sequence[Accuracy], *, seed: int = 0
) -> Estimate:
    """Accuracy of the defended teacher / accuracy of the clean one; 1 means no harm to users.

    The two are drawn independently, which is wider than needed when both answer the same
    problems. Undefined if the clean teacher solves nothing.
    """
    rng = np.random.default_rng(seed)
    return _ratio(_mean(defended), _mean(clean), _draw(defended, rng), _draw(clean, rng), least=0.0)


def gain_removed(
    clean: Sequence[Accuracy],
    defended: Sequence[Accuracy],
    base: Sequence[Accuracy],
    *,
    seed: int = 0,
) -> Estimate:
    """Share of the student's gain from distillation that the defense takes away.

        (clean - defended) / (clean - base)

    0 is no effect, 1 means distillation taught nothing, above 1 it hurt, below 0 the defense
    helped the thief. Undefined if the clean student is no better than the base student; an end of
    the interval is infinite if that cannot be ruled out at 95 %.
    """
    rng = np.random.default_rng(seed)
    high, low, floor = _mean(clean), _mean(defended), _mean(base)
    high_draws, low_draws, floor_draws = (_draw(item, rng) for item in (clean, defended, base))
    return _ratio(high - low, high - floor, high_draws - low_draws, high_draws - floor_draws)


def price_multiplier(clean: Curve, defended: Curve, *, seed: int = 0) -> Estimate:
    """Defended traces a thief needs / clean traces, for the same student accuracy.

    Both budget curves are made non-decreasing (isotonic regression) and interpolated linearly in
    log2(traces). The ratio is read off at evenly spaced accuracies that both curves reach, and
    averaged geometrically.

    Returns:
        Without a common stretch of accuracies, what the most traces of the lower curve cost
        beside the same accuracy on the other: `at_least` if the defended curve is the lower one,
        `at_most` if the clean one is. `undefined` if a curve has fewer than two budgets, or both
        curves are flat and equal.

    Raises:
        ValueError: if a budget is not positive, or has no accuracies.
    """
    for curve in (clean, defended):
        if any(traces < 1 for traces in curve):
            raise ValueError(f"budgets must be positive numbers of traces, got {sorted(curve)}")
    if min(len(clean), len(defended)) < 2:
        return UNDEFINED
    rng = np.random.default_rng(seed)
    curves = (clean, defended)
    budgets = [np.log2(np.array(sorted(curve), dtype=np.float64)) for curve in curves]
    points = [np.array([[_mean(curve[traces]) for traces in sorted(curve)]]) for curve in curves]
    value, low, high = _log_price(budgets[0], points[0], budgets[1], points[1])
    if low[0] == -math.inf and high[0] == math.inf:
        return UNDEFINED
    bound: Bound = "exact"
    if low[0] != high[0]:
        bound = "at_least" if high[0] == math.inf else "at_most"
    draws = [_draw_curve(curve, rng) for curve in curves]
    _, lows, highs = _log_price(budgets[0], draws[0], budgets[1], draws[1])
    lo, hi = _quantiles(lows, highs)
    return Estimate(2.0 ** float(value[0]), 2.0**lo, 2.0**hi, bound)


def _mean(measured: Sequence[Accuracy]) -> float:
    if not measured:
        raise ValueError("there is no accuracy to average")
    for item in measured:
        if item.n < 1 or not 0 <= item.value <= 1:
            raise ValueError(f"an accuracy is in [0, 1] over at least one problem, got {item}")
    return sum(item.value for item in measured) / len(measured)


def _draw(
    measured: Sequence[Accuracy], rng: np.random.Generator, normal: Array | None = None
) -> Array:
    """Means that could have been measured, one a draw."""
    values = np.array([item.value for item in measured])
    sizes = np.array([item.n for item in measured], dtype=np.float64)
    normal = rng.standard_normal(DRAWS) if normal is None else normal
    chosen = rng.integers(len(measured), size=(DRAWS, len(measured)))
    return wilson_quantile(values[chosen], sizes[chosen], normal[:, None]).mean(axis=1)


def _draw_curve(curve: Curve, rng: np.random.Generator) -> Array:
    # One number a draw for the whole curve: its points answer the same problems.
    normal = rng.standard_normal(DRAWS)
    return np.stack([_draw(curve[traces], rng, normal) for traces in sorted(curve)], axis=1)


def wilson_quantile(value: Array, n: Array, normal: Array) -> Array:
    """The end of Wilson's interval that lies `normal` standard deviations from the proportion.

        (p + z^2 / 2n + z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)

    With z drawn from a standard normal it draws the unknown proportion; unlike a binomial draw it
    still has a spread at 0 and at 1.
    """
    square = normal**2 / n
    spread = np.sqrt(value * (1 - value) / n + square / (4 * n))
    return np.clip((value + square / 2 + normal * spread) / (1 + square), 0.0, 1.0)


def _interval(value: float, draws: Array) -> Estimate:
    lo, hi = _quantiles(draws, draws)
    return Estimate(value, lo, hi)


def _ratio(
    above: float, below: float, aboves: Array, belows: Array, *, least: float = -math.inf
) -> Estimate:
    if below <= 0:
        return UNDEFINED
    positive = belows > 0
    ratios = aboves / np.where(positive, belows, 1.0)
    # A draw without a positive denominator says nothing about the ratio.
    lo, hi = _quantiles(np.where(positive, ratios, least), np.where(positive, ratios, math.inf))
    return Estimate(above / below, lo, hi)


def _quantiles(lows: Array, highs: Array) -> tuple[float, float]:
    """95 % interval of draws that are intervals themselves; no arithmetic between infinities."""
    return (
        float(np.quantile(lows, 0.025, method="lower")),
        float(np.quantile(highs, 0.975, method="higher")),
    )


def isotonic(values: Array) -> Array:
    """The closest non-decreasing row to each row, in least squares.

    Point i is max over j <= i of min over k >= i of mean(values[j..k]).
    """
    points = values.shape[1]
    sums = np.concatenate([np.zeros((len(values), 1)), values.cumsum(axis=1)], axis=1)
    fitted = np.full_like(values, -math.inf)
    for start in range(points):
        lengths = np.arange(1, points - start + 1)
        means = (sums[:, start + 1 :] - sums[:, start : start + 1]) / lengths
        least = np.minimum.accumulate(means[:, ::-1], axis=1)[:, ::-1]
        fitted[:, start:] = np.maximum(fitted[:, start:], least)
    return fitted


def _log_price(
    clean_x: Array, clean: Array, defended_x: Array, defended: Array
) -> tuple[Array, Array, Array]:
    """log2 of the multiplier of each pair of curves: value, and the least and most it can be."""
    clean, defended = isotonic(clean), isotonic(defended)
    bottom = np.maximum(clean[:, 0], defended[:, 0])
    top = np.minimum(clean[:, -1], defended[:, -1])
    # Cell midpoints, so that a flat stretch at either end is not read at its edge.
    share = (np.arange(GRID) + 0.5) / GRID
    levels = bottom[:, None] + np.maximum(top - bottom, 0)[:, None] * share
    shift = _reach(defended_x, defended, levels) - _reach(clean_x, clean, levels)
    value = shift.mean(axis=1)
    # Without a common stretch the curve that ends lower needs more than its last budget for
    # whatever lies above its end.
    apart = top <= bottom
    dearer = apart & (defended[:, -1] < clean[:, -1])
    cheaper = apart & (clean[:, -1] < defended[:, -1])
    end = top[:, None]
    least = defended_x[-1] - _reach(clean_x, clean, end, last=True)[:, 0]
    most = _reach(defended_x, defended, end, last=True)[:, 0] - clean_x[-1]
    value = np.where(dearer, least, np.where(cheaper, most, value))
    unknown = apart & ~dearer & ~cheaper
    low = np.where(cheaper | unknown, -math.inf, value)
    high = np.where(dearer | unknown, math.inf, value)
    return value, low, high


def _reach(x: Array, y: Array, levels: Array, *, last: bool = False) -> Array:
    """The x at which each non-decreasing row of y first reaches its levels, or last holds them."""
    rows, wanted = y[:, None, :], levels[:, :, None]
    below = rows <= wanted if last else rows < wanted
    after = np.minimum(below.sum(axis=2), len(x) - 1)
    before = np.maximum(after - 1, 0)
    low, high = np.take_along_axis(y, before, axis=1), np.take_along_axis(y, after, axis=1)
    rise = np.where(high > low, high - low, 1.0)
    share = np.clip(np.where(high > low, (levels - low) / rise, 1.0), 0.0, 1.0)
    return x[before] + share * (x[after] - x[before])
