"""How the logits of a proxy change when its weights move along a direction.

    delta(x) = [ z(x; w + e g) - z(x; w - e g) ] / (2 e)

is the central difference for the derivative of the logits z along g, with an error of order e^2.
Log-probabilities instead of logits would differ by one number for all tokens of a context, which
changes no distribution. Both moved copies are read in one batched forward pass.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import functional_call, jvp, vmap
from transformers import DynamicCache, PreTrainedModel

Weights = Mapping[str, Tensor]
"""Tensors by the names of `named_parameters`."""
EPSILONS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
"""Steps that are tried if none is asked for; directions have length 1."""
TOLERANCE = 0.02
"""Greatest relative error of the central difference."""


@dataclass(frozen=True)
class Context:
    """A text, and the positions after which the next token's logits are compared."""

    ids: tuple[int, ...]
    positions: tuple[int, ...]


class PerturbedPair:
    """Two copies of a proxy, moved apart along a direction; calling it gives delta.

    Args:
        model: in float32; half precision would round the moves away. It is set to eager attention,
            because other kinds cannot be batched over weights.
        direction: one tensor for every parameter, together of length 1.
        tokens: rows of the vocabulary that belong to tokens; rows that pad the head are left out.

    Raises:
        ValueError: if the model is not in float32, or the direction belongs to another model.
    """

    def __init__(
        self, model: PreTrainedModel, direction: Weights, epsilon: float, tokens: int
    ) -> None:
        check_direction(model, direction)
        model.set_attn_implementation("eager")
        self.model, self.epsilon, self.tokens = model, epsilon, tokens
        with torch.no_grad():
            self._weights = {
                name: torch.stack([weight, weight]).add_(
                    torch.stack([direction[name], -direction[name]]), alpha=epsilon
                )
                for name, weight in model.named_parameters()
            }

    @torch.no_grad()
    def __call__(self, inputs: dict[str, Any]) -> Float[Tensor, "rows tokens"]:
        """Delta after each row's last token; the key-value cache among the inputs is appended to.

        The cache holds both copies side by side, as twice the number of heads.
        """
        cache: DynamicCache = inputs["past_key_values"]
        fresh = inputs["input_ids"].shape[1]
        past = [(_apart(layer.keys), _apart(layer.values)) for layer in cache.layers]
        fixed = {name: value for name, value in inputs.items() if name != "past_key_values"}

        def read(weights: Weights, past: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, list]:
            own = DynamicCache(past) if past else DynamicCache()
            arguments = {**fixed, "past_key_values": own, "logits_to_keep": 1}
            logits = functional_call(self.model, dict(weights), kwargs=arguments).logits[:, -1]
            ends = [(layer.keys, layer.values) for layer in own.layers]
            return logits, [(keys[:, :, -fresh:], values[:, :, -fresh:]) for keys, values in ends]  # type: ignore[index]

        logits, states = vmap(read, in_dims=(0, 1), out_dims=(0, 1))(self._weights, past)
        for number, (keys, values) in enumerate(states):
            cache.update(keys.flatten(1, 2), values.flatten(1, 2), number)
        return self._difference(logits)

    @torch.no_grad()
    def at(self, context: Context) -> Float[Tensor, "positions tokens"]:
        """Delta at several positions of one text, without a cache."""
        fixed = _whole(self.model, context)

        def read(weights: Weights) -> Tensor:
            return functional_call(self.model, dict(weights), kwargs=fixed).logits[0]

        return self._difference(vmap(read)(self._weights))

    def _difference(self, logits: Float[Tensor, "two rows vocab"]) -> Tensor:
        logits = logits[..., : self.tokens].float()
        return _centred((logits[0] - logits[1]) / (2 * self.epsilon))


