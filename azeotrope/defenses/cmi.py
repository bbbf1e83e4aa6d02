"""CMI: a matrix of low rank on the logits that turns a student's gradient away.

    z' = (I + B A) z,   A in R^{r x V} Gaussian, B in R^{V x r} zero at the start

    L = CE(softmax(z'), y) + strength * cos( g(z), g(z') )

g(z) is the gradient of a frozen surrogate student's distillation loss, with respect to one of its
layers, when the teacher's logits are z. Cross-entropy keeps the teacher useful. The cosine falls
when a student would learn something else from z' than from z; `azeotrope.heads.gradient_cosine`
says how its gradient is computed. The matrix folds into the output head, so serving it costs
nothing (`azeotrope.heads.folding`).

Reference: "Towards distillation-resistant large language models: an information-theoretic
perspective" 2026, arXiv:2602.03396. The paper's layer is `penultimate`; it does not say which of
the two readings of "second to last" it means, nor its strength and its learning rate.
"""

import math
from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field

from azeotrope.defenses.base import Defense, DefenseConfig
from azeotrope.heads.features import FeatureBatch
from azeotrope.heads.gradient_cosine import GradientCosine, SurrogateTexts
from azeotrope.heads.head import Head
from azeotrope.heads.low_rank import LowRankHead
from azeotrope.heads.surrogate import Surrogate
from azeotrope.logits import divergences
from azeotrope.logits.chunks import LOGITS_BUDGET, token_chunks
from azeotrope.training import NonFiniteLossError, TokenSum

Contexts = Literal["own", "truth", "both"]


class Config(DefenseConfig):
    """The rank is the paper's; the scale of A and the strength were tuned on the pocket models."""

    name: Literal["cmi"] = "cmi"
    strength: float = Field(
        default=0.1, ge=0, allow_inf_nan=False, description="lambda; 0 leaves the head as it is"
    )
    rank: int = Field(default=32, ge=1, description="r, at most the teacher's hidden size")
    layer: str = Field(
        default="penultimate",
        description="`penultimate` or `last` block of the surrogate, or the name of one tensor",
    )
    cosine: Literal["batch", "sample"] = Field(
        default="batch", description="one cosine for the whole batch, or the mean over its texts"
    )
    divergence: str = Field(
        default="forward_kl", description="the surrogate's distillation loss; see divergences.py"
    )
    parameters: dict[str, float] = Field(
        default_factory=dict, description="of the divergence, such as {a: 0.5} of alpha"
    )
    temperature: float = Field(
        default=1.0, gt=0, allow_inf_nan=False, description="of the surrogate's loss"
    )
    method: Literal["auto", "closed_form", "double_backward"] = Field(
        default="auto", description="auto takes the closed form wherever there is one"
    )
    parametrisation: Literal["logits", "head"] = Field(
        default="logits",
        description="logits: I + B A on the logits; head: W + B C with C in R^{r x d}, which "
        "reaches the same heads with fewer parameters",
    )
    scale: float = Field(
        default=3.0,
        gt=0,
        allow_inf_nan=False,
        description="standard deviation of A times sqrt(V), or of C times sqrt(d)",
    )
    utility_on: Contexts = Field(
        default="own", description="texts of the cross-entropy: the teacher's own, or the truth"
    )
    cosine_on: Contexts = Field(
        default="truth", description="texts on which an attacker is expected to query logits"
    )
    top_k: int | None = Field(
        default=None,
        ge=1,
        description="the cosine acts through the logits of the undefended teacher's k likeliest "
        "tokens alone; null lets it act through all",
    )
    keep_margin: bool = Field(
        default=False,
        description="remove from the cosine's gradient on the logits, at each position, the "
        "direction that moves the likeliest token away from the second",
    )
    seed: int = Field(default=0, description="of A")


