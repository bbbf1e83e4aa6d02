"""Output heads in token chunks: losses that never hold a tokens x vocabulary tensor.

A head is a weight of shape [vocab, hidden] and an optional bias. Hidden states are the trunk's
last ones, taken only where a token is to be predicted, so the prompt costs nothing here.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from azeotrope.logits.chunks import LOGITS_BUDGET
from azeotrope.logits.chunks import head_logits as logits
from azeotrope.logits.chunks import token_chunks as chunks
from azeotrope.tokens import Batch
from azeotrope.training import TokenSum


def hidden_states(model: PreTrainedModel, batch: Batch) -> Float[Tensor, "tokens hidden"]:
    """Last hidden states of the positions that predict a completion token, row by row."""
    trunk = model.base_model
    return trunk(input_ids=batch.input_ids, use_cache=False).last_hidden_state[batch.mask]


def cross_entropy(
    hidden: Float[Tensor, "tokens hidden"],
    weight: Float[Tensor, "vocab hidden"],
    targets: Int[Tensor, " tokens"],
    bias: Float[Tensor, " vocab"] | None = None,
    *,
    budget: int = LOGITS_BUDGET,
) -> TokenSum:
    """Negative log-likelihood in nats, summed over tokens: -sum_t log softmax(W h_t)[y_t].

    Each chunk's logits are computed again in the backward pass, so memory is
    O(chunk x vocab) whatever the number of tokens. Gradients reach `hidden` and `weight`.
    """

    def part(rows: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits(rows, weight, bias), labels, reduction="sum")

    parts = list(chunks(len(targets), len(weight), budget))
    if len(parts) == 1:
        return TokenSum(part(hidden, targets), len(targets))
    total = hidden.new_zeros((), dtype=torch.float32)
    for piece in parts:
        total = total + checkpoint(part, hidden[piece], targets[piece], use_reentrant=False)
    return TokenSum(total, len(targets))


def sequence_loss(model: PreTrainedModel, batch: Batch) -> TokenSum:
    """Cross-entropy of a whole model on the completion tokens of a batch."""
    hidden = hidden_states(model, batch)
    head = model.get_output_embeddings()
    return cross_entropy(hidden, head.weight, batch.targets[batch.mask], head.bias)  # type: ignore[union-attr, arg-type]
