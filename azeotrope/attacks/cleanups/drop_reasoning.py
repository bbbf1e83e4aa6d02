"""Learn the answers without their reasoning."""

from collections.abc import Sequence
from typing import Literal

from azeotrope.attacks.cleanups.base import AttackerAssets, CleanedTraces, Cleanup, CleanupConfig
from azeotrope.tokens import Boundary, without_reasoning
from azeotrope.traces import Trace


class Config(CleanupConfig):
    name: Literal["drop_reasoning"] = "drop_reasoning"


class DropReasoning(Cleanup):
    def clean(
        self, traces: Sequence[Trace], boundary: Boundary, assets: AttackerAssets
    ) -> CleanedTraces:
        return CleanedTraces(
            [
                trace.with_text(without_reasoning(trace.text, boundary), trace.correct)
                for trace in traces
            ]
        )


def build(config: Config) -> DropReasoning:
    return DropReasoning(config)
