"""CMI: a matrix of low rank on the logits that turns a student's gradient away.

    z' = (I + B A) z,   A in R^{r x V} Gaussian, B in R^{V x r} zero at the start

    L = CE(softmax(z'), y) + strength * cos( g(z), g(z') )

g(z) is the gradient of a frozen surrogate student's distillation loss, with respect to one of its
layers, when the teacher's logits are z. Cross-entropy keeps the teacher useful; the cosine falls
when what a student would learn from z' points elsewhere than what it would learn from z. The
matrix folds into the output head, so serving it costs nothing (`azeotrope.heads.folding`).

For forward KL, g is linear in the teacher's probabilities, so no double backward is needed: with
J = d s / d theta of the student's logits s, and v = d cos / d g',

    g' = J^T (q - p'),   d cos / d p' = - J v

which is one Jacobian-vector product. Other divergences go through autograd twice.

Reference: "Towards distillation-resistant large language models: an information-theoretic
perspective" 2026, arXiv:2602.03396. The paper's layer is `penultimate`; which of the two readings
of "second to last" is meant, its strength and its learning rate are not published.
"""

import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from azeotrope.defenses.base import Defense, DefenseConfig
from azeotrope.heads.features import FeatureBatch
from azeotrope.heads.folding import fold
from azeotrope.heads.head import Head
from azeotrope.heads.surrogate import Surrogate
from azeotrope.logits import divergences
from azeotrope.logits.chunks import LOGITS_BUDGET, head_logits, token_chunks
from azeotrope.training import NonFiniteLossError, TokenSum

Contexts = Literal["own", "truth", "both"]


class Config(DefenseConfig):
    """The rank is the paper's; the scale of A and the strength were found on the pocket models."""

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
        default="truth", description="texts on which a thief is expected to ask for logits"
    )
    targets: Literal["text", "greedy"] = Field(
        default="text",
        description="tokens of the cross-entropy: those of the texts, or the undefended teacher's "
        "most likely one at each position of them",
    )
    top_k: int | None = Field(
        default=None,
        ge=1,
        description="the cosine acts through the undefended teacher's k likeliest logits alone; "
        "null lets it act through all",
    )
    keep_margin: bool = Field(
        default=False,
        description="take out of the cosine's gradient on the logits, at each token, what moves "
        "the likeliest away from the second",
    )
    seed: int = Field(default=0, description="of A")


class LowRankHead(Head):
    """A frozen head and the two factors that are trained.

    `rows` says how many rows of the head belong to tokens; those that pad it stay as they are.
    """

    def __init__(self, base: Head, clean: Head, config: Config, rows: int) -> None:
        nn.Module.__init__(self)
        hidden = base.weight.shape[1]
        self.rows = rows
        self.on_logits = config.parametrisation == "logits"
        self.base_weight, self.base_bias = _frozen(base)
        self.clean_weight, self.clean_bias = _frozen(clean)
        width = self.rows if self.on_logits else hidden
        generator = torch.Generator().manual_seed(config.seed)
        down = torch.randn(config.rank, width, generator=generator)
        device = base.weight.device
        self.down = nn.Parameter((down * config.scale / math.sqrt(width)).to(device))
        self.up = nn.Parameter(torch.zeros(self.rows, config.rank, device=device))

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The head that training began with; the defended one is `folded()`."""
        return self.base_weight

    def logits(self, hidden: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens rows"]:
        """Defended logits of the rows that are tokens."""
        plain = head_logits(hidden, self.base_weight, self.base_bias)[:, : self.rows]
        seen = plain if self.on_logits else hidden
        return plain + F.linear(F.linear(seen, self.down), self.up)

    def clean_logits(self, hidden: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens rows"]:
        return head_logits(hidden, self.clean_weight, self.clean_bias)[:, : self.rows]

    @torch.no_grad()
    def folded(self) -> Head:
        if self.on_logits:
            return Head(*fold(self.base_weight, self.base_bias, self.up, self.down))
        weight = self.base_weight.clone()
        weight[: self.rows] += self.up @ self.down
        return Head(weight, self.base_bias)


def _frozen(head: Head) -> tuple[nn.Buffer, nn.Buffer | None]:
    bias = None if head.bias is None else nn.Buffer(head.bias.detach())
    return nn.Buffer(head.weight.detach()), bias


class _Texts(NamedTuple):
    """What one surrogate reads of a batch, and the teacher's states at the same tokens."""

    teacher: Tensor
    inputs: Tensor
    rows: tuple[int, ...]
    counts: tuple[int, ...]
    ids: tuple[str, ...]


