"""Distillation by an alpha-divergence: D = (sum_v p^a q^(1-a) - 1) / (a (a - 1)).

Forward KL at a = 1, reverse KL at a = 0, four times the squared Hellinger distance at 1/2.
Reference: Cichocki and Amari 2010, "Families of alpha- beta- and gamma-divergences".
"""

from functools import partial
from typing import Literal

from pydantic import Field

from azeotrope.attacks.logits import LogitAttack, LogitConfig
from azeotrope.logits import divergences
from azeotrope.logits.divergences import Divergence


class Config(LogitConfig):
    name: Literal["alpha"] = "alpha"
    alpha: float = Field(default=0.5, allow_inf_nan=False)


class Alpha(LogitAttack):
    def divergences(self) -> tuple[Divergence, ...]:
        return (partial(divergences.alpha, a=self.config.alpha),)


def build(config: Config) -> Alpha:
    return Alpha(config)
