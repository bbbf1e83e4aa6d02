"""Read a model's hidden size, and the subspace of its outputs, off its API.

All logits are z = W h + b with W of shape [vocab, hidden], so those of any number of prompts lie in
an affine space of `hidden` dimensions. `recovery` reads them off an API that shows top-k
log-probabilities under a logit bias.

They reveal the space of W up to a constant on all logits, which the softmax forgets. Rows are
centred over tokens for that reason, and over prompts to remove b. The remaining rank is

- `hidden` after an RMSNorm, whether the head has a bias or not (without centring over prompts a
  head with a bias would show one more);
- `hidden` - 1 after a LayerNorm, with a bias of its own or without: its outputs have a fixed mean;
- one less than that if some direction of the hidden states moves all logits alike, which a trained
  head does not have by chance;
- never more than the smaller of prompts - 1 and tokens - 1. At that value it is only a lower bound
  of the hidden size.

A matrix on the logits, folded into the head, is a change of W: it moves the subspace and keeps its
dimension.

References: Carlini et al. 2024, "Stealing Part of a Production Language Model", arXiv:2403.06634;
Finlayson et al. 2024, "Logits of API-Protected LLMs Leak Proprietary Information",
arXiv:2403.09539.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from azeotrope.logits.oracle import Oracle, RefusedError, TopLogprobs
from azeotrope.logits.recovery import BIAS, check_request, recover_logits

CLEAR_GAP = 10.0
"""A ratio that neighbouring singular values of random matrices rarely reach."""
NOISE_GAP = 3.0
"""The same ratio if rounding explains the lower of the two values."""
FINEST_DECIMALS = 6
"""Log-probabilities with more decimals than this count as exact in float32."""


@dataclass(frozen=True)
class Subspace:
    """What an attacker has learnt about a head, and what it cost."""

    hidden_size: int | None
    """The rank; a lower bound of it if `saturated`; None if nothing was learnt."""
    saturated: bool
    """Whether the singular values show no end of the subspace.

    Then there are too few prompts or tokens, or the hidden size is vocabulary - 1 or more, or the
    log-probabilities are too coarse.
    """
    gap: float
    """Ratio of the last singular value of the subspace to the next; 1 without an end."""
    singular_values: Float[Tensor, " rank"]
    """Those of the centred logits, largest first, without the two that centring makes zero."""
    basis: Float[Tensor, "hidden tokens"]
    """Orthonormal rows that span the logits of `tokens`, up to a constant on all of them."""
    tokens: tuple[int, ...]
    prompts: int
    """Prompts of which all tokens were read."""
    queries: int
    """Queries that were sent, the refused one included."""
    refused: str | None = None
    """Why the API stopped answering, if it did."""

    @property
    def label(self) -> str:
        """The hidden size as tables show it: `96`, `>= 128`, or `nothing`."""
        if self.hidden_size is None:
            return "nothing"
        return f">= {self.hidden_size}" if self.saturated else str(self.hidden_size)


def recover_subspace(
    oracle: Oracle,
    prompts: Sequence[Sequence[int]],
    tokens: Sequence[int],
    *,
    bias: float = BIAS,
    repeats: int = 1,
    seed: int = 0,
) -> Subspace:
    """Recover the logits of many prompts, and the dimension of the space that they lie in.

    The dimension is at the largest ratio of neighbouring singular values, if that ratio is at
    least 10, or at least 3 where the rounding seen in the answers explains the lower value. Without
    such a gap, the values above what float32 and rounding explain are counted, which gives a lower
    bound. It rests on the shown digits: if the engine computed logits in bfloat16, no answer
    reveals that error, and the bound can be too high.

    A refusal is a result: the logits that were read before it are used, and the reason is kept.

    Args:
        prompts: different ones, at least two more than the hidden size; see `random_prompts`.
        tokens: ids to read, at least two more than the hidden size; see `sample_tokens`.
        bias: see `recover_logits`.
        repeats: see `recover_logits`.

    Raises:
        ValueError: if there are fewer than two prompts or tokens, one is repeated or empty, or
            bias or repeats are not positive.
    """
    check_request(tokens, bias, repeats)
    _check_prompts(prompts)
    counted = _CountingOracle(oracle)
    rows: list[Tensor] = []
    refused, top_k = None, 2
    try:
        top_k = len(counted.query(prompts[0], {}))
        for number, prompt in enumerate(prompts):
            row = recover_logits(
                counted, prompt, tokens, bias=bias, top_k=top_k, repeats=repeats, seed=seed + number
            )
            rows.append(row)
    except RefusedError as error:
        refused = str(error)
    noise = _Noise(top_k, bias, counted.rounding / math.sqrt(repeats))
    size, saturated, gap, values, basis = _dimension(rows, len(tokens), noise)
    return Subspace(
        hidden_size=size,
        saturated=saturated,
        gap=gap,
        singular_values=values,
        basis=basis,
        tokens=tuple(tokens),
        prompts=len(rows),
        queries=counted.queries,
        refused=refused,
    )


class _CountingOracle:
    """An oracle that counts its queries, and the decimals of its answers."""

    def __init__(self, oracle: Oracle) -> None:
        self.oracle, self.queries, self.decimals = oracle, 0, 0

    def query(self, prompt_ids: Sequence[int], logit_bias: Mapping[int, float]) -> TopLogprobs:
        self.queries += 1
        answer = self.oracle.query(prompt_ids, logit_bias)
        while self.decimals < FINEST_DECIMALS and any(
            abs(scaled - round(scaled)) > 1e-3
            for scaled in (value * 10**self.decimals for _, value in answer if math.isfinite(value))
        ):
            self.decimals += 1
        return answer

    @property
    def rounding(self) -> float:
        """Standard deviation of the error of one log-probability.

        An error that is uniform over a width w has the deviation w / sqrt(12).
        """
        return 10.0**-self.decimals / math.sqrt(12)


@dataclass(frozen=True)
class _Noise:
    """What limits the precision of recovered logits."""

    top_k: int
    bias: float
    rounding: float
    """Standard deviation of a recovered log-probability's error, in nats."""

    def bound(self, logits: Tensor) -> float:
        """A bound on the singular values that errors alone would have.

        The largest singular value of a matrix of independent errors of deviation u is about
        u (sqrt(rows) + sqrt(columns)). All tokens of a query share the error of its reference. This
        adds a second such matrix with one column per query, each repeated `top_k` - 1 times.
        """
        rows, columns = logits.shape
        # Engines add the bias in float32.
        float32 = torch.finfo(torch.float32).eps * (self.bias + float(logits.abs().max()))
        partners = self.top_k - 1
        queries = math.ceil((columns - 1) / partners)
        own = math.sqrt(rows) + math.sqrt(columns)
        shared = math.sqrt(partners) * (math.sqrt(rows) + math.sqrt(queries))
        return max(float32, self.rounding) * (own + shared)


