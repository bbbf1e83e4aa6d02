"""How often the extraction score suspects simulated honest keys and attackers.

The rates hold for this simulated traffic alone. `python -m pytest -s` prints the scores.
"""

import sys
from random import Random
from statistics import median

import pytest
from traffic import (
    HONEST,
    Kind,
    evaluation,
    health,
    labels,
    logprob_attacker,
    one_prompt_attacker,
    patient_attacker,
    product,
    reasoned_table,
    sampling_attacker,
    silent_attacker,
    table,
    template_attacker,
)

from gateway.extraction.score import score
from gateway.policy import Extraction

THRESHOLD = Extraction().threshold
ATTACKERS: dict[Kind, float] = {
    template_attacker: 0.8,
    sampling_attacker: THRESHOLD,
    logprob_attacker: THRESHOLD,
    patient_attacker: THRESHOLD,
}
"""Kinds of attackers, and the least score of each."""


def flagged(kind: Kind, keys: int) -> tuple[int, list[float]]:
    """How many keys of a kind are suspected, and the scores of all."""
    values = [score(kind(Random(f"{kind.__name__}:{key}"))).value for key in range(keys)]
    return sum(value >= THRESHOLD for value in values), values


def print_scores(kind: Kind, values: list[float]) -> None:
    count = sum(value >= THRESHOLD for value in values)
    sys.stdout.write(
        f"\n{kind.__name__:>16}: median {median(values):.2f}, greatest {max(values):.2f}, "
        f"least {min(values):.2f}, {count} of {len(values)} at {THRESHOLD} or above"
    )


@pytest.mark.parametrize("keys", [50, pytest.param(1000, marks=pytest.mark.slow)])
def test_few_honest_keys_are_suspected(keys: int) -> None:
    assert sum(HONEST.values()) == 1000
    wrong = 0
    for kind, share in HONEST.items():
        suspected, values = flagged(kind, share * keys // 1000)
        print_scores(kind, values)
        wrong += suspected
    sys.stdout.write(f"\nfalse positives: {wrong} of {keys}\n")
    assert wrong <= keys / 100


@pytest.mark.parametrize("kind", [table, labels, product, health])
def test_a_program_alone_is_not_suspected(kind: Kind) -> None:
    suspected, values = flagged(kind, 3)
    assert suspected == 0
    assert max(values) <= 0.66


@pytest.mark.parametrize("kind", ATTACKERS)
def test_attackers_are_suspected(kind: Kind) -> None:
    suspected, values = flagged(kind, 3)
    print_scores(kind, values)
    assert suspected == 3
    assert min(values) >= ATTACKERS[kind]


@pytest.mark.parametrize("kind", [reasoned_table, evaluation])
def test_some_honest_keys_look_like_attackers(kind: Kind) -> None:
    # A known limit, stated in the module of the score.
    suspected, values = flagged(kind, 3)
    print_scores(kind, values)
    assert suspected == 3


@pytest.mark.parametrize("kind", [silent_attacker, one_prompt_attacker])
def test_some_attackers_look_like_honest_keys(kind: Kind) -> None:
    suspected, values = flagged(kind, 3)
    print_scores(kind, values)
    assert suspected == 0
