"""Hide the reasoning: the baseline that every other defense has to beat."""

from collections.abc import Sequence
from typing import Literal

from azeotrope.defenses.base import (
    Defense,
    DefenseConfig,
    FinishedText,
    RewriteContext,
    RewrittenText,
)
from azeotrope.tokens import without_reasoning


class Config(DefenseConfig):
    name: Literal["answers_only"] = "answers_only"


class AnswersOnly(Defense):
    """The provider shows the answer and keeps the reasoning.

    Reference: Jiang 2026, "DistillGuard", arXiv:2603.07835 (chain-of-thought removal).
    """

    stage = "text"
    is_baseline = True

    def rewrite(
        self, texts: Sequence[FinishedText], context: RewriteContext
    ) -> list[RewrittenText]:
        if self.is_identity:
            return super().rewrite(texts, context)
        return [
            RewrittenText.compared(item.text, without_reasoning(item.text, context.boundary))
            for item in texts
        ]


def build(config: Config) -> AnswersOnly:
    return AnswersOnly(config)
