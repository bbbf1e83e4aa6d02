"""Fold a map of low rank on the logits into the output head: the defense is then free to serve.

    z = W h + b,   z' = (I + B A) z = (W + B (A W)) h + (b + B (A b))

so W' = W + B (A W) and b' = b + B (A b) give z' for every h, and any engine serves them.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel


def fold(
    weight: Float[Tensor, "vocab hidden"],
    bias: Float[Tensor, " vocab"] | None,
    up: Float[Tensor, "tokens rank"],
    down: Float[Tensor, "rank tokens"],
) -> tuple[Tensor, Tensor | None]:
    """The head that computes (I + B A) z, with B = `up` and A = `down`.

    Rows of the head beyond `tokens` pad it; they are neither read nor changed. The product is
    rank x hidden wide at most: vocabulary squared is never formed.
    """
    tokens = len(up)
    folded = weight.clone()
    folded[:tokens] += up @ (down @ weight[:tokens])
    if bias is None:
        return folded, None
    shifted = bias.clone()
    shifted[:tokens] += up @ (down @ bias[:tokens])
    return folded, shifted


def check_foldable(model: PreTrainedModel) -> None:
    """Refuse models in which a changed head would not be a changed map of logits.

    Raises:
        ValueError: for a cap on the final logits, and for a head that is not a floating-point
            matrix.
    """
    config = model.config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None)
    if cap:
        raise ValueError(
            f"{type(model).__name__} squashes its final logits (cap * tanh(z / cap), cap {cap:g}), "
            "so a matrix on the logits is no matrix on the head; it cannot be folded. Set "
            "final_logit_softcapping to null in its config.json if the model can do without"
        )
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    quantised = getattr(config, "quantization_config", None) is not None
    plain = isinstance(weight, Tensor) and weight.is_floating_point() and weight.dim() == 2
    if not plain or (quantised and not type(head) is torch.nn.Linear):
        raise ValueError(
            f"the output head of {type(model).__name__} is quantised "
            f"({type(head).__name__}); fold into the unquantised checkpoint, then quantise that"
        )
