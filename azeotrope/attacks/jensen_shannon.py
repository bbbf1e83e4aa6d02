"""Distillation by the Jensen-Shannon divergence, with a share of the teacher in the mean.

D = share KL(p || m) + (1 - share) KL(q || m), m = share p + (1 - share) q.
Reference: Lin 1991, "Divergence measures based on the Shannon entropy"; for students, Agarwal et
al. 2023, arXiv:2306.13649.
"""

from functools import partial
from typing import Literal

from pydantic import Field

from azeotrope.attacks.logits import LogitAttack, LogitConfig
from azeotrope.logits import divergences
from azeotrope.logits.divergences import Divergence


class Config(LogitConfig):
    name: Literal["jensen_shannon"] = "jensen_shannon"
    share: float = Field(default=0.5, gt=0, lt=1)


class JensenShannon(LogitAttack):
    def divergences(self) -> tuple[Divergence, ...]:
        return (partial(divergences.jensen_shannon, share=self.config.share),)


def build(config: Config) -> JensenShannon:
    return JensenShannon(config)