class Cmi(Defense):
    """The training objective; see the module's docstring for the equations."""

    stage = "weights"
    needs_proxies = True

    def __init__(self, config: Config, *, budget: int = LOGITS_BUDGET) -> None:
        super().__init__(config)
        self.budget = budget
        self.layer = config.layer
        self.needs_truth = "truth" in (config.utility_on, config.cosine_on)
        self.divergence = divergences.by_name(config.divergence, **config.parameters)
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
        self.closed_form = linear and config.method != "double_backward"

    def check(self, hidden_size: int) -> None:
        if self.config.rank > hidden_size:
            raise ValueError(
                f"rank {self.config.rank} is larger than the teacher's hidden size {hidden_size}; "
                "the logits span no more dimensions than that, so lower it"
            )

    def parametrise(self, head: Head, clean: Head, rows: int) -> LowRankHead:
        self.check(head.weight.shape[1])
        if self.config.top_k is not None and self.config.top_k > rows:
            raise ValueError(
                f"top_k {self.config.top_k} is larger than the vocabulary of {rows} tokens; "
                "lower it, or leave it out to act on them all"
            )
        return LowRankHead(head, clean, self.config, rows)

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
            scale = count / len(useful.targets)
            parts["cross-entropy"] = self._utility(head, useful, scale) / count
        asked = _choose(batch, self.config.cosine_on)
        if len(asked.targets):
            parts["cosine"] = self.turn(head, proxies, asked, self.strength * count)
        total = parts.get("cross-entropy", 0.0) + self.strength * parts.get("cosine", 0.0)
        return TokenSum(torch.tensor(total * count), count, parts)

    @torch.no_grad()
    def score(
        self, head: LowRankHead, proxies: tuple[Surrogate, ...], batch: FeatureBatch
    ) -> float | None:
        """The mean cosine on held-out texts."""
        asked = _choose(batch, self.config.cosine_on)
        return self.turn(head, proxies, asked, 0.0) if len(asked.targets) else None

    def _utility(self, head: LowRankHead, batch: FeatureBatch, scale: float) -> float:
        """Summed cross-entropy times `scale`; its gradient is in the head afterwards."""
        total = 0.0
        for part in token_chunks(len(batch.targets), head.rows, self.budget):
            states, targets = batch.teacher[part].float(), batch.targets[part]
            if self.config.targets == "greedy":
                targets = head.clean_logits(states).argmax(-1)
            value = scale * F.cross_entropy(head.logits(states), targets, reduction="sum")
            if value.requires_grad:
                value.backward()
            total += float(value.detach())
        return total

    def turn(
        self, head: LowRankHead, proxies: tuple[Surrogate, ...], batch: FeatureBatch, scale: float
    ) -> float:
        """The mean cosine over surrogates; `scale` times its gradient is in the head afterwards."""
        measure = self._closed_form if self.closed_form else self._double_backward
        found: list[float] = []
        cases = [(s, texts) for i, s in enumerate(proxies) for texts in self._groups(batch, i)]
        for surrogate, texts in cases:
            found.append(measure(head, surrogate, texts, scale / len(cases)))
            if not math.isfinite(found[-1]):
                raise NonFiniteLossError(
                    f"the cosine between the surrogate's gradients is {found[-1]} on "
                    f"{', '.join(texts.ids)}: a gradient vanished or overflowed; lower the "
                    "learning rate or the strength, or choose another layer"
                )
        return sum(found) / len(found)

    def _groups(self, batch: FeatureBatch, index: int) -> Iterator[_Texts]:
        """The whole batch, or one text at a time, as the surrogate of this number reads it."""
        rows = batch.rows[index]
        if self.config.cosine == "batch":
            yield _Texts(batch.teacher, batch.proxies[index], rows, batch.counts, batch.ids)
            return
        teacher = batch.teacher.split(list(batch.counts))
        inputs = batch.proxies[index].split(list(rows))
        for number, name in enumerate(batch.ids):
            one = (rows[number],), (batch.counts[number],), (name,)
            yield _Texts(teacher[number], inputs[number], *one)

    def _closed_form(
        self, head: LowRankHead, surrogate: Surrogate, texts: _Texts, scale: float
    ) -> float:
        tensors = surrogate.watched()
        with torch.enable_grad():
            states = surrogate.hidden(tensors, texts.inputs, texts.rows, texts.counts)
        clean, defended = self._gradients(head, surrogate, tensors, states, texts)
        norm, other = (math.sqrt(_dot(value, value)) for value in (clean, defended))
        if norm * other == 0:
            return math.nan
        cosine = _dot(clean, defended) / (norm * other)
        if not scale or not math.isfinite(cosine):
            return cosine
        # v = d cos / d g'
        along = {
            name: clean[name] / (norm * other) - cosine * defended[name] / other**2
            for name in clean
        }
        moved = surrogate.moved(tensors, along, texts.inputs, texts.rows, texts.counts)
        for part in token_chunks(len(texts.teacher), head.rows, self.budget):
            log_p = self._log_softmax(self._restrained(head, texts.teacher[part].float()))
            value = -scale * (log_p.exp() * moved(part)).sum()
            value.backward()
        return cosine

    @torch.no_grad()
    def _gradients(
        self,
        head: LowRankHead,
        surrogate: Surrogate,
        tensors: dict[str, Tensor],
        states: Tensor,
        texts: _Texts,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """g and g' of forward KL up to one factor; only chunks of q - p ever exist."""
        errors: list[tuple[Tensor, Tensor]] = []
        in_head = (
            [torch.zeros_like(surrogate.weight) for _ in range(2)] if surrogate.in_head else []
        )
        for part in token_chunks(len(states), head.rows, self.budget):
            hidden, teacher = states[part].detach(), texts.teacher[part].float()
            q = self._log_softmax(surrogate.logits(hidden)).exp()
            pair = tuple(
                q - self._log_softmax(logits).exp()
                for logits in (head.clean_logits(teacher), head.logits(teacher))
            )
            if surrogate.in_head:
                for total, error in zip(in_head, pair, strict=True):
                    total.addmm_(error.T, hidden)
            else:
                errors.append((pair[0] @ surrogate.weight, pair[1] @ surrogate.weight))
        if surrogate.in_head:
            return tuple({"lm_head.weight": total} for total in in_head)  # type: ignore[return-value]
        found = []
        for index in range(2):
            pulled = torch.cat([pair[index] for pair in errors]).to(states.dtype)
            values = torch.autograd.grad(
                states, list(tensors.values()), pulled, retain_graph=index == 0
            )
            found.append(dict(zip(tensors, values, strict=True)))
        return found[0], found[1]

    def _double_backward(
        self, head: LowRankHead, surrogate: Surrogate, texts: _Texts, scale: float
    ) -> float:
        """Any divergence, through the gradient's own graph: the batch's logits exist at once."""
        tensors = surrogate.watched()
        with torch.enable_grad():
            states = surrogate.hidden(tensors, texts.inputs, texts.rows, texts.counts)
            weight = tensors.get("lm_head.weight", surrogate.weight)
            log_q = self._log_softmax(head_logits(states.float(), weight, surrogate.bias))
            teacher = texts.teacher.float()
            with torch.no_grad():
                clean = self._log_softmax(head.clean_logits(teacher))
            defended = self._log_softmax(self._restrained(head, teacher))
            names = list(tensors.values())
            gradients = [
                torch.autograd.grad(
                    self.divergence(log_p, log_q).sum(),
                    names,
                    create_graph=index == 1,
                    retain_graph=True,
                )
                for index, log_p in enumerate((clean, defended))
            ]
            # Near a cosine of 1 its gradient is what is left of two large terms: summed in float64.
            clean, defended = (
                torch.cat([value.flatten() for value in values]).double() for values in gradients
            )
            norms = clean.norm() * defended.norm()
            if float(norms.detach()) == 0:
                return math.nan
            cosine = (clean * defended).sum() / norms
        found = float(cosine.detach())
        if scale and math.isfinite(found):
            wanted = [p for p in head.parameters() if p.requires_grad]
            for parameter, gradient in zip(
                wanted, torch.autograd.grad(scale * cosine, wanted), strict=True
            ):
                previous = 0.0 if parameter.grad is None else parameter.grad
                parameter.grad = previous + gradient
        return found

    def _restrained(self, head: LowRankHead, states: Tensor) -> Tensor:
        """Defended logits, through which goes back only what `top_k` and `keep_margin` let pass."""
        logits = head.logits(states)
        top_k, keep_margin = self.config.top_k, self.config.keep_margin
        if not logits.requires_grad or not (top_k or keep_margin):
            return logits
        with torch.no_grad():
            mask = torch.ones_like(logits)
            if top_k:
                likeliest = head.clean_logits(states).topk(top_k, dim=-1).indices
                mask = torch.zeros_like(logits).scatter(-1, likeliest, 1.0)
            first, second = logits.topk(2, dim=-1).indices.T
            margin = F.one_hot(first, head.rows) - F.one_hot(second, head.rows)

        def cut(gradient: Tensor) -> Tensor:
            gradient = gradient * mask
            if not keep_margin:
                return gradient
            along = (gradient * margin).sum(-1, keepdim=True) / 2
            return gradient - along * margin

        logits.register_hook(cut)
        return logits

    def _log_softmax(self, logits: Tensor) -> Tensor:
        return (logits / self.config.temperature).log_softmax(-1)


def _choose(batch: FeatureBatch, contexts: Contexts) -> FeatureBatch:
    return batch if contexts == "both" else batch.only(own=contexts == "own")


def _dot(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    rows = [torch.linalg.vecdot(value, other[name]) for name, value in one.items()]
    return float(torch.cat([row.flatten() for row in rows]).double().sum())


def build(config: Config) -> Any:
    return Cmi(config)
