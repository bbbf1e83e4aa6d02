"""The extraction score: how much the last requests of a customer look like a data set being built.

A noisy-or combines the signs: 1 - prod(1 - weight * evidence). Each sign is a separate reason to
suspect, and no sign can clear a customer of another. The weights follow one rule. Signs of
*automation* (volume, steadiness, one template, coverage, a fixed length, many addresses) stay below
the default threshold of 0.7 even together: they say that a program sends the requests, and most
programs are honest customers. Only a sign of *purpose* (asking for the reasoning, probing
log-probabilities, sampling the same prompt again) can lift a score above the threshold, and none
does so alone.

Fifteen harmless requests are added to those of every customer, so that a share of few requests
counts little.

The score cannot separate traffic that consists of the same requests:

- These honest customers score above the threshold. A developer who sends "think step by step" with
  each row of a table, or in the system prompt of a busy product, looks like an attacker who keeps
  the reasoning. An evaluation with many samples per question, or a load test, looks like sampling
  to distil.
- These attackers score below it. One prompt that is sampled slowly for a long time looks like a
  health check. Problems that are sent slowly, without asking for the reasoning, to a model that
  reasons anyway look like chat.
- A program that asks for log-probabilities by mistake and ignores the refusals looks like an
  attacker who searches for a way to get them.
- Keys that share the work of one attacker are scored one by one, and each replica of the gateway
  scores only the requests that it receives.
- An attacker who knows the signs can avoid them. A random word in each prompt hides repetition.
  Near-duplicates do not count as repetitions, because a long form with a short field produces them
  honestly.

The weights were set by hand on simulated traffic (tests/unit/gateway/traffic.py), because no real
traffic was available. Start with the action `observe` and look at the customers that it names.
"""

import math
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass

from gateway.extraction.footprint import Observation
from gateway.extraction.signs import SIGNS, ramp

MOST_KEYS = 10_000
"""Accounts that are remembered; one with a full window of 500 requests takes 0.15 MB. Forgetting an
account clears it of suspicion, so this should exceed the number of active ones."""


@dataclass(frozen=True)
class Score:
    """0 is no sign, 1 is certainty."""

    value: float
    reasons: tuple[str, ...]
    """The strongest sign first, each with its numbers."""


class Watch:
    """The last observations of each account. Not thread-safe: use it from one event loop.

    The account whose last request is the oldest is forgotten when there are too many.

    Raises:
        ValueError: if `window` is below 1.
    """

    def __init__(self, window: int) -> None:
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        self._window = window
        self._observations: OrderedDict[str, deque[Observation]] = OrderedDict()

    def add(self, key: str, observation: Observation) -> None:
        """Remember one more request of an account."""
        self._observations.setdefault(key, deque(maxlen=self._window)).append(observation)
        self._observations.move_to_end(key)
        if len(self._observations) > MOST_KEYS:
            self._observations.popitem(last=False)

    def of(self, key: str) -> tuple[Observation, ...]:
        """The last requests of an account, oldest first."""
        return tuple(self._observations.get(key, ()))

    def __len__(self) -> int:
        return len(self._observations)


def score(observations: Sequence[Observation]) -> Score:
    """Combine all signs of one account's requests; no requests score 0."""
    ordered = sorted(observations, key=lambda observation: observation.at)
    if not ordered:
        return Score(0.0, ())
    parts: list[tuple[float, str]] = []
    for sign in SIGNS:
        value, description = sign.measure(ordered)
        evidence = ramp(value, sign.low, sign.high)
        if evidence > 0:
            parts.append((sign.weight * evidence, description))
    parts.sort(reverse=True)
    # Each factor is the probability that a sign has a harmless cause; the signs are taken to be
    # independent. The rule for the weights in `signs` keeps this from adding up by accident.
    clear = math.prod((1 - part for part, _ in parts), start=1.0)
    return Score(1 - clear, tuple(f"{description} ({part:.2f})" for part, description in parts))
