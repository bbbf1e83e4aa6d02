"""How completions end: correct, finished, cut off, or caught in a loop."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import stats

from azeotrope.report.intervals import wilson

DEGENERACY = ("eos_rate", "repetition_rate", "truncation_rate", "tokens")
NGRAM = 4
NGRAM_LIMIT = 4


@dataclass(frozen=True)
class ScoredCompletion:
    """The outcome of one problem; `tokens` counts the completion only."""

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


def summarise(scored: Sequence[ScoredCompletion]) -> dict[str, Measurement]:
    """Accuracy and the three rates with Wilson intervals; mean tokens with Student's t interval.

    Raises:
        ValueError: if nothing was scored.
    """
    if not scored:
        raise ValueError("nothing was scored, so there is nothing to summarise")
    flags = {
        "accuracy": [completion.correct for completion in scored],
        "eos_rate": [completion.finished for completion in scored],
        "truncation_rate": [not completion.finished for completion in scored],
        "repetition_rate": [completion.repeated for completion in scored],
    }
    n = len(scored)
    summary = {
        name: Measurement(sum(values) / n, n, wilson(sum(values), n))
        for name, values in flags.items()
    }
    summary["tokens"] = _mean_tokens([completion.tokens for completion in scored])
    return summary


def _mean_tokens(tokens: Sequence[int]) -> Measurement:
    n, mean = len(tokens), float(np.mean(tokens))
    if n == 1:
        return Measurement(mean, n, (mean, mean))
    half = float(stats.t.ppf(0.975, n - 1) * np.std(tokens, ddof=1) / math.sqrt(n))
    return Measurement(mean, n, (mean - half, mean + half))
