"""Distillation by the alpha-beta divergence (ABKD); the formula is `divergences.alpha_beta`.

alpha weighs positions by how hard they are, beta by how sure the student is. The defaults are
ABKD's for small models, alpha 0.2 and beta 0.7; CMI's own settings are not published.
Reference: Wang et al. 2025, "ABKD", arXiv:2505.04560.
"""

from functools import partial
from typing import Literal

from pydantic import Field

from azeotrope.attacks.logits import LogitAttack, LogitConfig
from azeotrope.logits import divergences
from azeotrope.logits.divergences import Divergence


class Config(LogitConfig):
    name: Literal["abkd"] = "abkd"
    alpha: float = Field(default=0.2, allow_inf_nan=False)
    beta: float = Field(default=0.7, allow_inf_nan=False)
    release_compat: bool = Field(
        default=False,
        description="the limits of the released code, off by a factor of alpha or beta",
    )


class Abkd(LogitAttack):
    def divergences(self) -> tuple[Divergence, ...]:
        c = self.config
        divergence = partial(
            divergences.alpha_beta, a=c.alpha, b=c.beta, release_compat=c.release_compat
        )
        return (divergence,)


def build(config: Config) -> Abkd:
    return Abkd(config)
