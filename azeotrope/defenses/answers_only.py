"""Hide the reasoning: the boring baseline that every other defense has to beat."""

from typing import Literal

from azeotrope.defenses.base import Defense, DefenseConfig
from azeotrope.tokens import Boundary, without_reasoning


class Config(DefenseConfig):
    name: Literal["answers_only"] = "answers_only"


class AnswersOnly(Defense):
    """The provider shows the answer and keeps the reasoning.

    Reference: Jiang 2026, "DistillGuard", arXiv:2603.07835 (chain-of-thought removal).
    """

    stage = "text"
    is_baseline = True

    def rewrite(self, text: str, boundary: Boundary) -> str:
        return text if self.is_identity else without_reasoning(text, boundary)


def build(config: Config) -> AnswersOnly:
    return AnswersOnly(config)
