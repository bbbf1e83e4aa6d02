"""Two budget curves -> how many times as many defended traces buy the same student."""

import math

import numpy as np

from azeotrope.report.intervals import (
    DRAWS,
    UNDEFINED,
    Array,
    Bound,
    Curve,
    Estimate,
    average,
    draw_means,
    interval_of,
)

LEVELS = 32
"""Accuracies at which two curves are compared."""


def price_multiplier(clean: Curve, defended: Curve, *, seed: int = 0) -> Estimate:
    """Defended traces that an attacker needs / clean traces, for the same student accuracy.

    Both budget curves are made non-decreasing (isotonic regression) and interpolated linearly in
    log2(traces). The ratio is read off at evenly spaced accuracies that both curves reach, and
    averaged geometrically.

    Returns:
        If the curves reach no accuracy in common, the most traces of the lower curve over the
        traces with which the higher curve reaches the same accuracy: `at_least` if the defended
        curve is the lower one, `at_most` if the clean one is. `undefined` if a curve has fewer
        than two budgets, or both curves are flat and equal.

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
    points = [np.array([[average(curve[traces]) for traces in sorted(curve)]]) for curve in curves]
    value, low, high = _log_price(budgets[0], points[0], budgets[1], points[1])
    if low[0] == -math.inf and high[0] == math.inf:
        return UNDEFINED
    bound: Bound = "exact"
    if low[0] != high[0]:
        bound = "at_least" if high[0] == math.inf else "at_most"
    draws = [_draw_curve(curve, rng) for curve in curves]
    _, lows, highs = _log_price(budgets[0], draws[0], budgets[1], draws[1])
    lo, hi = interval_of(lows, highs)
    return Estimate(2.0 ** float(value[0]), 2.0**lo, 2.0**hi, bound)


def _draw_curve(curve: Curve, rng: np.random.Generator) -> Array:
    # One number per draw for the whole curve: its points answer the same problems.
    normal = rng.standard_normal(DRAWS)
    return np.stack([draw_means(curve[traces], rng, normal) for traces in sorted(curve)], axis=1)


def isotonic(values: Array) -> Array:
    """The closest non-decreasing row to each row, in least squares.

    Point i is max over j <= i of min over k >= i of mean(values[j..k]).

    Reference:
        Robertson, Wright and Dykstra 1988, "Order restricted statistical inference", chapter 1
        (the max-min formula). scipy's `isotonic_regression` takes one row per call, which is slow
        for thousands of draws.
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
    share = (np.arange(LEVELS) + 0.5) / LEVELS
    levels = bottom[:, None] + np.maximum(top - bottom, 0)[:, None] * share
    shift = _reach(defended_x, defended, levels) - _reach(clean_x, clean, levels)
    value = shift.mean(axis=1)
    # Without a common stretch the curve that ends lower needs more than its last budget for
    # every accuracy above its end.
    apart = top <= bottom
    costs_more = apart & (defended[:, -1] < clean[:, -1])
    costs_less = apart & (clean[:, -1] < defended[:, -1])
    end = top[:, None]
    least = defended_x[-1] - _reach(clean_x, clean, end, last=True)[:, 0]
    most = _reach(defended_x, defended, end, last=True)[:, 0] - clean_x[-1]
    value = np.where(costs_more, least, np.where(costs_less, most, value))
    unknown = apart & ~costs_more & ~costs_less
    low = np.where(costs_less | unknown, -math.inf, value)
    high = np.where(costs_more | unknown, math.inf, value)
    return value, low, high


def _reach(x: Array, y: Array, levels: Array, *, last: bool = False) -> Array:
    """The x at which each non-decreasing row of y first reaches its levels, or last holds them."""
    rows, targets = y[:, None, :], levels[:, :, None]
    below = rows <= targets if last else rows < targets
    after = np.minimum(below.sum(axis=2), len(x) - 1)
    before = np.maximum(after - 1, 0)
    low, high = np.take_along_axis(y, before, axis=1), np.take_along_axis(y, after, axis=1)
    rise = np.where(high > low, high - low, 1.0)
    share = np.clip(np.where(high > low, (levels - low) / rise, 1.0), 0.0, 1.0)
    return x[before] + share * (x[after] - x[before])
