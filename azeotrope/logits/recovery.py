"""Read the logits of chosen tokens off an API that shows top-k log-probabilities under a bias.

k tokens with the same large bias are the k that the API shows, and the differences of their
log-probabilities are differences of logits,

    log p_i - log p_r = (z_i + bias) - (z_r + bias) = z_i - z_r.

One query gives k - 1 differences. See `subspace` for what they reveal, and for the references.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from azeotrope.logits.oracle import Oracle, RefusedError

BIAS = 100.0
"""The greatest bias that common APIs accept."""
TOKENS = 1024
"""Tokens to read if the vocabulary is larger; they must outnumber the hidden size."""


def sample_tokens(vocab: int, count: int = TOKENS, *, seed: int = 0) -> list[int]:
    """Token ids to read: all of a small vocabulary, a random part of a large one.

    Raises:
        ValueError: if fewer than two tokens are requested, or the vocabulary has fewer.
    """
    if min(vocab, count) < 2:
        raise ValueError(f"two tokens or more are needed, got vocab {vocab} and count {count}")
    drawn = torch.randperm(vocab, generator=torch.Generator().manual_seed(seed))
    return sorted(drawn[:count].tolist())


def random_prompts(
    vocab: int, count: int, *, length: int = 12, seed: int = 0
) -> list[tuple[int, ...]]:
    """Different prompts of random tokens, whose hidden states span the whole space.

    Raises:
        ValueError: if there are not that many prompts of that length.
    """
    if min(vocab, count, length) < 1 or vocab**length < count:
        raise ValueError(
            f"there are no {count} different prompts of {length} tokens out of {vocab}; "
            "make them longer"
        )
    generator = torch.Generator().manual_seed(seed)
    # A dictionary keeps the order of insertion, so the same seed gives the same list.
    prompts: dict[tuple[int, ...], None] = {}
    while len(prompts) < count:
        rows = torch.randint(vocab, (count - len(prompts), length), generator=generator)
        prompts.update(dict.fromkeys(tuple(row) for row in rows.tolist()))
    return list(prompts)


def recover_logits(
    oracle: Oracle,
    prompt: Sequence[int],
    tokens: Sequence[int],
    *,
    bias: float = BIAS,
    top_k: int | None = None,
    repeats: int = 1,
    seed: int = 0,
) -> Float[Tensor, " tokens"]:
    """Logits of the tokens after a prompt, relative to that of the first: z_i - z_0, in float64.

    A repeat takes ceil((tokens - 1) / (top_k - 1)) queries.

    Args:
        bias: added to the logits of the queried tokens. It must lift them above all others.
        top_k: log-probabilities per answer; if None, one query without a bias counts them.
        repeats: times to query and average. From two on, the biases are dithered: they are lowered
            by a random part of 1 and by the logits known so far, and both are subtracted from the
            answers. The error of rounded log-probabilities then falls with the square root of the
            repeats.

    Raises:
        RefusedError: if the API refuses, shows a single token per query, or does not show a token
            that was biased.
        ValueError: if there are fewer than two tokens or one is repeated, the prompt is empty, or
            bias or repeats are not positive.
    """
    check_request(tokens, bias, repeats)
    if not prompt:
        raise ValueError("the prompt is empty; give at least one token id")
    if top_k is None:
        top_k = len(oracle.query(prompt, {}))
    if top_k < 2:
        raise RefusedError(
            f"the API shows {top_k} log-probabilities per query; differences need at least 2"
        )
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(len(tokens), dtype=torch.float64)
    for turn in range(repeats):
        # The error of the reference is shared by its query. A new grouping in each turn spreads it
        # over all tokens.
        order = 1 + torch.randperm(len(tokens) - 1, generator=generator)
        for part in order.split(top_k - 1):
            queried = [tokens[index] for index in (0, *part.tolist())]
            biases = torch.full((len(queried),), bias, dtype=torch.float64)
            if repeats > 1:
                # A token with nearly all of the probability rounds to 0 every time. Subtracting the
                # estimates makes the queried tokens about equally likely.
                estimate = torch.cat([total[:1], total[part]]) / max(turn, 1)
                biases -= estimate - estimate.min()
                biases -= torch.rand(len(queried), dtype=torch.float64, generator=generator)
            total[part] += _differences(oracle, prompt, queried, biases, bias)
    return total / repeats


def check_request(tokens: Sequence[int], bias: float, repeats: int) -> None:
    """Refuse tokens, a bias or repeats with which no logit can be read.

    Raises:
        ValueError: if there are fewer than two tokens or one is repeated, or bias or repeats are
            not positive.
    """
    if len(tokens) < 2 or len(set(tokens)) < len(tokens):
        raise ValueError(
            f"two different tokens or more are needed, each once; got {len(tokens)} of which "
            f"{len(set(tokens))} differ"
        )
    if not (bias > 0 and math.isfinite(bias)):
        raise ValueError(f"the bias must be a positive number, got {bias}")
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")


def _differences(
    oracle: Oracle, prompt: Sequence[int], queried: list[int], biases: Tensor, bias: float
) -> Tensor:
    """Logits of all queried tokens but the first, relative to it, from one answer."""
    answer = dict(oracle.query(prompt, dict(zip(queried, biases.tolist(), strict=True))))
    values = [_read(answer, token, bias) for token in queried]
    logits = torch.tensor(values, dtype=torch.float64) - biases
    return logits[1:] - logits[0]


def _read(answer: Mapping[int, float], token: int, bias: float) -> float:
    value = answer.get(token, -math.inf)
    if not math.isfinite(value):
        raise RefusedError(
            f"the API does not show token {token} under a bias of {bias:g}: it hides what a bias "
            "does, or a greater one is needed"
        )
    return value
