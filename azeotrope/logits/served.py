"""From last hidden states to the logits that a model serves: some families scale or cap them.

    z = cap tanh( scale (W h + b) / cap )

Cohere, Granite and Falcon-H1 scale, Gemma 2 caps, most families do neither. A student that is
trained on W h + b alone would learn another distribution than the one it is examined with.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

FACTORS = ("logit_scale", "lm_head_multiplier")
"""Names of configuration values that multiply logits."""
DIVISORS = ("logits_scaling",)
"""Names of configuration values that divide logits."""
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Names that model families give to the cap on their final logits."""
TOLERANCE = 1e-3
"""Greatest relative difference between a model's logits and ours in float32."""
LOW_PRECISION = 0.02
"""The same in 16 bits."""


def logit_scale(model: PreTrainedModel) -> float:
    """The number by which a model multiplies what its head gives; 1 in most families."""
    config, scale = model.config.get_text_config(), 1.0
    for name in FACTORS:
        scale *= getattr(config, name, None) or 1.0
    for name in DIVISORS:
        scale /= getattr(config, name, None) or 1.0
    return float(scale)


def logit_cap(model: PreTrainedModel) -> float | None:
    """The bound of a model's final logits; None in most families."""
    config = model.config.get_text_config()
    caps = [getattr(config, name, None) for name in CAPS]
    return next((float(cap) for cap in caps if cap), None)


def scaled(model: PreTrainedModel, states: Float[Tensor, "... hidden"]) -> Tensor:
    """Last hidden states times the model's scale, so that the head alone gives its logits."""
    scale = logit_scale(model)
    return states if scale == 1 else states * scale


def capped(logits: Float[Tensor, "... vocab"], cap: float | None) -> Float[Tensor, "... vocab"]:
    """cap tanh(z / cap), or the logits themselves without a cap."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


def check_uncapped(model: PreTrainedModel, role: str) -> None:
    """Refuse a model whose logits are no linear map of its head, where a defense needs that.

    Args:
        role: what the model is used as, for the error.

    Raises:
        ValueError: if the model caps its final logits.
    """
    cap = logit_cap(model)
    if cap is not None:
        raise ValueError(
            f"{type(model).__name__} caps its final logits at {cap:g} (cap * tanh(z / cap)), so it "
            f"cannot be a {role} where logits are computed from the head: what it serves is no "
            "linear map of the head. Take a model without a cap, or set "
            f"{', '.join(CAPS)} to null in its config.json if it can do without"
        )


def check_trunk(model: PreTrainedModel) -> None:
    """Refuse a model that does not show its last hidden states; its weights are not needed.

    Raises:
        ValueError: if the model has no trunk apart from its head.
    """
    if model.base_model is model:
        raise ValueError(
            f"{type(model).__name__} has no trunk apart from its head (`base_model`), so its last "
            "hidden states cannot be read; take a model of another family"
        )


@torch.inference_mode()
def check_served(model: PreTrainedModel) -> None:
    """Compare a model's own logits with those that training and attacks compute from its head.

    Raises:
        ValueError: if they differ: the model changes its logits in a way that is not known here.
    """
    check_trunk(model)
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{type(model).__name__} has no output head, so it writes no text")
    ids = torch.arange(min(len(head.weight), 8), device=model.device).unsqueeze(0)  # type: ignore[arg-type]
    states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    ours = F.linear(scaled(model, states), head.weight, head.bias).float()  # type: ignore[arg-type]
    ours = capped(ours, logit_cap(model))
    theirs = model(input_ids=ids, use_cache=False).logits.float()
    exact = model.dtype in (torch.float32, torch.float64)
    # Written so that NaN does not pass.
    if not (theirs - ours).norm() <= (TOLERANCE if exact else LOW_PRECISION) * theirs.norm():
        raise ValueError(
            f"{type(model).__name__} serves other logits than its head, its scale "
            f"({', '.join(FACTORS + DIVISORS)}) and its cap give; it would be trained for a "
            "distribution that it never serves. Take a model of another family"
        )
