"""Distillation by skewed KL: D = KL(p || skew p + (1 - skew) q), bounded by -log skew.

Reference: Ko et al. 2024, "DistiLLM", arXiv:2402.03898.
"""

from functools import partial
from typing import Literal

from pydantic import Field

from azeotrope.attacks.logits import LogitAttack, LogitConfig
from azeotrope.logits import divergences
from azeotrope.logits.divergences import Divergence


class Config(LogitConfig):
    name: Literal["skew_kl"] = "skew_kl"
    skew: float = Field(default=0.1, ge=0, lt=1)


class SkewKl(LogitAttack):
    def divergences(self) -> tuple[Divergence, ...]:
        return (partial(divergences.skew_kl, skew=self.config.skew),)


def build(config: Config) -> SkewKl:
    return SkewKl(config)
