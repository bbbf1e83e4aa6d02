"""DOGe: how hard to push, how soft the distributions, how fast the head moves.

Paths are relative to one entry of `defenses` in an experiment, so a point of the space becomes
overrides such as `defenses.0.parts.0.strength=0.05`. Data only: whoever searches turns a dimension
into the distribution of the library at hand.
"""

from typing import Literal, NamedTuple


class Dimension(NamedTuple):
    """One thing that varies: from `low` to `high`, drawn evenly on the given scale."""

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
        "for sums over tokens on the pocket teacher: at 0.02 its answers are as before, and by 0.5 "
        "it cannot answer at all. The cliff between them is steep, so the scale is logarithmic. "
        "The paper's 3e-5 belongs to another reduction and to much longer reasoning.",
    ),
    Dimension(
        "parts.0.temperature",
        1.0,
        4.0,
        "log",
        "1 is the distribution that is sampled from and 2 the paper's; above 4 both distributions "
        "are nearly flat and their divergence says little about what is written.",
    ),
    Dimension(
        "training.fit.learning_rate",
        3e-4,
        1e-2,
        "log",
        "a hundred steps from the plain head: slower leaves it where it was, faster leaves it "
        "far outside what the frozen trunk was trained for. The paper's 5e-5 is for a 7B model.",
    ),
)

OBJECTIVES: dict[str, Literal["max"]] = {"utility_kept": "max", "gain_removed": "max"}
"""Two numbers that pull apart: a search returns their Pareto front, not one winner."""
