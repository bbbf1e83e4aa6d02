"""Sizes of a step of head training. No torch here: the parent of measured processes reads them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RandomModels:
    """A teacher and one proxy with random weights; hidden sizes are multiples of 128."""

    vocab: int
    hidden: int
    proxy_hidden: int
    layers: int


@dataclass(frozen=True)
class Shape:
    """What is compared, and how often."""

    name: str
    rows: int
    steps: int
    interleave: bool
    """Steps of the two variants take turns, which needs both in memory at once."""
    tokens: int = 0
    """Completion tokens per step of random ids."""
    random: RandomModels | None = None
    """None takes the pocket models and texts that the pocket teacher writes."""


SHAPES = {
    "pocket": Shape("pocket", rows=16, steps=15, interleave=True),
    "wide": Shape(
        "wide",
        rows=8,
        steps=1,
        interleave=False,
        tokens=2048,
        random=RandomModels(vocab=151_936, hidden=2048, proxy_hidden=1024, layers=4),
    ),
    "smoke": Shape(
        "smoke",
        rows=2,
        steps=1,
        interleave=True,
        tokens=64,
        random=RandomModels(vocab=512, hidden=128, proxy_hidden=128, layers=2),
    ),
}
MEASURED = ("pocket", "wide")
"""The shapes whose figures mean something; `smoke` only shows that the benchmark runs."""
