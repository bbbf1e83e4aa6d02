"""Prepared proxies: folders with what a decoding defense needs of a proxy, and their checks.

proxy.json             the checkpoint and its fingerprint, the step, losses in nats per token
direction.safetensors  the direction of the perturbed copies; missing where none is needed
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor

from azeotrope import models
from azeotrope.config import Config
from azeotrope.files import write_json
from azeotrope.logits.alignment import same_vocabulary
from azeotrope.logits.vocabulary import token_rows
from azeotrope.models import Loaded
from azeotrope.proxies.direction import downstream_gradient, mean_loss
from azeotrope.proxies.perturbed import EPSILONS, Context, choose_epsilon, relative_errors
from azeotrope.tokens import Example

DESCRIPTION, DIRECTION = "proxy.json", "direction.safetensors"
CONTEXTS, POSITIONS = 16, 16
"""Texts, and positions of each, at which the finite difference is compared with the derivative."""


class ProxyPreparation(Config):
    """How proxies are prepared for a decoding defense."""

    traces: int = Field(
        default=200, ge=1, description="held-out clean traces of the downstream loss"
    )
    epsilon: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="step along the direction of length 1; null takes the largest of "
        + ", ".join(f"{epsilon:g}" for epsilon in EPSILONS)
        + " whose error is at most half of the tolerance",
    )
    tolerance: float = Field(
        default=0.02,
        gt=0,
        allow_inf_nan=False,
        description="greatest relative error of the finite difference against the exact derivative",
    )
    most_excess: float = Field(
        default=0.5,
        gt=0,
        description="greatest loss of a proxy above the teacher's own, in nats per token. A proxy "
        "that learned nothing of the teacher points in no useful direction; give it a `lesson`",
    )


@dataclass(frozen=True)
class PreparedProxy:
    """A proxy in float32, and what was measured when it was prepared."""

    loaded: Loaded
    tokens: int
    """Rows of its vocabulary that belong to tokens."""
    direction: dict[str, Tensor] | None
    epsilon: float


def prepare(
    name: str,
    teacher: Loaded,
    examples: Sequence[Example],
    folder: Path,
    settings: ProxyPreparation,
    *,
    with_direction: bool = True,
) -> None:
    """Measure a proxy, compute its direction, and check both.

    Args:
        examples: clean traces of the teacher that no attacker sees, in its own tokens.

    Raises:
        ValueError: if the proxy has other tokens than the teacher, learned too little of it, or
            the finite difference is not accurate enough.
        ArithmeticError: if the gradient is zero or not finite.
    """
    proxy = models.load(name, dtype=torch.float32)
    if not same_vocabulary(teacher.tokenizer, proxy.tokenizer):
        raise ValueError(
            f"the proxy {name} has other tokens ({len(proxy.tokenizer)}) than the teacher "
            f"({len(teacher.tokenizer)}); a proxy that decides about every token needs the same "
            "ones, so take one of the teacher's family"
        )
    teacher_loss, loss = mean_loss(teacher, examples), mean_loss(proxy, examples)
    if not loss - teacher_loss <= settings.most_excess:
        raise ValueError(
            f"the proxy {name} loses {loss:.2f} nats per token on clean traces and their writer "
            f"{teacher_loss:.2f}; more than {settings.most_excess:g} apart it resembles no student "
            "in training. Teach it first (`lesson`), or raise `preparation.most_excess`"
        )
    described = {
        "model": models.resolve(name),
        "fingerprint": models.fingerprint(name),
        "loss": loss,
        "teacher_loss": teacher_loss,
    }
    if with_direction:
        direction, _, length = downstream_gradient(proxy, examples)
        rows = token_rows(proxy.tokenizer)
        wanted = () if settings.epsilon is None else (settings.epsilon,)
        tried: list[float] = sorted({*EPSILONS, *wanted})
        errors = relative_errors(proxy.model, direction, contexts_of(examples), rows, tried)
        epsilon = choose_epsilon(errors, settings.epsilon, settings.tolerance)
        described |= {
            "gradient_length": length,
            "epsilon": epsilon,
            "errors": {f"{step:g}": error for step, error in errors.items()},
        }
        save_file(direction, folder / DIRECTION)
    write_json(folder / DESCRIPTION, described)


def contexts_of(examples: Sequence[Example]) -> list[Context]:
    """Positions spread evenly over the completions of the first texts."""
    contexts = []
    for example in examples[:CONTEXTS]:
        ids = (*example.prompt, *example.completion)[:-1]
        first = len(example.prompt) - 1
        step = max(1, (len(ids) - first) // POSITIONS)
        contexts.append(Context(ids, tuple(range(first, len(ids), step))[:POSITIONS]))
    return contexts


@lru_cache(maxsize=8)
def load_prepared(folder: str, device: str) -> PreparedProxy:
    """Load a prepared proxy; several defenses share it, so nobody may change it.

    Raises:
        FileNotFoundError: if the folder or the checkpoint is missing.
        ValueError: if the checkpoint changed since it was prepared.
    """
    path = Path(folder)
    if not (path / DESCRIPTION).is_file():
        raise FileNotFoundError(
            f"no prepared proxy at {folder}; `azeotrope pipeline` and `azeotrope defend` make it"
        )
    described = json.loads((path / DESCRIPTION).read_text())
    if described["fingerprint"] != models.fingerprint(described["model"]):
        raise ValueError(
            f"the proxy {described['model']} changed since it was prepared; run the workflow again"
        )
    loaded = models.load(described["model"], dtype=torch.float32, device=device)
    loaded.model.requires_grad_(False)
    direction = None
    if (path / DIRECTION).is_file():
        direction = load_file(path / DIRECTION, device=device)
    return PreparedProxy(
        loaded, token_rows(loaded.tokenizer), direction, described.get("epsilon", 0.0)
    )
