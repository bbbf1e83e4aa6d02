"""The cosine between what a surrogate student learns from clean and from defended logits.

    cos( g(z), g(z') ),   g(z) = d/dtheta sum_t D( p_t || q_t ),   p = softmax(z / T)

where theta is one layer of the surrogate, q its own distribution and D its distillation loss.

For forward KL, g is linear in the teacher's probabilities, so no double backward is needed: with
J = d s / d theta of the surrogate's logits s, and v = d cos / d g',

    g' = J^T (q - p'),   d cos / d p' = - J v

which is one Jacobian-vector product. Other divergences go through autograd twice.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from azeotrope.heads.low_rank import LowRankHead
from azeotrope.heads.surrogate import HEAD_TENSOR, Surrogate
from azeotrope.logits.chunks import LOGITS_BUDGET, head_logits, token_chunks

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class SurrogateTexts:
    """Some texts as a surrogate reads them, and the teacher's states at the same tokens."""

    ids: tuple[str, ...]
    teacher: Float[Tensor, "tokens hidden"]
    """The teacher's last hidden states at the completion tokens, text after text."""
    inputs: Float[Tensor, "rows width"]
    """What enters the surrogate's tail at every token, text after text."""
    rows: tuple[int, ...]
    """Tokens of each text."""
    counts: tuple[int, ...]
    """Completion tokens of each text."""


