"""Fold a map of low rank on the logits into the output head: the defense is then free to serve.

    z = W h + b,   z' = (I + B A) z = (W + B (A W)) h + (b + B (A b))

so W' = W + B (A W) and b' = b + B (A b) give z' for every h, and any engine serves them.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""What families call the cap on their final logits."""


def fold(
    weight: Float[Tensor, "vocab hidden"],
    bias: Float[Tensor, " vocab"] | None,
    up: Float[Tensor, "tokens rank"],
    down: Float[Tensor, "rank tokens"],
) -> tuple[Tensor, Tensor | None]:
    """The head that computes (I + B A) z, with B = `up` and A = `down`.

    Rows of the head beyond `tokens` pad it; they are neither read nor changed. The inner product is
    rank x hidden: vocabulary squared is never formed. The result has the head's dtype, and is
    computed in that of the factors.

    Raises:
        ValueError: if the factors have more tokens than the head has rows.
    """
    if len(up) > len(weight):
        raise ValueError(f"the factors have {len(up)} tokens, but the head has {len(weight)} rows")
    return _moved(weight, up, down), None if bias is None else _moved(bias, up, down)


def _moved(given: Tensor, up: Tensor, down: Tensor) -> Tensor:
    tokens = given[: len(up)].to(up.dtype)
    return torch.cat([(tokens + up @ (down @ tokens)).to(given.dtype), given[len(up) :]])


def check_foldable(model: PreTrainedModel) -> None:
    """Refuse models in which a changed head would not be a changed map of logits.

    A model without weights (on the meta device) is judged by its shapes and its configuration.

    Raises:
        ValueError: for a cap on the final logits, for a head that is missing or quantised, and for
            a model that scales what its head gives.
    """
    config = model.config.get_text_config()
    for name in _CAPS:
        if cap := getattr(config, name, None):
            raise ValueError(
                f"{type(model).__name__} squashes its final logits (cap * tanh(z / cap), cap "
                f"{cap:g}), so a matrix on the logits is no matrix on the head; it cannot be "
                f"folded. Set {name} to null in its config.json if the model can do without"
            )
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{type(model).__name__} has no output head to fold into")
    weight = getattr(head, "weight", None)
    quantised = any(getattr(c, "quantization_config", None) for c in (config, model.config))
    # Floats of one byte are quantised too.
    plain = isinstance(weight, Tensor) and weight.is_floating_point() and weight.itemsize > 1
    if not plain or (quantised and type(head) is not torch.nn.Linear):
        raise ValueError(
            f"the output head of {type(model).__name__} is quantised "
            f"({type(head).__name__}); fold into the unquantised checkpoint, then quantise that"
        )
    if model.device.type != "meta" and not _is_linear(model, weight, head.bias):  # type: ignore[arg-type]
        raise ValueError(
            f"{type(model).__name__} serves other logits than its head gives: it scales them "
            "afterwards, so a head would be trained for logits that nobody sees; fold the scale "
            "into the head's weights first"
        )


@torch.inference_mode()
def _is_linear(model: PreTrainedModel, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether some logits are the head's product with the last hidden states."""
    ids = torch.arange(min(len(weight), 8), device=model.device).unsqueeze(0)
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    wanted = F.linear(hidden, weight, bias).float()
    given = model(input_ids=ids, use_cache=False).logits.float()
    return bool((given - wanted).norm() <= 0.05 * wanted.norm())
