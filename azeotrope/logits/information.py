"""How much a teacher's next-token distributions reveal of a context beyond the next token itself.

Distillation from distributions beats training on text because the distribution after a context X
holds more information than the token Y that follows X. A token drawn from the distribution,
Z' ~ P(. | X), gives this information about X if Y is known already:

    I(X; Z' | Y) = E_(x, y) KL( P(. | x) || Q_y ),   Q_y = E[ P(. | X) | Y = y ].

In nats, this is the mean distance of distributions from the centroid of all contexts that have the
same next token.
References: Yang et al. 2023, "Conditional Mutual Information Constrained Deep Learning for
Classification", arXiv:2309.09123.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import stats
from torch import Tensor

from azeotrope.logits.chunks import LOGITS_BUDGET, head_logits, token_chunks
from azeotrope.logits.divergences import finite_log

LEAST_TEXTS = 4
"""Two in each half; with fewer, drawing with replacement gives the same texts every time."""
DRAWS = 2000
"""Bootstrap samples of the interval."""


@dataclass(frozen=True)
class InformationEstimate:
    """Conditional mutual information of contexts and outputs given the next token, in nats."""

    value: float
    """With centroids from other texts: too high on average, because centroids are estimates."""
    ci95: tuple[float, float]
    """95 % interval: texts are drawn with replacement, centroids stay the same."""
    in_sample: float
    """With centroids from the same texts: too low on average, so the truth is between the two."""
    positions: int
    """Positions that the value is a mean of."""
    covered: float
    """Their share of all positions; at the others the next token is too rare for a centroid."""
    labels: int
    """Different next tokens at these positions."""
    texts: int


@torch.inference_mode()
def conditional_mutual_information(
    hidden: Float[Tensor, "tokens hidden"],
    weight: Float[Tensor, "vocab hidden"],
    targets: Int[Tensor, " targets"],
    texts: Int[Tensor, " texts"],
    bias: Float[Tensor, " vocab"] | None = None,
    *,
    least: int = 2,
    seed: int = 0,
    budget: int = LOGITS_BUDGET,
) -> InformationEstimate:
    """Estimate I(X; Z' | Y) on held-out text by cross-fitting.

    Texts are split at random into two halves. Each half's distributions are compared with the
    centroids of the other half, and the value is the mean over both,

        1/n sum_t KL( softmax(z_t) || Q_y(t) of the half without t ).

    Any Q in place of Q_y gives an upper bound in expectation, as long as it does not depend on the
    text that it is compared with. Positions of one text resemble each other, so the split is by
    text. Rare next tokens have coarse centroids: a larger `least` lowers the value and also the
    share of covered positions.

    Memory is O(budget) for any numbers of tokens and labels. The logits of every covered position
    are computed twice.

    Args:
        hidden: last hidden states, one for each predicted token.
        weight: the head's weight, without rows that pad the vocabulary.
        bias: the head's bias, cut in the same way.
        targets: the token that follows each position, which is Y.
        texts: for each position the number of its text. Several answers to one problem should
            count as one text.
        least: occurrences that a token needs in each half.
        seed: of the split and of the interval.

    Raises:
        ValueError: if lengths differ, a target is not in the vocabulary, there are fewer than four
            texts, no token occurs often enough in both halves, `least` is not positive, or a logit
            is not finite.
    """
    _check(hidden, weight, targets, texts, least)
    cells = _split(targets, texts, least, seed)
    divergence, pooled = _all_groups(_Head(hidden, weight, bias), cells, budget)
    if not torch.isfinite(divergence).all():
        raise ValueError("a logit is not finite; check the hidden states and the head")
    per_text, counts = _per_text(divergence, cells.text)
    n = len(cells.rows)
    return InformationEstimate(
        value=float(per_text.sum() / n),
        ci95=_interval(per_text, counts, seed),
        in_sample=pooled / n,
        positions=n,
        covered=n / len(targets),
        labels=cells.labels,
        texts=len(counts),
    )


class _Head(NamedTuple):
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None

    def log_p(self, rows: Tensor) -> Tensor:
        return head_logits(self.hidden[rows], self.weight, self.bias).log_softmax(-1)


class _Cells(NamedTuple):
    """The covered positions, sorted by cell: label 0's first half, its second half, label 1's..."""

    rows: Tensor
    cell: Tensor
    text: Tensor
    starts: Tensor
    labels: int


def _split(targets: Tensor, texts: Tensor, least: int, seed: int) -> _Cells:
    names, text = texts.unique(return_inverse=True)
    if len(names) < LEAST_TEXTS:
        raise ValueError(
            f"{LEAST_TEXTS} texts or more are needed, two in each half; got {len(names)}"
        )
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))
    half = torch.zeros(len(names), dtype=torch.long, device=texts.device)
    half[order[: len(names) // 2].to(texts.device)] = 1
    labels, label = targets.unique(return_inverse=True)
    counts = torch.bincount(2 * label + half[text], minlength=2 * len(labels)).view(-1, 2)
    frequent = (counts >= least).all(1)
    if not frequent.any():
        raise ValueError(
            f"none of the {len(labels)} next tokens occurs {least} times or more in each half of "
            f"the {len(names)} texts; give more texts, or lower `least`"
        )
    rows = frequent[label].nonzero().squeeze(1)
    number = frequent.cumsum(0) - 1
    cell, order = (2 * number[label[rows]] + half[text[rows]]).sort(stable=True)
    rows = rows[order]
    starts = torch.cat([counts.new_zeros(1), counts[frequent].flatten().cumsum(0)])
    return _Cells(rows, cell, text[rows], starts, int(frequent.sum()))


def _all_groups(head: _Head, cells: _Cells, budget: int) -> tuple[Tensor, float]:
    """KL of each covered position to the other half's centroid, and their sum to pooled ones."""
    # Half the budget is for centroids, of which a label has two, and half for a chunk's logits.
    per_group = max(budget // (4 * len(head.weight)), 1)
    divergence = torch.zeros(len(cells.rows), dtype=torch.float64, device=head.hidden.device)
    pooled = 0.0
    for first in range(0, cells.labels, per_group):
        last = min(first + per_group, cells.labels)
        start, stop = (int(cells.starts[2 * label]) for label in (first, last))
        group = slice(start, stop)
        terms, entropy = _group(
            head, cells.rows[group], cells.cell[group] - 2 * first, 2 * (last - first), budget // 2
        )
        divergence[group] = terms.divergence
        pooled += float(terms.negentropy.sum()) + entropy
    return divergence, pooled


class _PositionTerms(NamedTuple):
    """One value per position of a group, in nats."""

    divergence: Tensor
    negentropy: Tensor


def _group(
    head: _Head, rows: Tensor, cell: Tensor, cells: int, budget: int
) -> tuple[_PositionTerms, float]:
    """KL to the other half's centroid and sum p log p of each position, and n H of the labels."""
    vocab = len(head.weight)
    pieces = list(token_chunks(len(rows), vocab, budget))
    total = _log_sums(head, rows, cell, cells, pieces)
    counts = torch.bincount(cell, minlength=cells).to(total)
    centroids = total - counts.log().unsqueeze(1)
    negentropy, cross = [], []
    for piece in pieces:
        log_p = finite_log(head.log_p(rows[piece]))
        p = log_p.exp()
        negentropy.append((p * log_p).sum(-1))
        # Cells of one label are neighbours: the other half has the last bit flipped.
        cross.append((p * (log_p - centroids[cell[piece] ^ 1])).sum(-1))
    both = counts.view(-1, 2).sum(1)
    log_q = torch.logaddexp(total[0::2], total[1::2]) - both.log().unsqueeze(1)
    entropy = -(both * (log_q.exp() * log_q).sum(-1)).double().sum()
    return _PositionTerms(torch.cat(cross).double(), torch.cat(negentropy).double()), float(entropy)


def _log_sums(
    head: _Head, rows: Tensor, cell: Tensor, cells: int, pieces: list[slice]
) -> Float[Tensor, "cells vocab"]:
    """log sum_t p_t of each cell. It is computed in log space, so tiny sums are never zero."""
    vocab = len(head.weight)
    lowest = torch.finfo(torch.float32).min / 4
    peak = torch.full((cells, vocab), lowest, device=head.weight.device)
    total = torch.zeros_like(peak)
    # A running log-sum-exp over chunks: sums are relative to the greatest log-probability so far.
    for piece in pieces:
        log_p, index = finite_log(head.log_p(rows[piece])), cell[piece]
        higher = peak.scatter_reduce(0, index.unsqueeze(1).expand_as(log_p), log_p, "amax")
        total *= (peak - higher).exp()
        total.index_add_(0, index, (log_p - higher[index]).exp())
        peak = higher
    return peak + total.log()


def _per_text(divergence: Tensor, text: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of the covered positions of every text that has any."""
    counts = torch.bincount(text)
    sums = torch.zeros(len(counts), dtype=torch.float64, device=text.device)
    sums.index_add_(0, text, divergence)
    return sums[counts > 0].cpu().numpy(), counts[counts > 0].cpu().numpy()


def _interval(sums: np.ndarray, counts: np.ndarray, seed: int) -> tuple[float, float]:
    """95 % percentile interval of sum / count over texts drawn with replacement."""
    interval = stats.bootstrap(
        (sums, counts),
        lambda sums, counts, axis: sums.sum(axis) / counts.sum(axis),
        n_resamples=DRAWS,
        vectorized=True,
        paired=True,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, texts: Tensor, least: int) -> None:
    if not len(hidden) == len(targets) == len(texts) or len(hidden) == 0:
        raise ValueError(
            "hidden states, targets and texts must be of the same positions, at least one; got "
            f"{len(hidden)}, {len(targets)} and {len(texts)}"
        )
    if not 0 <= int(targets.min()) <= int(targets.max()) < len(weight):
        raise ValueError(
            f"targets must be in the head's vocabulary of {len(weight)}; got "
            f"{int(targets.min())} to {int(targets.max())}"
        )
    if least < 1:
        raise ValueError(f"least must be 1 or more, got {least}")