class Cmi(Defense):
    """The training objective; see the module's docstring for the equations.

    Args:
        budget: greatest number of logits that exist at once in the closed form.

    Raises:
        ValueError: if the divergence is unknown, gives the teacher no gradient, or has no closed
            form and one is required.
    """

    stage = "weights"
    needs_proxies = True

    def __init__(self, config: Config, *, budget: int = LOGITS_BUDGET) -> None:
        super().__init__(config)
        self.budget = budget
        self.layer = config.layer
        self.needs_truth = "truth" in (config.utility_on, config.cosine_on)
        divergence = divergences.by_name(config.divergence, **config.parameters)
        if config.divergence == "alphanet":
            raise ValueError(
                "divergence alphanet holds the teacher fixed in its published gradient, so nothing "
                "would reach the matrix; use alpha or alpha_beta"
            )
        linear = config.divergence == "forward_kl"
        if config.method == "closed_form" and not linear:
            raise ValueError(
                f"method closed_form needs forward_kl: the gradient of {config.divergence} is not "
                "linear in the teacher's probabilities; use auto or double_backward"
            )
        self.cosine = GradientCosine(
            divergence,
            closed_form=linear and config.method != "double_backward",
            temperature=config.temperature,
            top_k=config.top_k,
            keep_margin=config.keep_margin,
            budget=budget,
        )

    def check(self, hidden_size: int) -> None:
        """Refuse a rank that the teacher cannot use.

        Raises:
            ValueError: if the rank is larger than the hidden size.
        """
        if self.config.rank > hidden_size:
            raise ValueError(
                f"rank {self.config.rank} is larger than the teacher's hidden size {hidden_size}; "
                "the logits span no more dimensions than that, so lower it"
            )

    def parametrise(self, head: Head, clean: Head, rows: int) -> LowRankHead:
        """The frozen head with the two factors to train.

        Raises:
            ValueError: if the rank is larger than the hidden size, or `top_k` than the vocabulary.
        """
        config = self.config
        self.check(head.weight.shape[1])
        if config.top_k is not None and config.top_k > rows:
            raise ValueError(
                f"top_k {config.top_k} is larger than the vocabulary of {rows} tokens; "
                "lower it, or leave it out to act on them all"
            )
        return LowRankHead(
            head,
            clean,
            rows,
            rank=config.rank,
            scale=config.scale,
            seed=config.seed,
            on_logits=config.parametrisation == "logits",
        )

    def loss(
        self, head: LowRankHead, proxies: tuple[Surrogate, ...], batch: FeatureBatch
    ) -> TokenSum:
        """The objective times the number of tokens; `backward` is called chunk by chunk.

        Raises:
            ValueError: if there is no surrogate.
            NonFiniteLossError: if a cosine is not a number.
        """
        if not proxies:
            raise ValueError("cmi needs at least one proxy; name one under `proxies`")
        count = len(batch.targets)
        parts: dict[str, float] = {}
        useful = _choose(batch, self.config.utility_on)
        if len(useful.targets):
            # `fit` divides by all tokens of the batch, but this mean is over the useful ones.
            scale = count / len(useful.targets)
            parts["cross-entropy"] = self._utility(head, useful, scale) / count
        queried = _choose(batch, self.config.cosine_on)
        if len(queried.targets):
            parts["cosine"] = self.turn(head, proxies, queried, self.strength * count)
        total = parts.get("cross-entropy", 0.0) + self.strength * parts.get("cosine", 0.0)
        return TokenSum(torch.tensor(total * count), count, parts)

    @torch.no_grad()
    def score(
        self, head: LowRankHead, proxies: tuple[Surrogate, ...], batch: FeatureBatch
    ) -> float | None:
        """The mean cosine on held-out texts.

        Raises:
            NonFiniteLossError: if a cosine is not a number.
        """
        queried = _choose(batch, self.config.cosine_on)
        return self.turn(head, proxies, queried, 0.0) if len(queried.targets) else None

    def turn(
        self, head: LowRankHead, proxies: tuple[Surrogate, ...], batch: FeatureBatch, scale: float
    ) -> float:
        """The mean cosine over surrogates; `scale` times its gradient is added to the head's.

        Raises:
            NonFiniteLossError: if a cosine is not a number; the message names the texts.
        """
        cases = [
            (surrogate, texts)
            for number, surrogate in enumerate(proxies)
            for texts in self._groups(batch, number)
        ]
        cosines: list[float] = []
        for surrogate, texts in cases:
            cosine = self.cosine.measure(head, surrogate, texts, scale / len(cases))
            if not math.isfinite(cosine):
                raise NonFiniteLossError(
                    f"the cosine between the surrogate's gradients is {cosine} on "
                    f"{', '.join(texts.ids)}: a gradient vanished or overflowed; lower the "
                    "learning rate or the strength, or choose another layer"
                )
            cosines.append(cosine)
        return sum(cosines) / len(cosines)

    def _groups(self, batch: FeatureBatch, number: int) -> Iterator[SurrogateTexts]:
        """The whole batch, or one text at a time, as the surrogate of this number reads it."""
        inputs, rows = batch.proxies[number], batch.rows[number]
        if self.config.cosine == "batch":
            yield SurrogateTexts(batch.ids, batch.teacher, inputs, rows, batch.counts)
            return
        per_text = zip(
            batch.ids,
            batch.teacher.split(list(batch.counts)),
            inputs.split(list(rows)),
            rows,
            batch.counts,
            strict=True,
        )
        for name, teacher, entering, length, count in per_text:
            yield SurrogateTexts((name,), teacher, entering, (length,), (count,))

    def _utility(self, head: LowRankHead, batch: FeatureBatch, scale: float) -> float:
        """Summed cross-entropy times `scale`; its gradient is added to the head's."""
        total = 0.0
        for part in token_chunks(len(batch.targets), head.rows, self.budget):
            logits = head.logits(batch.teacher[part].float())
            value = scale * F.cross_entropy(logits, batch.targets[part], reduction="sum")
            if value.requires_grad:
                value.backward()
            total += float(value.detach())
        return total


def _choose(batch: FeatureBatch, contexts: Contexts) -> FeatureBatch:
    return batch if contexts == "both" else batch.only(own=contexts == "own")


def build(config: Config) -> Cmi:
    return Cmi(config)
