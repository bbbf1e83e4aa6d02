"""Reference implementations for tests of attacks on logits.

They run whole models, one text at a time, without chunks or features.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from azeotrope import tasks
from azeotrope.attacks import base as attacks
from azeotrope.attacks.logit_kd import ALIASES
from azeotrope.attacks.logits.attack import LogitAttack
from azeotrope.attacks.logits.teacher import TeacherHead
from azeotrope.models import Loaded
from azeotrope.tokens import Boundary, Example, encode
from azeotrope.traces import Trace

BOUNDARY = Boundary()
TASK = tasks.build(tasks.PocketConfig())
every_divergence = pytest.mark.parametrize("name", ALIASES)
Plain = Callable[[Tensor, Tensor], Tensor]
"""(p, q), probabilities of shape [..., events] -> [...]."""
PLAIN: dict[str, list[Plain]] = {
    "forward_kl": [lambda p, q: (p * (p / q).log()).sum(-1)],
    "reverse_kl": [lambda p, q: (q * (q / p).log()).sum(-1)],
    "alpha": [lambda p, q: 4 * (1 - (p * q).sqrt().sum(-1))],
    "alphanet": [
        lambda p, q: ((p**0.2 * q**0.8).sum(-1) - 1) / (0.2 * -0.8),
        lambda p, q: ((p**0.9 * q**0.1).sum(-1) - 1) / (0.9 * -0.1),
    ],
    "abkd": [
        lambda p, q: -(p**0.2 * q**0.7 - 2 / 9 * p**0.9 - 7 / 9 * q**0.9).sum(-1) / (0.2 * 0.7)
    ],
    "skew_kl": [lambda p, q: (p * (p / (0.1 * p + 0.9 * q)).log()).sum(-1)],
    "jensen_shannon": [
        lambda p, q: (
            0.5 * (p * (2 * p / (p + q)).log()).sum(-1)
            + 0.5 * (q * (2 * q / (p + q)).log()).sum(-1)
        )
    ],
}
"""Each attack's divergence as a formula on probabilities; the largest sum is taken."""


def read(loaded: Loaded, trace: Trace) -> Example:
    return encode(
        loaded.tokenizer,
        TASK.messages(trace.question),
        trace.text,
        boundary=BOUNDARY,
        max_length=256,
        finished=trace.finished,
        id=trace.id,
    )


def attach(teacher_head: TeacherHead, student: Loaded, name: str, **settings: Any) -> LogitAttack:
    attack = attacks.resolve({"name": name, **settings})
    assert isinstance(attack, LogitAttack)
    attack.attach(teacher_head, student)
    return attack


def logits_of(loaded: Loaded, example: Example) -> Tensor:
    ids = torch.tensor([example.prompt + example.completion])
    return loaded.model(input_ids=ids).logits[0, len(example.prompt) - 1 : -1]


def reference(
    teacher: Loaded,
    student: Loaded,
    traces: Sequence[Trace],
    terms: Sequence[Plain],
    weight: float = 0.5,
    temperature: float = 1.0,
) -> Tensor:
    """(1 - weight) sum SFT + weight T^2 max over terms of sum D, one whole text at a time."""
    sft, sums = torch.zeros(()), [torch.zeros(()) for _ in terms]
    for trace in traces:
        example = read(student, trace)
        s = logits_of(student, example)
        with torch.no_grad():
            z = logits_of(teacher, example)
        sft = sft + F.cross_entropy(s, torch.tensor(example.completion), reduction="sum")
        p, q = (x.div(temperature).softmax(-1) for x in (z, s))
        sums = [total + term(p, q).sum() for total, term in zip(sums, terms, strict=True)]
    return (1 - weight) * sft + weight * temperature**2 * torch.stack(sums).max()


def gradients(loaded: Loaded, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(loaded.model.parameters()), allow_unused=False))


def agree(one: Sequence[Tensor], other: Sequence[Tensor]) -> None:
    """Gradients are equal but for the last digits of float32."""
    size = torch.stack([value.norm() for value in other]).norm()
    assert size > 0
    apart = torch.stack([(x - y).norm() for x, y in zip(one, other, strict=True)]).norm()
    assert apart <= 1e-4 * size
