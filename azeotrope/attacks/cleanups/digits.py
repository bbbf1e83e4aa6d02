"""Write number words as digits: the clean-up of an attacker who has looked at the traces."""

from collections.abc import Sequence
from typing import Literal

from azeotrope.attacks.cleanups.base import AttackerAssets, CleanedTraces, Cleanup, CleanupConfig
from azeotrope.pocket.language import digits_for_words
from azeotrope.tokens import Boundary
from azeotrope.traces import Trace


class Config(CleanupConfig):
    name: Literal["digits"] = "digits"


class Digits(Cleanup):
    def clean(
        self, traces: Sequence[Trace], boundary: Boundary, assets: AttackerAssets
    ) -> CleanedTraces:
        return CleanedTraces(
            [trace.with_text(digits_for_words(trace.text), trace.correct) for trace in traces]
        )


def build(config: Config) -> Digits:
    return Digits(config)