def exact_change(
    model: PreTrainedModel, direction: Weights, context: Context, tokens: int
) -> Float[Tensor, "positions tokens"]:
    """The derivative of the logits along the direction, by forward-mode differentiation."""
    model.set_attn_implementation("eager")
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    fixed = _whole(model, context)

    def read(moved: dict[str, Tensor]) -> Tensor:
        return functional_call(model, moved, kwargs=fixed).logits[0]

    change = jvp(read, (weights,), ({name: direction[name] for name in weights},))[1]
    return _centred(change.detach()[:, :tokens].float())


def relative_errors(
    model: PreTrainedModel,
    direction: Weights,
    contexts: Sequence[Context],
    tokens: int,
    epsilons: Sequence[float] = EPSILONS,
) -> dict[float, float]:
    """|delta - derivative| / |derivative| over all contexts, for each step."""
    exact = [exact_change(model, direction, context, tokens) for context in contexts]
    scale = sum(float(change.square().sum()) for change in exact) ** 0.5
    errors: dict[float, float] = {}
    for epsilon in epsilons:
        pair = PerturbedPair(model, direction, epsilon, tokens)
        squared = [
            float((pair.at(context) - change).square().sum())
            for context, change in zip(contexts, exact, strict=True)
        ]
        errors[epsilon] = sum(squared) ** 0.5 / max(scale, 1e-30)
    return errors


def choose_epsilon(
    errors: Mapping[float, float], wanted: float | None, tolerance: float = TOLERANCE
) -> float:
    """The step that is asked for, or the largest one within half of the tolerance.

    Rounding errors of the logits are divided by the step. A large step keeps them small, so that
    engines whose batches differ write the same tokens.

    Args:
        errors: relative errors by step, with that of `wanted`.

    Raises:
        ValueError: if the error of that step is above the tolerance; the message names the best.
    """
    best = min(errors, key=lambda epsilon: errors[epsilon])
    accurate = [epsilon for epsilon, error in errors.items() if error <= tolerance / 2]
    epsilon = max(accurate, default=best) if wanted is None else wanted
    # Written so that NaN does not pass.
    if not errors[epsilon] <= tolerance:
        raise ValueError(
            f"epsilon {epsilon:g}: the finite difference is {errors[epsilon]:.2g} away from the "
            f"exact derivative, relative to its size, and {tolerance:g} is allowed; the best step "
            f"found is epsilon {best:g} with {errors[best]:.2g}"
        )
    return epsilon


def check_direction(model: PreTrainedModel, direction: Weights) -> None:
    """Refuse a direction that does not belong to a model.

    Raises:
        ValueError: if the model is not in float32, or names, shapes or the length do not fit.
    """
    parameters = dict(model.named_parameters())
    if any(weight.dtype != torch.float32 for weight in parameters.values()):
        raise ValueError(
            "a perturbed proxy must be in float32; half precision rounds the moves away"
        )
    shapes = {name: weight.shape for name, weight in parameters.items()}
    if shapes != {name: tensor.shape for name, tensor in direction.items()}:
        raise ValueError("the direction belongs to another model: names or shapes differ")
    length = length_of(direction)
    if not abs(length - 1) < 1e-3:
        raise ValueError(f"the direction must have length 1 over all tensors, and has {length:g}")


def length_of(direction: Weights) -> float:
    """The Euclidean norm over all tensors."""
    return sum(float(tensor.double().square().sum()) for tensor in direction.values()) ** 0.5


def _apart(states: Tensor | None) -> Tensor:
    """Keys or values of both copies, which lie side by side in the dimension of heads."""
    assert states is not None
    return states.unflatten(1, (2, -1))


def _whole(model: PreTrainedModel, context: Context) -> dict[str, Any]:
    ids: Int[Tensor, "one time"] = torch.tensor([context.ids], device=model.device)
    positions = torch.tensor(context.positions, device=model.device)
    return {"input_ids": ids, "use_cache": False, "logits_to_keep": positions}


def _centred(change: Tensor) -> Tensor:
    """Without the part that is the same for all tokens, which changes no distribution."""
    return change - change.mean(-1, keepdim=True)
