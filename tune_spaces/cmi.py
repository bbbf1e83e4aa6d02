"""CMI: how hard to turn the gradient, and how private a style to write in.

Paths are relative to one entry of `defenses` in an experiment, as in `doge.py`.
"""

from typing import Literal

from tune_spaces.doge import Dimension

SPACE: tuple[Dimension, ...] = (
    Dimension(
        "parts.0.strength",
        0.01,
        1.0,
        "log",
        "nats per token that a turn of the gradient from 1 to 0 may cost. On the pocket teacher "
        "0.03 already turns it, and from 0.3 on its sampled answers lose more than training "
        "recovers. The paper's value is not published.",
    ),
    Dimension(
        "training.rarest",
        0.03,
        1.0,
        "log",
        "at 1 the teacher keeps all its styles, so what students lose, users lose too; below a few "
        "hundredths too few traces remain to learn a style from.",
    ),
    Dimension(
        "training.fit.learning_rate",
        1e-3,
        1e-2,
        "log",
        "the cosine starts on a plateau of zero gradient: a lower rate does not leave it in two "
        "hundred steps, and after a higher one the teacher does not become useful again.",
    ),
)

OBJECTIVES: dict[str, Literal["max"]] = {"utility_kept": "max", "gain_removed": "max"}
"""Two conflicting objectives: a search returns their Pareto front, not one winner."""
