"""Fold a map of low rank on the logits into the output head, so that serving it costs nothing.

    z = W h + b,   z' = (I + B A) z = (W + B (A W)) h + (b + B (A b))

so W' = W + B (A W) and b' = b + B (A b) give z' for every h, and any engine can serve them.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from azeotrope.logits.served import CAPS, check_served


def fold(
    weight: Float[Tensor, "vocab hidden"],
    bias: Float[Tensor, " vocab"] | None,
    up: Float[Tensor, "tokens rank"],
    down: Float[Tensor, "rank tokens"],
) -> tuple[Tensor, Tensor | None]:
    """The head that computes (I + B A) z, with B = `up` and A = `down`.

    Rows of the head beyond `tokens` pad it; they are neither read nor changed. The result has the
    head's dtype, and is computed in that of the factors.

    Raises:
        ValueError: if the factors have more tokens than the head has rows.
    """
    if len(up) > len(weight):
        raise ValueError(f"the factors have {len(up)} tokens, but the head has {len(weight)} rows")
    return _moved(weight, up, down), None if bias is None else _moved(bias, up, down)


def _moved(rows: Tensor, up: Tensor, down: Tensor) -> Tensor:
    tokens = rows[: len(up)].to(up.dtype)
    # B (A W): the inner product is rank x hidden, and B A, vocabulary squared, never exists.
    return torch.cat([(tokens + up @ (down @ tokens)).to(rows.dtype), rows[len(up) :]])


def check_foldable(model: PreTrainedModel) -> None:
    """Refuse models whose logits are not a linear map of the head's weights.

    A model without weights (on the meta device) is judged by its shapes and its configuration.

    Raises:
        ValueError: if the model caps its final logits, has no head or a quantised one, or changes
            its logits in a way that is not known here.
    """
    config = model.config.get_text_config()
    for name in CAPS:
        if cap := getattr(config, name, None):
            raise ValueError(
                f"{type(model).__name__} squashes its final logits (cap * tanh(z / cap), cap "
                f"{cap:g}), so a matrix on the logits is no matrix on the head; it cannot be "
                f"folded. Set {name} to null in its config.json if the model can do without the cap"
            )
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{type(model).__name__} has no output head to fold into")
    weight = getattr(head, "weight", None)
    quantised = any(getattr(c, "quantization_config", None) for c in (config, model.config))
    # One-byte floats (FP8) are quantised weights too: their values mean nothing without a scale.
    plain = isinstance(weight, Tensor) and weight.is_floating_point() and weight.itemsize > 1
    if not plain or (quantised and type(head) is not torch.nn.Linear):
        raise ValueError(
            f"the output head of {type(model).__name__} is quantised "
            f"({type(head).__name__}); fold into the unquantised checkpoint, then quantise that"
        )
    if model.device.type != "meta":
        check_served(model)
