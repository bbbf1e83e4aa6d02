"""Scores and headline numbers against hand-computed values and identities."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from azeotrope.report.statistics import (
    Accuracy,
    Row,
    Scored,
    gain_removed,
    isotonic,
    mcnemar_p,
    mean_accuracy,
    price_multiplier,
    read_results,
    repeats,
    results_document,
    summarise,
    utility_kept,
    wilson,
    wilson_quantile,
)

CLEAN = {64: 0.1, 128: 0.25, 256: 0.4, 512: 0.6, 1024: 0.7}


def curve(points: dict[int, float], n: int = 500) -> dict[int, list[Accuracy]]:
    return {traces: [Accuracy(value, n)] for traces, value in points.items()}


def row(**changes: object) -> Row:
    fields = {"role": "student", "model": "small", "task": "pocket", "metric": "accuracy"}
    return Row.model_validate(fields | {"value": 0.8, "n": 10, "ci95": [0.49, 0.943]} | changes)


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


def test_mcnemar_counts_only_the_problems_one_model_solved() -> None:
    # Six discordant problems, all for one side: 2 / 2^6.
    correct_a = [True] * 6 + [True] * 20 + [False] * 5
    correct_b = [False] * 6 + [True] * 20 + [False] * 5
    assert mcnemar_p(correct_a, correct_b) == pytest.approx(2 / 64)
    assert mcnemar_p(correct_b, correct_a) == pytest.approx(2 / 64)
    assert mcnemar_p(correct_a, correct_a) == 1.0


def test_mcnemar_refuses_unequal_lists() -> None:
    with pytest.raises(ValueError, match="2 against 1"):
        mcnemar_p([True, False], [True])


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([], False),
        ([1, 2, 3], False),
        (list(range(50)), False),
        ([7] * 7, True),  # four overlapping runs of one token
        ([7] * 5, False),  # two runs, one of them a copy: exactly half
        ([1, 2, 3, 4, 9] * 3, True),  # 12 runs, 5 distinct: 7 copies
        ([1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 7, 8], False),
    ],
)
def test_repeats(ids: list[int], expected: bool) -> None:
    assert repeats(ids) is expected


def test_summary_of_four_problems() -> None:
    scored = [
        Scored("a", True, True, 10, False),
        Scored("b", True, True, 14, False),
        Scored("c", True, False, 30, True),
        Scored("d", False, True, 10, False),
    ]
    summary = summarise(scored)
    assert summary["accuracy"].value == 0.75
    assert summary["accuracy"].ci95 == wilson(3, 4)
    assert summary["truncation_rate"].value == summary["repetition_rate"].value == 0.25
    assert summary["eos_rate"].value + summary["truncation_rate"].value == 1.0
    assert summary["tokens"].value == 16.0
    # t(0.975, 3) = 3.18245; the squares around 16 add up to 272.
    half = 3.182446 * math.sqrt(272 / 3 / 4)
    assert summary["tokens"].ci95 == pytest.approx((16 - half, 16 + half), abs=1e-4)


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


def test_isotonic_pools_neighbours_that_fall() -> None:
    fitted = isotonic(np.array([[0.1, 0.5, 0.3, 0.4, 0.9], [0.3, 0.2, 0.1, 0.0, 0.9]]))
    assert fitted == pytest.approx(
        np.array([[0.1, 0.4, 0.4, 0.4, 0.9], [0.15, 0.15, 0.15, 0.15, 0.9]])
    )


@pytest.mark.parametrize("factor", [2, 4])
def test_a_curve_shifted_by_a_factor_costs_that_factor(factor: int) -> None:
    defended = {traces * factor: value for traces, value in CLEAN.items()}
    price = price_multiplier(curve(CLEAN), curve(defended))
    assert price.bound == "exact"
    assert price.value == pytest.approx(factor, rel=1e-12)
    assert price.lo < factor < price.hi
    assert price_multiplier(curve(defended), curve(CLEAN)).value == pytest.approx(1 / factor)


def test_a_curve_costs_itself_once() -> None:
    price = price_multiplier(curve(CLEAN), curve(CLEAN))
    assert price.value == 1.0
    assert 0.6 < price.lo < 1 < price.hi < 1.6


def test_price_is_read_off_on_a_log_scale() -> None:
    # Two lines in log2(traces) from one point, the defended one half as steep: accuracy a takes
    # a / 0.2 doublings of clean traces and a / 0.1 of defended ones, so a / 0.2 more, which is
    # half a doubling on average over a in (0, 0.2).
    clean = curve({64: 0.0, 128: 0.2})
    defended = curve({64: 0.0, 128: 0.1, 256: 0.2})
    assert price_multiplier(clean, defended).value == pytest.approx(2**0.5)


def test_a_defended_curve_below_the_clean_one_gives_a_lower_bound() -> None:
    defended = curve({64: 0.0, 1024: 0.05})
    price = price_multiplier(curve(CLEAN), defended)
    assert price.bound == "at_least"
    assert price.value == pytest.approx(1024 / 64)
    assert price.hi == math.inf
    other_way = price_multiplier(defended, curve(CLEAN))
    assert other_way.bound == "at_most"
    assert other_way.value == pytest.approx(64 / 1024)
    assert other_way.lo == 0.0


def test_a_defended_curve_on_the_floor_is_charged_from_where_the_clean_one_leaves_it() -> None:
    clean = curve({64: 0.0, 128: 0.0, 256: 0.4})
    price = price_multiplier(clean, curve({64: 0.0, 128: 0.0, 256: 0.0}))
    assert (price.bound, price.value) == ("at_least", pytest.approx(256 / 128))


def test_price_needs_two_budgets_and_a_rise() -> None:
    assert price_multiplier(curve(CLEAN), {}).bound == "undefined"
    assert price_multiplier(curve({64: 0.1}), curve(CLEAN)).bound == "undefined"
    flat = curve({64: 0.2, 128: 0.2})
    assert price_multiplier(flat, flat).bound == "undefined"


def test_price_refuses_a_budget_of_nothing() -> None:
    with pytest.raises(ValueError, match="positive"):
        price_multiplier(curve({0: 0.1, 64: 0.2}), curve(CLEAN))


def test_results_come_back_as_they_were(tmp_path: Path) -> None:
    rows = [row(), row(seed=3, strength=0.5, defense="doge", traces=512)]
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results_document({"name": "demo"}, rows)))
    assert read_results(path) == rows


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "no schema version"),
        ('{"schema": 2, "run": {}, "rows": []}', "only schema 1 can be read"),
        ('{"schema": 1, "run": {}}', "a list 'rows'"),
        ('{"schema": 1, "run": {}, "rows": [{"role": "thief"}]}', "row 0: role"),
    ],
)
def test_broken_results_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_results(path)


def test_missing_results_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no results at .*results\.json"):
        read_results(tmp_path / "results.json")
