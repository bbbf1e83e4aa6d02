"""Attacks on logits: each loss is its formula, however it is cut or padded."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from logit_reference import (
    BOUNDARY,
    PLAIN,
    TASK,
    agree,
    attach,
    every_divergence,
    gradients,
    read,
    reference,
)
from torch import Tensor

from azeotrope.attacks.logit_kd import ALIASES
from azeotrope.attacks.logits.attack import LogitAttack
from azeotrope.attacks.logits.teacher import TeacherHead
from azeotrope.logits import divergences
from azeotrope.models import Loaded, head_of, load
from azeotrope.traces import Trace


def test_every_divergence_has_a_reference() -> None:
    assert set(ALIASES) == set(PLAIN)


@every_divergence
def test_the_loss_is_its_formula(name: str, teacher_head, teacher, student, traces) -> None:
    attack = attach(teacher_head, student, name)
    found = attack.loss(student, attack.examples(student, traces, TASK, BOUNDARY))
    expected = reference(teacher, student, traces, PLAIN[name])
    assert found.count == sum(len(read(student, trace).completion) for trace in traces)
    assert found.total.item() == pytest.approx(expected.item(), rel=1e-5)
    agree(gradients(student, found.total), gradients(student, expected))


@every_divergence
@pytest.mark.parametrize("tokens", [1, 7, 50])
def test_chunks_change_nothing(name: str, tokens: int, teacher_head, student, traces) -> None:
    whole = attach(teacher_head, student, name)
    lessons = whole.examples(student, traces[:3], TASK, BOUNDARY)
    chunked = attach(teacher_head, student, name)
    chunked.budget = tokens * teacher_head.rows
    one, other = whole.loss(student, lessons), chunked.loss(student, lessons)
    assert one.count == other.count
    assert other.total.item() == pytest.approx(one.total.item(), rel=1e-5)
    agree(gradients(student, other.total), gradients(student, one.total))


@every_divergence
def test_the_order_and_the_company_of_texts_change_nothing(
    name: str, teacher_head, student, traces
) -> None:
    attack = attach(teacher_head, student, name)
    lessons = attack.examples(student, traces, TASK, BOUNDARY)
    whole = attack.loss(student, lessons)
    turned = attack.loss(student, lessons[::-1])
    expected = gradients(student, whole.total)
    assert turned.total.item() == pytest.approx(whole.total.item(), rel=1e-5)
    agree(gradients(student, turned.total), expected)
    if name == "alphanet":
        return  # the larger of two sums is not the sum of the larger ones; see below
    parts = [attack.loss(student, [lesson]) for lesson in lessons]
    assert whole.count == sum(part.count for part in parts)
    total = sum((part.total for part in parts), torch.zeros(()))
    assert total.item() == pytest.approx(whole.total.item(), rel=1e-5)
    agree(gradients(student, total), expected)


def test_alphanet_takes_the_larger_sum_of_the_batch(teacher_head, teacher, student, traces) -> None:
    def parts(attack: LogitAttack, chosen: Sequence[Trace]) -> float:
        return attack.loss(student, attack.examples(student, chosen, TASK, BOUNDARY)).total.item()

    pair = [attach(teacher_head, student, "alpha", alpha=a, kd_weight=1) for a in (-0.5, 0.9)]
    both = attach(teacher_head, student, "alphanet", low=-0.5, high=0.9, kd_weight=1)
    low, high = (parts(attack, traces) for attack in pair)
    assert parts(both, traces) == pytest.approx(max(low, high), rel=1e-6)
    # The original decides at each position, so it is never below either.
    settings = {"variant_of": "original", "clip": 1e6, "kd_weight": 1}
    original = attach(teacher_head, student, "alphanet", low=-0.5, high=0.9, **settings)
    assert parts(original, traces) > max(low, high)


def test_the_original_alphanet_is_its_divergence(teacher_head, teacher, student, traces) -> None:
    attack = attach(teacher_head, student, "alphanet", variant_of="original")

    def term(p: Tensor, q: Tensor) -> Tensor:
        return divergences.alphanet(p.log(), q.log(), -1.0, 1.0, 5.0)

    found = attack.loss(student, attack.examples(student, traces, TASK, BOUNDARY)).total
    expected = reference(teacher, student, traces, [term])
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    agree(gradients(student, found), gradients(student, expected))


def test_padding_gets_no_gradient(teacher_head, student, traces) -> None:
    attack = attach(teacher_head, student, "forward_kl")
    lessons = attack.examples(student, traces, TASK, BOUNDARY)
    assert len({len(lesson.example) for lesson in lessons}) > 1
    embedding = student.model.get_input_embeddings().weight
    (gradient,) = torch.autograd.grad(attack.loss(student, lessons).total, embedding)
    assert gradient[student.tokenizer.pad_token_id].abs().sum() == 0
    assert gradient[lessons[0].example.prompt[1]].abs().sum() > 0


def test_the_teacher_learns_nothing(teacher, features, student, traces) -> None:
    head = head_of(teacher.model)
    attack = attach(
        TeacherHead(teacher.tokenizer, head.weight, head.bias, features), student, "reverse_kl"
    )
    attack.loss(student, attack.examples(student, traces[:2], TASK, BOUNDARY)).total.backward()
    assert head.weight.grad is None
    student.model.zero_grad()


def test_rows_that_pad_either_head_count_for_nothing(teacher, features, student, traces) -> None:
    head = head_of(teacher.model)
    rows, width = head.weight.shape
    junk = torch.cat([head.weight.detach(), 100 * torch.ones(7, width)])
    bias = torch.zeros(rows + 7)
    plain = TeacherHead(teacher.tokenizer, head.weight, head.bias, features)
    padded = TeacherHead(teacher.tokenizer, junk, bias, features, snapshot=(junk, bias))
    assert padded.rows == rows
    wide = load("pocket/small", device="cpu")
    wide.model.resize_token_embeddings(rows + 11)

    def loss(teacher_head: TeacherHead, loaded: Loaded, **settings: Any) -> float:
        attack = attach(teacher_head, loaded, "forward_kl", kd_weight=1, **settings)
        return attack.loss(loaded, attack.examples(loaded, traces, TASK, BOUNDARY)).total.item()

    expected = loss(plain, student)
    assert loss(padded, student) == pytest.approx(expected, rel=1e-6)
    assert loss(padded, wide) == pytest.approx(expected, rel=1e-5)
    assert loss(padded, wide, view={"top_k": rows}) == pytest.approx(expected, rel=1e-5)
    assert loss(padded, student, pairs=50) == pytest.approx(expected, rel=1e-3)
    with pytest.raises(ValueError, match=f"view.top_k {rows + 1} is larger than the vocabulary"):
        attach(padded, student, "forward_kl", view={"top_k": rows + 1})


def test_a_teacher_in_half_precision_can_be_asked(teacher, features, student, traces) -> None:
    head = head_of(teacher.model)
    weight, bias = head.weight.to(torch.bfloat16), torch.zeros(len(head.weight)).bfloat16()
    items = [replace(item, hidden=item.hidden.bfloat16()) for item in features]
    attack = attach(TeacherHead(teacher.tokenizer, weight, bias, items), student, "forward_kl")
    assert attack.loss(student, attack.examples(student, traces, TASK, BOUNDARY)).total.isfinite()
