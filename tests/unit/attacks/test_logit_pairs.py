"""Attacks on logits: pairs of clean and defended logits undo a matrix on the logits."""

from dataclasses import replace
from typing import Any

import torch
from logit_reference import (
    BOUNDARY,
    TASK,
    attach,
    gradients,
)
from torch import Tensor

from azeotrope.attacks.logits.teacher import TeacherHead
from azeotrope.logits.chunks import head_logits
from azeotrope.models import head_of


def test_pairs_bring_the_clean_loss_back(teacher_head, defended, student, traces) -> None:
    def sums(teacher: TeacherHead, **settings: Any) -> tuple[float, list[Tensor]]:
        attack = attach(teacher, student, "forward_kl", kd_weight=1, **settings)
        total = attack.loss(student, attack.examples(student, traces, TASK, BOUNDARY)).total
        return total.item(), gradients(student, total)

    clean, wanted = sums(teacher_head)

    def apart(teacher: TeacherHead, **settings: Any) -> tuple[float, float]:
        value, found = sums(teacher, **settings)
        off = torch.stack([(x - y).norm() for x, y in zip(found, wanted, strict=True)]).norm()
        size = torch.stack([y.norm() for y in wanted]).norm()
        return abs(value / clean - 1), (off / size).item()

    spoilt, some, many = (apart(defended, pairs=count) for count in (0, 16, 200))
    assert min(spoilt) > 0.05
    assert many[0] < 1e-2
    assert many[1] < 2e-2
    assert some[1] < 0.6 * spoilt[1]
    assert many[1] < 0.1 * some[1]


def test_pairs_are_drawn_without_regard_to_order(defended) -> None:
    clean, seen = defended.pairs(20)
    again = defended.pairs(20)
    assert torch.equal(clean, again[0])
    assert torch.equal(seen, again[1])
    hidden = torch.cat([item.hidden for item in defended.features.values()])
    everything = head_logits(hidden, *defended.snapshot)
    rows = [int((everything - row).abs().sum(-1).argmin()) for row in clean]
    assert len(set(rows)) == 20
    assert rows != sorted(rows)
    torch.testing.assert_close(defended.logits(hidden[rows]), seen)


def test_pairs_in_half_precision(teacher, features, student) -> None:
    head = head_of(teacher.model)
    half = head.weight.to(torch.bfloat16), torch.zeros(len(head.weight), dtype=torch.bfloat16)
    items = [replace(item, hidden=item.hidden.to(torch.bfloat16)) for item in features]
    teacher_head = TeacherHead(teacher.tokenizer, *half, items, snapshot=half)
    clean, seen = teacher_head.pairs(5)
    assert clean.dtype == torch.float32
    assert torch.equal(clean, seen)
    assert not clean.requires_grad
