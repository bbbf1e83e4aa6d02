"""Logits of an output head, in chunks of tokens that fit a memory budget.

A head is a weight of shape [vocab, hidden] and an optional bias.
"""

from collections.abc import Iterator

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from azeotrope.logits.served import capped

LOGITS_BUDGET = 1 << 25
"""Greatest number of logits that exist at once: 128 MB in float32."""


def token_chunks(tokens: int, vocab: int, budget: int = LOGITS_BUDGET) -> Iterator[slice]:
    """Consecutive slices of the tokens whose logits stay within the budget.

    A slice holds at least one token, even where a single token's logits exceed the budget.
    """
    size = max(budget // vocab, 1)
    for start in range(0, tokens, size):
        yield slice(start, min(start + size, tokens))


def head_logits(
    hidden: Float[Tensor, "tokens hidden"],
    weight: Float[Tensor, "vocab hidden"],
    bias: Float[Tensor, " vocab"] | None = None,
    *,
    cap: float | None = None,
) -> Float[Tensor, "tokens vocab"]:
    """Float32 logits of one chunk, capped if the model caps them (`logits.served`).

    The product is taken in the dtype of the arguments, and only its result is converted: this is
    what the model computes when it serves.
    """
    return capped(F.linear(hidden, weight, bias).float(), cap)
