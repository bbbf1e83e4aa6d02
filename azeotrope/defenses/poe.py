"""Product of experts: write what both the teacher and a weak proxy find likely.

    x_t ~ softmax( ((1 - strength) z_T + strength z_S) / tau )

z_S are the logits of a proxy that stands for the attacker's student. Text that the student finds
likely anyway teaches it little. It costs one forward pass of the proxy per token.

Reference: "The distillation game" 2026, arXiv:2605.22737, whose strengths are .65 on GSM8K and .75
on MATH.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from azeotrope.decoding import DecodingRow
from azeotrope.defenses.proxied import ProxiedConfig, ProxiedDecoding
from azeotrope.proxies.companion import Forward
from azeotrope.proxies.prepared import PreparedProxy
from azeotrope.row_cache import next_logits


class Config(ProxiedConfig):
    """The default is the paper's for GSM8K."""

    name: Literal["poe"] = "poe"
    strength: float = Field(
        default=0.65, ge=0, lt=1, description="gamma, the proxy's share; 0 samples from the teacher"
    )


class ProductOfExperts(ProxiedDecoding):
    """The sampler; see the module's docstring for the equation. Several proxies are averaged."""

    config: Config

    def forward(self, proxy: PreparedProxy) -> Forward:
        """The proxy's log-probabilities."""
        model, tokens = proxy.loaded.model, proxy.tokens

        def read(inputs: dict[str, Any]) -> Tensor:
            return next_logits(model, inputs)[:, :tokens].log_softmax(-1)

        return read

    def changed(
        self,
        logits: Float[Tensor, "rows vocab"],
        terms: Float[Tensor, "proxies rows tokens"],
        rows: Sequence[DecodingRow],
    ) -> Float[Tensor, "rows vocab"]:
        """The product; a token that only one of the experts has is impossible."""
        share = self.config.strength
        tokens = min(logits.shape[-1], terms.shape[-1])
        teacher = logits[:, :tokens].float().log_softmax(-1)
        product = torch.full_like(logits, -torch.inf)
        product[:, :tokens] = ((1 - share) * teacher + share * terms.mean(0)[:, :tokens]).to(logits)
        return product


def build(config: Config) -> ProductOfExperts:
    return ProductOfExperts(config)
