"""Losses of an output head in token chunks: no tokens x vocabulary tensor ever exists.

A head is a weight of shape [vocab, hidden] and an optional bias. Hidden states are the trunk's
last ones, taken only where a completion token is predicted, so the prompt adds no logits.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from azeotrope.logits.chunks import LOGITS_BUDGET, head_logits, token_chunks
from azeotrope.logits.served import logit_cap, scaled
from azeotrope.tokens import Batch
from azeotrope.training import TokenSum


def hidden_states(model: PreTrainedModel, batch: Batch) -> Float[Tensor, "tokens hidden"]:
    """Last hidden states of the positions that predict a completion token, row by row.

    They are multiplied by the model's logit scale, so that its head alone gives its logits.
    """
    trunk = model.base_model
    states = trunk(input_ids=batch.input_ids, use_cache=False).last_hidden_state[batch.mask]
    return scaled(model, states)


def cross_entropy(
    hidden: Float[Tensor, "tokens hidden"],
    weight: Float[Tensor, "vocab hidden"],
    targets: Int[Tensor, " tokens"],
    bias: Float[Tensor, " vocab"] | None = None,
    *,
    cap: float | None = None,
    budget: int = LOGITS_BUDGET,
) -> TokenSum:
    """Negative log-likelihood in nats, summed over tokens: -sum_t log softmax(W h_t)[y_t].

    Memory is O(chunk x vocab) for any number of tokens. Gradients reach `hidden`, `weight` and
    `bias`.
    """

    def part(rows: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(head_logits(rows, weight, bias, cap=cap), labels, reduction="sum")

    slices = list(token_chunks(len(targets), len(weight), budget))
    if len(slices) == 1:
        return TokenSum(part(hidden, targets), len(targets))
    total = hidden.new_zeros((), dtype=torch.float32)
    for chunk in slices:
        # The backward pass computes a chunk's logits again instead of keeping those of all chunks.
        total = total + checkpoint(part, hidden[chunk], targets[chunk], use_reentrant=False)
    return TokenSum(total, len(targets))


def sequence_loss(model: PreTrainedModel, batch: Batch) -> TokenSum:
    """Cross-entropy of a whole model, as it serves, on the completion tokens of a batch."""
    hidden = hidden_states(model, batch)
    head = model.get_output_embeddings()
    targets, cap = batch.targets[batch.mask], logit_cap(model)
    return cross_entropy(hidden, head.weight, targets, head.bias, cap=cap)  # type: ignore[union-attr, arg-type]
