"""Keep the traces whose answer is right: rejection sampling with known answers.

Reference: Yuan et al. 2023, "Scaling relationship on learning mathematical reasoning with large
language models", arXiv:2308.01825.
"""

from collections.abc import Sequence
from typing import Literal

from azeotrope.attacks.cleanups.base import AttackerAssets, CleanedTraces, Cleanup, CleanupConfig
from azeotrope.tokens import Boundary
from azeotrope.traces import Trace


class Config(CleanupConfig):
    name: Literal["correct_only"] = "correct_only"


class CorrectOnly(Cleanup):
    def clean(
        self, traces: Sequence[Trace], boundary: Boundary, assets: AttackerAssets
    ) -> CleanedTraces:
        return CleanedTraces([trace for trace in traces if trace.correct])


def build(config: Config) -> CorrectOnly:
    return CorrectOnly(config)
