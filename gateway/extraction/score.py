"""How much the last requests of one key look like somebody collecting a data set.

Signs are combined by a noisy-or, 1 - prod(1 - weight * evidence): each is taken for a separate
reason to suspect, and none can clear a key of another. The weights follow one rule. Signs of
*automation* alone (volume, steadiness, one template, coverage, a fixed length, many addresses) stay
below the default threshold of 0.7 together: they say that a program asks, and most programs are
customers. Only a sign of *purpose* (asking for the reasoning, probing log-probabilities, sampling
the same prompt again) carries a key above it, and none does so alone.

Fifteen harmless requests are added to every key's, so that a share of few requests counts little.

What it cannot tell, because the requests are the same:

- A developer who sends "think step by step" over a table, or in the system prompt of a busy
  product, from somebody who keeps the reasoning; an evaluation with many samples of each question,
  or a load test, from sampling to distil. These honest keys score above the threshold.
- One prompt sampled slowly for ever from a health check, and problems put slowly, without a wish
  for reasoning, to a model that reasons unasked, from chat. These thieves score below.
- A program that asks for log-probabilities by mistake, is refused, and goes on all the same, from
  somebody who looks for a way to get them.
- A key among many that share the work: each key is looked at alone, and each replica sees its part.
- Who knows the signs. A random word in each prompt hides that it is repeated. Near-duplicates are
  not counted as repetitions on purpose: a long form with a short field is one, and is honest.

The weights were set by hand on simulated traffic (tests/unit/test_extraction.py), for want of real
traffic. Start with the action `observe`, and look at whom it names.
"""

import math
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass

from gateway.extraction.footprint import Observation, observe
from gateway.extraction.signs import SIGNS, ramp

__all__ = ["MOST_KEYS", "Observation", "Score", "Watch", "observe", "score"]

MOST_KEYS = 10_000
"""Keys that are remembered; one with a full window of 500 takes 0.15 MB."""


@dataclass(frozen=True)
class Score:
    """0 is nothing to see, 1 is certainty; the reasons are the strongest first, with figures."""

    value: float
    reasons: tuple[str, ...]


class Watch:
    """The last observations of each key, on one event loop.

    The key that asked longest ago is forgotten when there are too many; forgetting clears a key,
    so `keys` should not be smaller than the keys that are active.

    Raises:
        ValueError: if `window` or `keys` is below 1.
    """

    def __init__(self, window: int, keys: int = MOST_KEYS) -> None:
        if window < 1 or keys < 1:
            raise ValueError(f"window and keys must be at least 1, got {window} and {keys}")
        self._window, self._most = window, keys
        self._kept: OrderedDict[str, deque[Observation]] = OrderedDict()

    def add(self, key: str, observation: Observation) -> None:
        """Remember one more request of a key."""
        self._kept.setdefault(key, deque(maxlen=self._window)).append(observation)
        self._kept.move_to_end(key)
        if len(self._kept) > self._most:
            self._kept.popitem(last=False)

    def of(self, key: str) -> tuple[Observation, ...]:
        """A key's last requests, oldest first."""
        return tuple(self._kept.get(key, ()))

    def __len__(self) -> int:
        return len(self._kept)


def score(observations: Sequence[Observation]) -> Score:
    """Combine all signs; no observations score 0."""
    seen = sorted(observations, key=lambda item: item.at)
    if not seen:
        return Score(0.0, ())
    found: list[tuple[float, str]] = []
    for sign in SIGNS:
        value, words = sign.measure(seen)
        evidence = ramp(value, sign.low, sign.high)
        if evidence > 0:
            found.append((sign.weight * evidence, words))
    found.sort(reverse=True)
    clear = math.prod((1 - part for part, _ in found), start=1.0)
    return Score(1 - clear, tuple(f"{words} ({part:.2f})" for part, words in found))
