"""Antidistillation sampling: write tokens from which a student would learn the wrong thing.

    x_t ~ softmax( z_T / tau + strength * delta ),    delta(x) = < grad l, grad log p(x | x_<t) >

p is a proxy that stands for the attacker's student, and l its loss on held-out clean traces. A step
of training on the token x changes l by about delta(x) times the learning rate, so tokens with a
large delta are poor lessons. With g = grad l / |grad l|, delta is the derivative of the proxy's
log-probabilities along g, and `azeotrope.proxies.perturbed` computes it with two forward passes of
the proxy per token. With several proxies, of any architecture with the teacher's tokens, their
terms are averaged, or the smallest is taken.

The strength is per unit of g's length and acts after the temperature: rows of every temperature
are perturbed alike. The answer is written by the teacher alone unless `span` says otherwise.

Reference: Savani et al. 2025, "Antidistillation sampling", arXiv:2504.13146. Its g is not
normalised, and its code perturbs before the temperature; both make published strengths depend on
other settings.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from azeotrope.decoding import DecodingRow
from azeotrope.defenses.proxied import ProxiedConfig, ProxiedDecoding
from azeotrope.proxies.companion import Forward
from azeotrope.proxies.perturbed import PerturbedPair
from azeotrope.proxies.prepared import PreparedProxy


class Config(ProxiedConfig):
    """The default strength was tuned on the pocket models."""

    name: Literal["ads"] = "ads"
    strength: float = Field(
        default=0.3, ge=0, allow_inf_nan=False, description="lambda; 0 samples from the teacher"
    )
    combine: Literal["mean", "least"] = Field(
        default="mean",
        description="of several proxies' terms: least raises a token only as far as every proxy "
        "would suffer from it",
    )
    least_temperature: float = Field(
        default=0.5,
        gt=0,
        allow_inf_nan=False,
        description="colder rows, greedy ones too, are perturbed as at this temperature",
    )


class Ads(ProxiedDecoding):
    """The sampler; see the module's docstring for the equations."""

    needs_direction = True
    config: Config

    def forward(self, proxy: PreparedProxy) -> Forward:
        """Delta, by two perturbed copies of the proxy.

        Raises:
            ValueError: if the proxy was prepared without a direction.
        """
        if proxy.direction is None:
            raise ValueError("a proxy of ads was prepared without a direction")
        return PerturbedPair(proxy.loaded.model, proxy.direction, proxy.epsilon, proxy.tokens)

    def changed(
        self,
        logits: Float[Tensor, "rows vocab"],
        terms: Float[Tensor, "proxies rows tokens"],
        rows: Sequence[DecodingRow],
    ) -> Float[Tensor, "rows vocab"]:
        """Add strength * temperature * delta; tokens that no proxy has stay as they are."""
        delta = terms.mean(0) if self.config.combine == "mean" else terms.amin(0)
        # The sampler divides by the temperature afterwards.
        heat = [max(row.temperature, self.config.least_temperature) for row in rows]
        scale = self.config.strength * torch.tensor(heat, device=delta.device).unsqueeze(1)
        tokens = min(logits.shape[-1], delta.shape[-1])
        adjusted = logits.float()
        shift = torch.zeros_like(adjusted)
        shift[:, :tokens] = (scale * delta)[:, :tokens]
        return (adjusted + shift).to(logits.dtype)


def build(config: Config) -> Ads:
    return Ads(config)
