"""Loops and rates of completions, counted by hand."""

import math

import pytest

from azeotrope.report.completions import ScoredCompletion, repeats, summarise
from azeotrope.report.intervals import wilson


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
        ScoredCompletion("a", True, True, 10, False),
        ScoredCompletion("b", True, True, 14, False),
        ScoredCompletion("c", True, False, 30, True),
        ScoredCompletion("d", False, True, 10, False),
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
