"""What a thief sees of the teacher's next-token distributions.

An API may give full logits, the logarithms of the likeliest probabilities, or rounded ones. What
it gives becomes a set of *events* for each position: single tokens, and one event for the tail of
all tokens not shown. A divergence over events is then exact about what was seen, and never
pretends that the tail has no mass.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from azeotrope.config import Config


class View(Config):
    """What the API shows of one next-token distribution."""

    top_k: int | None = Field(
        default=None, ge=1, description="only the k likeliest tokens; null shows all of them"
    )
    decimals: int | None = Field(
        default=None, ge=0, le=7, description="logprobs rounded so; null leaves them exact"
    )

    @property
    def label(self) -> str:
        """`full`, or what is missing: `top_k=5`, `top_k=5,decimals=1`."""
        parts = [f"top_k={self.top_k}"] if self.top_k is not None else []
        parts += [f"decimals={self.decimals}"] if self.decimals is not None else []
        return ",".join(parts) or "full"


@dataclass(frozen=True)
class Events:
    """Log-probabilities of what can be told apart, one row a position.

    `tokens` names the token behind each event; None means every token in order. A tail, if there
    is one, is the last event and has no token.
    """

    log_p: Float[Tensor, "positions events"]
    tokens: Int[Tensor, "positions tokens"] | None = None

    @property
    def has_tail(self) -> bool:
        return self.tokens is not None and self.log_p.shape[-1] > self.tokens.shape[-1]


def observe(logits: Float[Tensor, "positions vocab"], view: View) -> Events:
    """Turn a teacher's logits into what the API shows of them.

    Raises:
        ValueError: if `top_k` is larger than the vocabulary.
    """
    log_p = logits.log_softmax(-1)
    vocab = log_p.shape[-1]
    if view.top_k is not None and view.top_k > vocab:
        raise ValueError(
            f"top_k {view.top_k} is larger than the vocabulary of {vocab} tokens; "
            "lower it, or leave it out to see them all"
        )
    if view.top_k is None or view.top_k == vocab:
        # Rounded probabilities do not sum to 1; the thief knows that they should.
        return Events(log_p if view.decimals is None else _rounded(log_p, view).log_softmax(-1))
    shown, tokens = log_p.topk(view.top_k, dim=-1)
    if view.decimals is not None:
        shown = _rounded(shown, view)
    least = torch.full_like(shown[:, -1:], torch.finfo(shown.dtype).eps)
    if view.decimals is not None:
        # Where rounding leaves no room for a tail, it is taken for as large as the last token that
        # was shown, but for no more than rounding can hide.
        least = torch.maximum(least, shown[:, -1:].exp().clamp(max=0.5 * 10.0**-view.decimals))
    tail = torch.maximum(1.0 - shown.exp().sum(-1, keepdim=True), least).log()
    return Events(torch.cat([shown, tail], -1).log_softmax(-1), tokens)


def _rounded(log_p: Tensor, view: View) -> Tensor:
    return log_p.round(decimals=view.decimals or 0)


def as_events(
    logits: Float[Tensor, "positions vocab"], like: Events
) -> Float[Tensor, "positions events"]:
    """A student's log-probabilities of the same events."""
    log_q = logits.log_softmax(-1)
    if like.tokens is None:
        return log_q
    # Events that name no token (-1) read an impossible one, appended for them.
    log_q = F.pad(log_q, (0, 1), value=-torch.inf)
    tokens = like.tokens.where(like.tokens >= 0, log_q.shape[-1] - 1)
    shown = log_q.gather(-1, tokens)
    if not like.has_tail:
        return shown.log_softmax(-1)
    # log(1 - sum q) from the other tokens themselves: the difference loses all digits near 1.
    rest = log_q.scatter(-1, tokens, -torch.inf).logsumexp(-1, keepdim=True)
    # Where every token is named, the tail is as small as that of a teacher who leaves none.
    rest = rest.masked_fill(rest == -torch.inf, math.log(torch.finfo(rest.dtype).eps))
    return torch.cat([shown, rest], -1)


def temper(
    log_p: Float[Tensor, "positions events"], temperature: float
) -> Float[Tensor, "positions events"]:
    """softmax(log p / T) over the events; a tail is one event, since its inside is not known."""
    return log_p if temperature == 1 else (log_p / temperature).log_softmax(-1)


def merged(
    events: Events,
    to_student: Int[Tensor, " vocab"],
    elsewhere: Bool[Tensor, " vocab"] | None = None,
) -> Events:
    """The same events for a student with another vocabulary.

    Tokens that the student writes with the same next piece become one event of their summed
    probability, and tokens that it cannot write (-1) none. All other pieces are the tail, to which
    the teacher gives no more than rounding does. Where there was a tail already this is an
    approximation: tokens in it may share their piece with one that was shown.

    Args:
        to_student: the student's next piece for every token of the teacher.
        elsewhere: tokens that count for the tail, when every token was shown.
    """
    log_p = events.log_p
    if events.tokens is None:
        known = to_student >= 0
        pieces, group = to_student[known].unique(return_inverse=True)
        summed = _summed(log_p[:, known], group.expand(len(log_p), -1), len(pieces))
        tail = log_p.new_full((len(log_p), 1), -torch.inf)
        if elsewhere is not None:
            tail = log_p.masked_fill(~elsewhere, -torch.inf).logsumexp(-1, keepdim=True)
        shares = torch.cat([summed, tail], -1).log_softmax(-1)
        least = math.log(torch.finfo(log_p.dtype).eps)
        joined = torch.cat([shares[:, :-1], shares[:, -1:].clamp(min=least)], -1)
        return Events(joined.log_softmax(-1), pieces.expand(len(log_p), -1))
    tokens = to_student[events.tokens]
    count = tokens.shape[-1]
    known = tokens >= 0
    same = (tokens.unsqueeze(-1) == tokens.unsqueeze(-2)) & known.unsqueeze(-1)
    first = same.int().argmax(-1)
    shown = log_p[:, :count].masked_fill(~known, -torch.inf)
    joined = torch.cat([_summed(shown, first, count), log_p[:, count:]], -1).log_softmax(-1)
    # What was merged into an earlier event is no event of its own any more.
    alone = known & (first == torch.arange(count, device=tokens.device))
    return Events(joined, tokens.masked_fill(~alone, -1))


def _summed(log_p: Tensor, group: Tensor, groups: int) -> Tensor:
    """log of the summed probabilities of each group, small ones kept: -inf is left to none."""
    start = log_p.new_full((len(log_p), groups), -torch.inf)
    largest = start.scatter_reduce(-1, group, log_p, "amax")
    largest = largest.masked_fill(largest == -torch.inf, 0.0)
    parts = (log_p - largest.gather(-1, group)).exp()
    return largest + torch.zeros_like(start).scatter_add(-1, group, parts).log()
