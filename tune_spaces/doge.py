"""DOGe: how hard to push, how soft the distributions are, and how fast the head moves.

Paths are relative to one entry of `defenses` in an experiment, so a point of the space becomes
overrides such as `defenses.0.parts.0.strength=0.05`. This is data only: the search turns each
dimension into a distribution of the search library.
"""

from typing import Literal, NamedTuple


class Dimension(NamedTuple):
    """One setting that varies: from `low` to `high`, drawn evenly on its scale."""

    path: str
    low: float
    high: float
    scale: Literal["linear", "log"]
    why: str


SPACE: tuple[Dimension, ...] = (
    Dimension(
        "parts.0.strength",
        0.01,
        1.0,
        "log",
        "for sums over tokens on the pocket teacher: at 0.02 its answers are as before, and at 0.5 "
        "it cannot answer at all. The change between them is steep, so the scale is logarithmic. "
        "The paper's 3e-5 belongs to another reduction and to much longer reasoning.",
    ),
    Dimension(
        "parts.0.temperature",
        1.0,
        4.0,
        "log",
        "1 is the distribution that is sampled from and 2 is the paper's value; above 4 both "
        "distributions are nearly flat and their divergence says little about what is written.",
    ),
    Dimension(
        "training.fit.learning_rate",
        3e-4,
        1e-2,
        "log",
        "for a hundred steps from the plain head: a lower rate hardly moves it, a higher one moves "
        "it far from what the frozen trunk was trained for. The paper's 5e-5 is for a 7B model.",
    ),
)

OBJECTIVES: dict[str, Literal["max"]] = {"utility_kept": "max", "gain_removed": "max"}
"""Two conflicting objectives: a search returns their Pareto front, not one winner."""