def _dimension(
    rows: list[Tensor], tokens: int, noise: _Noise
) -> tuple[int | None, bool, float, Tensor, Tensor]:
    """Hidden size, whether it is only a bound, the gap, the singular values and the basis."""
    if len(rows) < 2:
        return None, False, 1.0, torch.zeros(0), torch.zeros(0, tokens)
    logits = torch.stack(rows)
    values, directions = _spectrum(logits)
    floor = noise.bound(logits)
    size, gap = _end(values, floor)
    saturated = size is None
    if size is None:
        size = int((values > floor).sum())
    return size, saturated, gap, values, directions[:size]


def _spectrum(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values and directions of the logits, centred over tokens and over prompts."""
    centred = logits - logits.mean(1, keepdim=True)
    _, values, directions = torch.linalg.svd(centred - centred.mean(0), full_matrices=False)
    # Either centring makes one value zero, whatever the model is.
    rank = min(logits.shape) - 1
    return values[:rank], directions[:rank]


def _end(values: Tensor, floor: float) -> tuple[int | None, float]:
    """How many singular values come before the clear gap, and its ratio; None without one."""
    if len(values) < 2:
        return None, 1.0
    tiny = torch.finfo(values.dtype).tiny
    ratios = values[:-1] / values[1:].clamp(min=tiny)
    needed = torch.where(values[1:] <= floor, NOISE_GAP, CLEAR_GAP)
    clear = (values[:-1] > floor) & (ratios >= needed)
    if not clear.any():
        return None, 1.0
    last = int(ratios.where(clear, 0.0).argmax())
    return last + 1, float(ratios[last])


def _check_prompts(prompts: Sequence[Sequence[int]]) -> None:
    if len(prompts) < 2 or not all(prompts):
        raise ValueError(f"two prompts or more are needed, none of them empty; got {len(prompts)}")
    if len({tuple(prompt) for prompt in prompts}) < len(prompts):
        raise ValueError("a prompt is there twice; equal prompts would look like a small subspace")
