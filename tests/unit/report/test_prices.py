"""Price multipliers of budget curves that are known in closed form."""

import math

import numpy as np
import pytest

from azeotrope.report.intervals import Accuracy
from azeotrope.report.prices import isotonic, price_multiplier

CLEAN = {64: 0.1, 128: 0.25, 256: 0.4, 512: 0.6, 1024: 0.7}


def curve(points: dict[int, float], n: int = 500) -> dict[int, list[Accuracy]]:
    return {traces: [Accuracy(value, n)] for traces, value in points.items()}


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
