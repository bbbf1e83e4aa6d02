"""DOGe: defensive output generation by adversarial fine-tuning of the output head.

The head learns to keep writing the teacher's own answers, while its reasoning moves away from what
proxy students would predict:

    L = - sum_t log p_T(y_t) - strength * sum_{t in reasoning} (1/N) sum_i KL(p_T,t || p_i,t)

with both distributions at `temperature`. The trunk is frozen, so hidden states are computed once
and a step is two matrix products. Logits exist for one chunk of tokens at a time.

Reference: Li, Tan et al. 2025, "DOGe: Defensive Output Generation", arXiv:2505.19504.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from azeotrope.defenses.base import Defense, DefenseConfig
from azeotrope.heads.features import FeatureBatch
from azeotrope.heads.head import Head, ProxyHead
from azeotrope.logits.chunks import LOGITS_BUDGET, head_logits, token_chunks
from azeotrope.training import TokenSum

Reduction = Literal["sum", "token_mean", "release"]


class Config(DefenseConfig):
    """Defaults are the paper's, except the strength, whose scale depends on the reduction."""

    name: Literal["doge"] = "doge"
    strength: float = Field(default=0.3, ge=0, description="lambda; 0 leaves the head as it is")
    temperature: float = Field(
        default=2.0, gt=0, description="alpha in the paper; no factor alpha^2"
    )
    mask: Literal["reasoning", "none"] = Field(
        default="reasoning",
        description="which tokens are adversarial; `none` takes all, as released",
    )
    reduction: Reduction = Field(
        default="sum",
        description="sum: both terms summed over tokens (Algorithm 1); token_mean: each divided "
        "by its own tokens; release: mean of the first, sum per sequence of the second",
    )
    clamp: float | None = Field(
        default=None, gt=0, description="nats per token above which KL is not pushed further"
    )


class Doge(Defense):
    """The training objective; see the module's docstring for the equation.

    KL is taken over the tokens that teacher and proxy share by string; both distributions are
    renormalised on them. Gradients reach the teacher's head alone.

    Args:
        budget: greatest number of logits that exist at once.
    """

    stage = "weights"
    needs_proxies = True

    def __init__(self, config: Config, *, budget: int = LOGITS_BUDGET) -> None:
        super().__init__(config)
        self.budget = budget

    def calibrate(self, completion_tokens: int, reasoning_tokens: int, sequences: int) -> None:
        """Turn the strength into the one that means the same under `reduction="sum"`.

        Raises:
            ValueError: if no token is adversarial.
        """
        self.strength = equivalent_strength(
            self.config,
            completion_tokens=completion_tokens,
            reasoning_tokens=reasoning_tokens,
            sequences=sequences,
        )

    def loss(self, head: Head, proxies: tuple[ProxyHead, ...], batch: FeatureBatch) -> TokenSum:
        """The summed objective of a batch; `backward` is called chunk by chunk.

        Returns:
            The detached total and the number of tokens; gradients are already in the head.

        Raises:
            ValueError: if a strength is set and there is no proxy.
        """
        if not proxies and self.config.strength > 0:
            raise ValueError("doge needs at least one proxy; name one under `proxies`")
        # In float64 the total hardly depends on how the tokens are cut into chunks.
        total = torch.zeros((), dtype=torch.float64)
        for part in token_chunks(len(batch.targets), len(head.weight), self.budget):
            hidden = batch.teacher[part].float()
            # Autograd ends at the logits; `_accumulate` takes their gradient on to the head.
            logits = head_logits(hidden, head.weight, head.bias).detach()
            logits.requires_grad_(torch.is_grad_enabled())
            ce, kl = self._terms(
                logits,
                proxies,
                tuple(states[part] for states in batch.proxies),
                batch.targets[part],
                batch.reasoning[part],
            )
            value = ce - self.strength * kl
            if logits.requires_grad:
                value.backward()
                _accumulate(head, logits.grad, hidden)
            total += value.detach().double().cpu()
        return TokenSum(total.float(), len(batch.targets))

    def _terms(
        self,
        logits: Tensor,
        proxies: tuple[ProxyHead, ...],
        proxy_hidden: tuple[Tensor, ...],
        targets: Tensor,
        reasoning: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Summed cross-entropy of all tokens, and summed mean KL of the adversarial ones."""
        ce = F.cross_entropy(logits, targets, reduction="sum")
        adversarial = reasoning if self.config.mask == "reasoning" else torch.ones_like(reasoning)
        if not proxies or not bool(adversarial.any()):
            return ce, ce.new_zeros(())
        logits = logits[adversarial] / self.config.temperature
        kl = ce.new_zeros(())
        for proxy, states in zip(proxies, proxy_hidden, strict=True):
            kl = kl + self._divergence(logits, proxy, states[adversarial].float())
        return ce, kl / len(proxies)

    def _divergence(self, logits: Tensor, proxy: ProxyHead, states: Tensor) -> Float[Tensor, ""]:
        """sum_t min(KL(p_T || p_i), clamp) in nats, over the shared tokens."""
        # Rows that pad the teacher's head beyond its tokenizer come last and belong to no string.
        whole = slice(None, len(proxy.teacher_ids))
        shared = logits[:, whole if proxy.is_whole else proxy.teacher_ids]
        log_teacher = shared.log_softmax(-1)
        with torch.no_grad():
            proxy_logits = head_logits(states, proxy.weight, proxy.bias) / self.config.temperature
            log_proxy = proxy_logits.log_softmax(-1)
        kl = (log_teacher.exp() * (log_teacher - log_proxy)).sum(-1)
        if self.config.clamp is not None:
            kl = kl.clamp(max=self.config.clamp)
        return kl.sum()


def _accumulate(head: Head, gradient: Tensor | None, hidden: Tensor) -> None:
    """Add one chunk's part, dL/dW += (dL/dz)^T h, in place.

    Autograd would allocate a temporary as large as the head for every chunk.
    """
    assert gradient is not None
    with torch.no_grad():
        for parameter in head.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        head.weight.grad.addmm_(gradient.T, hidden)  # type: ignore[union-attr]
        if head.bias is not None:
            head.bias.grad.add_(gradient.sum(0))  # type: ignore[union-attr]


def equivalent_strength(
    config: Config, *, completion_tokens: int, reasoning_tokens: int, sequences: int
) -> float:
    """The strength that means the same under `reduction="sum"`, for data of this shape.

    `token_mean` divides the KL by the adversarial tokens and the cross-entropy by all of them;
    `release` divides the KL by sequences. Multiplying each objective by the number of completion
    tokens leaves its minimum where it is, and makes the cross-entropy the same sum in all three;
    the factor that is left on the KL is the strength.

    Raises:
        ValueError: if no token is adversarial.
    """
    adversarial = reasoning_tokens if config.mask == "reasoning" else completion_tokens
    if adversarial == 0:
        raise ValueError(
            "no trace has a reasoning token, so there is nothing to defend: check the tags and "
            "answer_pattern of `boundary`, or set mask=none"
        )
    divisors = {"sum": completion_tokens, "token_mean": adversarial, "release": sequences}
    return config.strength * completion_tokens / divisors[config.reduction]


def build(config: Config) -> Doge:
    return Doge(config)
