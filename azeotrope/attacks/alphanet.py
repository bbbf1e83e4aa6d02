"""Distillation by the larger of two alpha-divergences (AlphaNet), in two variants.

`abkd` is the one in ABKD's release, which CMI ran: the larger of two sums over the batch, alpha in
(0, 1), no clipping. `original` decides at each position, reaches below 0 and clips the weights.
Reference: Wang et al. 2021, "AlphaNet", arXiv:2102.07954; Wang et al. 2025, arXiv:2505.04560.
"""

from functools import partial
from typing import Literal

from pydantic import Field, model_validator

from azeotrope.attacks.logits import LogitAttack, LogitConfig
from azeotrope.logits import divergences
from azeotrope.logits.divergences import Divergence

_RANGE = {"abkd": (0.2, 0.9), "original": (-1.0, 1.0)}


class Config(LogitConfig):
    """The two alphas are the variant's own unless they are given."""

    name: Literal["alphanet"] = "alphanet"
    variant_of: Literal["abkd", "original"] = Field(
        default="abkd", description="whose AlphaNet: ABKD's release, or the original"
    )
    low: float | None = Field(default=None, allow_inf_nan=False, description="the smaller alpha")
    high: float | None = Field(default=None, allow_inf_nan=False, description="the larger alpha")
    clip: float = Field(default=5.0, gt=1, description="greatest weight; `original` alone")

    @model_validator(mode="after")
    def _ordered(self) -> "Config":
        low, high = self.alphas
        if not low < high:
            raise ValueError(f"low must be below high, got {low} and {high}")
        return self

    @property
    def alphas(self) -> tuple[float, float]:
        low, high = _RANGE[self.variant_of]
        return low if self.low is None else self.low, high if self.high is None else self.high


class AlphaNet(LogitAttack):
    def divergences(self) -> tuple[Divergence, ...]:
        low, high = self.config.alphas
        if self.config.variant_of == "original":
            clip = self.config.clip
            return (partial(divergences.alphanet, low=low, high=high, clip=clip),)
        return tuple(partial(divergences.alpha, a=a) for a in (low, high))


def build(config: Config) -> AlphaNet:
    return AlphaNet(config)
