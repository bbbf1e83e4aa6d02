"""The direction in which a proxy's loss on clean traces grows fastest."""

from collections.abc import Sequence

import torch
from torch import Tensor

from azeotrope.heads.chunked import sequence_loss
from azeotrope.models import Loaded
from azeotrope.proxies.perturbed import length_of
from azeotrope.tokens import Example, collate


def downstream_gradient(
    proxy: Loaded, examples: Sequence[Example], *, batch_size: int = 16
) -> tuple[dict[str, Tensor], float, float]:
    """The gradient of the loss on held-out clean traces, with respect to all parameters.

        g = grad l / |grad l|,    l = mean negative log-likelihood of the completions' tokens

    The mean is over tokens and g has length 1, so that neither the number of traces nor the number
    of devices changes what a strength means.

    Returns:
        The direction in float32, the loss in nats per token, and the length of the gradient.

    Raises:
        ValueError: if there are no examples.
        ArithmeticError: if the gradient is zero or not finite.
    """
    if not examples:
        raise ValueError("no trace is left to take the downstream gradient on")
    model = proxy.model
    model.requires_grad_(True)
    model.zero_grad(set_to_none=True)
    pad = int(proxy.tokenizer.pad_token_id)  # type: ignore[arg-type]
    total, tokens = 0.0, 0
    for start in range(0, len(examples), batch_size):
        batch = collate(examples[start : start + batch_size], pad).to(proxy.device)
        part = sequence_loss(model, batch)
        part.total.backward()
        total, tokens = total + float(part.total.detach()), tokens + part.count
    gradient = {
        name: torch.zeros_like(weight) if weight.grad is None else weight.grad.detach().clone()
        for name, weight in model.named_parameters()
    }
    model.zero_grad(set_to_none=True)
    model.requires_grad_(False)
    length = length_of(gradient)
    if not 0 < length < float("inf"):
        raise ArithmeticError(
            f"the gradient of the proxy's loss has length {length}; look at the proxy's weights"
        )
    direction = {name: tensor.float().div_(length) for name, tensor in gradient.items()}
    return direction, total / tokens, length / tokens


@torch.no_grad()
def mean_loss(loaded: Loaded, examples: Sequence[Example], *, batch_size: int = 16) -> float:
    """Nats per token of the completions."""
    pad = int(loaded.tokenizer.pad_token_id)  # type: ignore[arg-type]
    total, tokens = 0.0, 0
    for start in range(0, len(examples), batch_size):
        batch = collate(examples[start : start + batch_size], pad).to(loaded.device)
        part = sequence_loss(loaded.model, batch)
        total, tokens = total + float(part.total), tokens + part.count
    return total / tokens