@dataclass(frozen=True)
class GradientCosine:
    """Measures the cosine, and adds its gradient to a head's factors."""

    divergence: Callable[[Tensor, Tensor], Tensor]
    """Per position, of log-probabilities: the teacher's first, then the student's."""
    closed_form: bool
    """Forward KL's closed form; otherwise `divergence` is differentiated twice."""
    temperature: float
    """T; divides the logits of both models."""
    top_k: int | None
    keep_margin: bool
    budget: int = LOGITS_BUDGET

    def measure(
        self, head: LowRankHead, surrogate: Surrogate, texts: SurrogateTexts, scale: float
    ) -> float:
        """The cosine on these texts; `scale` times its gradient is added to the head's.

        Returns:
            The cosine, or NaN if a gradient vanishes or is not finite; the head then gets none.
        """
        method = self._in_closed_form if self.closed_form else self._by_double_backward
        return method(head, surrogate, texts, scale)

    def _in_closed_form(
        self, head: LowRankHead, surrogate: Surrogate, texts: SurrogateTexts, scale: float
    ) -> float:
        tensors = surrogate.watched()
        with torch.enable_grad():
            states = surrogate.hidden(tensors, texts.inputs, texts.rows, texts.counts)
        clean, defended = self._gradients(head, surrogate, tensors, states, texts)
        clean_norm, defended_norm = (
            math.sqrt(_dot(gradient, gradient)) for gradient in (clean, defended)
        )
        if clean_norm * defended_norm == 0:
            return math.nan
        cosine = _dot(clean, defended) / (clean_norm * defended_norm)
        if not scale or not math.isfinite(cosine):
            return cosine
        # v = d cos / d g'
        along = {
            name: clean[name] / (clean_norm * defended_norm)
            - cosine * defended[name] / defended_norm**2
            for name in clean
        }
        moved = surrogate.moved(tensors, along, texts.inputs, texts.rows, texts.counts)
        for part in token_chunks(len(texts.teacher), head.rows, self.budget):
            logits = self._restrained(head, texts.teacher[part].float())
            # J v does not depend on the head, so the gradient of - p' J v is the cosine's.
            value = -scale * (self._log_softmax(logits).exp() * moved(part)).sum()
            value.backward()
        return cosine

    @torch.no_grad()
    def _gradients(
        self,
        head: LowRankHead,
        surrogate: Surrogate,
        tensors: Tensors,
        states: Tensor,
        texts: SurrogateTexts,
    ) -> tuple[Tensors, Tensors]:
        """g and g' of forward KL up to one common factor, which the cosine does not see.

        Only chunks of q - p ever exist. Each is reduced at once: to a part of the gradient if the
        surrogate's head is watched, otherwise to d loss / d states, which is tokens x hidden.
        """
        pulls: list[tuple[Tensor, Tensor]] = []
        in_head = (
            [torch.zeros_like(surrogate.weight) for _ in range(2)] if surrogate.in_head else []
        )
        for part in token_chunks(len(states), head.rows, self.budget):
            hidden, teacher = states[part].detach(), texts.teacher[part].float()
            q = self._log_softmax(surrogate.logits(hidden)).exp()
            errors = tuple(
                q - self._log_softmax(logits).exp()
                for logits in (head.clean_logits(teacher), head.logits(teacher))
            )
            if surrogate.in_head:
                for total, error in zip(in_head, errors, strict=True):
                    total.addmm_(error.T, hidden)
            else:
                pulls.append((errors[0] @ surrogate.weight, errors[1] @ surrogate.weight))
        if surrogate.in_head:
            return {HEAD_TENSOR: in_head[0]}, {HEAD_TENSOR: in_head[1]}
        gradients = []
        for index in range(2):
            pulled = torch.cat([pair[index] for pair in pulls]).to(states.dtype)
            values = torch.autograd.grad(
                # Both gradients go back through the same graph; the second one may free it.
                states,
                list(tensors.values()),
                pulled,
                retain_graph=index == 0,
            )
            gradients.append(dict(zip(tensors, values, strict=True)))
        return gradients[0], gradients[1]

    def _by_double_backward(
        self, head: LowRankHead, surrogate: Surrogate, texts: SurrogateTexts, scale: float
    ) -> float:
        """Any divergence, through the gradient's own graph: all logits of the texts exist."""
        tensors = surrogate.watched()
        with torch.enable_grad():
            states = surrogate.hidden(tensors, texts.inputs, texts.rows, texts.counts)
            weight = tensors.get(HEAD_TENSOR, surrogate.weight)
            log_q = self._log_softmax(head_logits(states.float(), weight, surrogate.bias))
            teacher = texts.teacher.float()
            with torch.no_grad():
                clean_log_p = self._log_softmax(head.clean_logits(teacher))
            defended_log_p = self._log_softmax(self._restrained(head, teacher))
            clean, defended = (
                torch.autograd.grad(
                    self.divergence(log_p, log_q).sum(),
                    list(tensors.values()),
                    create_graph=log_p is defended_log_p,
                    retain_graph=True,
                )
                for log_p in (clean_log_p, defended_log_p)
            )
            # Near a cosine of 1 its gradient is the small difference of two large terms: float64.
            flat_clean, flat_defended = (
                torch.cat([value.flatten() for value in values]).double()
                for values in (clean, defended)
            )
            norms = flat_clean.norm() * flat_defended.norm()
            if float(norms.detach()) == 0:
                return math.nan
            cosine = (flat_clean * flat_defended).sum() / norms
        value = float(cosine.detach())
        if scale and math.isfinite(value):
            _accumulate(head, scale * cosine)
        return value

    def _restrained(self, head: LowRankHead, states: Tensor) -> Tensor:
        return restrained_logits(head, states, top_k=self.top_k, keep_margin=self.keep_margin)

    def _log_softmax(self, logits: Tensor) -> Tensor:
        return (logits / self.temperature).log_softmax(-1)


def restrained_logits(
    head: LowRankHead,
    states: Float[Tensor, "tokens hidden"],
    *,
    top_k: int | None,
    keep_margin: bool,
) -> Float[Tensor, "tokens rows"]:
    """Defended logits that pass only a part of their gradient back to the head.

    Args:
        top_k: only the undefended teacher's k likeliest tokens pass theirs; None lets all pass.
        keep_margin: take out the direction that moves the likeliest token away from the second.
    """
    logits = head.logits(states)
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
        # The projection on the margin, whose squared norm is 2.
        along = (gradient * margin).sum(-1, keepdim=True) / 2
        return gradient - along * margin

    logits.register_hook(cut)
    return logits


def _accumulate(head: LowRankHead, value: Tensor) -> None:
    """Add the gradient of a value to the head's, as `backward` does, but to nothing else's."""
    trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(value, trained)
    for parameter, gradient in zip(trained, gradients, strict=True):
        previous = 0.0 if parameter.grad is None else parameter.grad
        parameter.grad = previous + gradient


def _dot(one: Tensors, two: Tensors) -> float:
    """Inner product over all tensors: rows in their own dtype, then their sum in float64."""
    rows = [torch.linalg.vecdot(value, two[name]) for name, value in one.items()]
    return float(torch.cat([row.flatten() for row in rows]).double().sum())
