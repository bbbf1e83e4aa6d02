"""What an attacker sees of the teacher's next-token distributions.

An API may give full logits, the logarithms of the likeliest probabilities, or rounded ones. Each
position's answer becomes a set of *events*: single tokens, and one event for the tail of all tokens
that are not shown. A divergence over events is exact for the shown tokens, and keeps the mass of
the tail.
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
        """`full`, or the limits of the view: `top_k=5`, `top_k=5,decimals=1`."""
        parts = [f"top_k={self.top_k}"] if self.top_k is not None else []
        parts += [f"decimals={self.decimals}"] if self.decimals is not None else []
        return ",".join(parts) or "full"


@dataclass(frozen=True)
class Events:
    """Log-probabilities of the events that can be told apart, one row per position.

    `tokens` has the token of each event; None means every token in order. A tail, if there is one,
    is the last event and has no token.
    """

    log_p: Float[Tensor, "positions events"]
    tokens: Int[Tensor, "positions tokens"] | None = None

    @property
    def has_tail(self) -> bool:
        return self.tokens is not None and self.log_p.shape[-1] > self.tokens.shape[-1]


def observe(logits: Float[Tensor, "positions vocab"], view: View) -> Events:
    """The events that the API shows of a teacher's logits.

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
        # Rounded probabilities do not sum to 1; the attacker normalises them.
        return Events(log_p if view.decimals is None else _rounded(log_p, view).log_softmax(-1))
    likeliest, tokens = log_p.topk(view.top_k, dim=-1)
    if view.decimals is not None:
        likeliest = _rounded(likeliest, view)
    least = torch.full_like(likeliest[:, -1:], torch.finfo(likeliest.dtype).eps)
    if view.decimals is not None:
        # Rounded probabilities may sum to 1 or more. Then the tail counts as large as the least
        # likely shown token, but as no more than half a unit of the last decimal.
        least = torch.maximum(least, likeliest[:, -1:].exp().clamp(max=0.5 * 10.0**-view.decimals))
    tail = torch.maximum(1.0 - likeliest.exp().sum(-1, keepdim=True), least).log()
    return Events(torch.cat([likeliest, tail], -1).log_softmax(-1), tokens)


def _rounded(log_p: Tensor, view: View) -> Tensor:
    return log_p.round(decimals=view.decimals or 0)


def as_events(
    logits: Float[Tensor, "positions vocab"], like: Events
) -> Float[Tensor, "positions events"]:
    """A student's log-probabilities of the same events."""
    log_q = logits.log_softmax(-1)
    if like.tokens is None:
        return log_q
    # Events without a token (-1) read an impossible token, which is appended for them.
    log_q = F.pad(log_q, (0, 1), value=-torch.inf)
    tokens = like.tokens.where(like.tokens >= 0, log_q.shape[-1] - 1)
    named = log_q.gather(-1, tokens)
    if not like.has_tail:
        return named.log_softmax(-1)
    # log(1 - sum q) is summed over the other tokens: the difference loses all digits near 1.
    rest = log_q.scatter(-1, tokens, -torch.inf).logsumexp(-1, keepdim=True)
    # If every token is named, the tail is as small as `observe` makes the teacher's.
    rest = rest.masked_fill(rest == -torch.inf, math.log(torch.finfo(rest.dtype).eps))
    return torch.cat([named, rest], -1)


def temper(
    log_p: Float[Tensor, "positions events"], temperature: float
) -> Float[Tensor, "positions events"]:
    """softmax(log p / T) over the events; a tail stays one event, since its tokens are unknown."""
    return log_p if temperature == 1 else (log_p / temperature).log_softmax(-1)


def merged(
    events: Events,
    to_student: Int[Tensor, " vocab"],
    elsewhere: Bool[Tensor, " vocab"] | None = None,
) -> Events:
    """The same events for a student with another vocabulary.

    Tokens with the same next piece become one event of their summed probability. Tokens that the
    student cannot write (-1) become none. All other pieces are the tail, to which the teacher gives
    the smallest probability that rounding allows. If there was a tail before, this is an
    approximation: its tokens may share their piece with a shown one.

    Args:
        to_student: the student's next piece for every token of the teacher, or -1.
        elsewhere: tokens that belong to the tail, if every token was shown.
    """
    log_p = events.log_p
    if events.tokens is None:
        writable = to_student >= 0
        pieces, group = to_student[writable].unique(return_inverse=True)
        summed = _summed(log_p[:, writable], group.expand(len(log_p), -1), len(pieces))
        tail = log_p.new_full((len(log_p), 1), -torch.inf)
        if elsewhere is not None:
            tail = log_p.masked_fill(~elsewhere, -torch.inf).logsumexp(-1, keepdim=True)
        shares = torch.cat([summed, tail], -1).log_softmax(-1)
        least = math.log(torch.finfo(log_p.dtype).eps)
        joined = torch.cat([shares[:, :-1], shares[:, -1:].clamp(min=least)], -1)
        return Events(joined.log_softmax(-1), pieces.expand(len(log_p), -1))
    tokens = to_student[events.tokens]
    count = tokens.shape[-1]
    writable = tokens >= 0
    same = (tokens.unsqueeze(-1) == tokens.unsqueeze(-2)) & writable.unsqueeze(-1)
    first = same.int().argmax(-1)
    named = log_p[:, :count].masked_fill(~writable, -torch.inf)
    joined = torch.cat([_summed(named, first, count), log_p[:, count:]], -1).log_softmax(-1)
    # An event that was merged into an earlier one has no token of its own.
    alone = writable & (first == torch.arange(count, device=tokens.device))
    return Events(joined, tokens.masked_fill(~alone, -1))


def _summed(log_p: Tensor, group: Tensor, groups: int) -> Tensor:
    """Log of the summed probabilities of each group; -inf for a group without any."""
    start = log_p.new_full((len(log_p), groups), -torch.inf)
    largest = start.scatter_reduce(-1, group, log_p, "amax")
    largest = largest.masked_fill(largest == -torch.inf, 0.0)
    parts = (log_p - largest.gather(-1, group)).exp()
    return largest + torch.zeros_like(start).scatter_add(-1, group, parts).log()
