"""MiniLLM: its gradient is that of the reverse KL of whole texts."""

import math
from typing import Any

import pytest
import torch
from tiny_models import (
    EOS,
    VOCAB,
    every_text,
    example,
    gradients,
    log_softmax,
    minillm,
    small,
)
from torch import Tensor

from azeotrope import tasks
from azeotrope.attacks import base as attacks
from azeotrope.attacks.logits.teacher import TeacherHead
from azeotrope.config import ConfigError
from azeotrope.models import Loaded, head_of, load
from azeotrope.tokens import Boundary
from azeotrope.traces import Trace, ground_truth
from azeotrope.training import FitConfig, fit

BOUNDARY = Boundary()
TASK = tasks.build(tasks.PocketConfig())


def test_all_texts_are_there() -> None:
    assert len(list(every_text(2))) == 1 + 4 * 5
    teacher = small(0)
    items = [example((3, 4), text) for text in every_text(2)]
    total = sum(
        log_softmax(teacher, item, VOCAB)
        .gather(-1, torch.tensor(item.completion)[:, None])
        .sum()
        .exp()
        for item in items
    )
    assert total.item() == pytest.approx(1, rel=1e-5)


def test_its_expected_gradient_is_that_of_the_reverse_kl_of_whole_texts() -> None:
    """Of all texts of two tokens, where the mean of what comes after is the sum."""
    teacher, student = small(0), small(1)
    attack = minillm(teacher, student, mix=0)
    items = [example((3, 4), text) for text in every_text(2)]

    def text_log_p(loaded: Loaded) -> Tensor:
        return torch.stack(
            [
                log_softmax(loaded, item, VOCAB)
                .gather(-1, torch.tensor(item.completion)[:, None])
                .sum()
                for item in items
            ]
        )

    with torch.no_grad():
        log_p = text_log_p(teacher)
    log_q = text_log_p(student)
    whole = (log_q.exp() * (log_q - log_p)).sum()
    weights = log_q.detach().exp()
    # Each text with its probability; a sum over its tokens, so that nothing is divided.
    found = torch.stack(
        [
            weight * attack.distance(student, [item], [len(item.completion)])
            for item, weight in zip(items, weights, strict=True)
        ]
    ).sum()
    assert found.item() == pytest.approx(whole.item(), rel=1e-5)
    wanted = gradients(student, whole)
    torch.testing.assert_close(gradients(student, found), wanted, rtol=1e-4, atol=1e-6)
    # The policy gradient is no small part of it.
    step = torch.zeros(())
    for item, weight in zip(items, weights, strict=True):
        p, q = (log_softmax(loaded, item, VOCAB) for loaded in (teacher, student))
        step = step + weight * (q.exp() * (q - p.detach())).sum()
    assert (gradients(student, step) - wanted).norm() > 0.05 * wanted.norm()


@pytest.mark.parametrize(("mix", "temperature"), [(0.0, 1.0), (0.2, 1.0), (0.7, 2.0)])
def test_its_gradient_is_the_published_one(mix: float, temperature: float) -> None:
    teacher, student = small(0), small(1)
    attack = minillm(teacher, student, mix=mix, temperature=temperature)
    items = [example((3, 4), (1, 3, 0, 4)), example((1,), (4, EOS)), example((3, 1, 1), (EOS,))]
    counts = [7, 2, 5]
    expected, value = torch.zeros(()), 0.0
    for item, count in zip(items, counts, strict=True):
        log_q = log_softmax(student, item, VOCAB, temperature)
        log_p = log_softmax(teacher, item, VOCAB, temperature).detach()
        n = len(item.completion)
        said = [log_q[t, token] for t, token in enumerate(item.completion)]
        reward = [log_p[t, y] - said[t].detach() for t, y in enumerate(item.completion)]
        for t, token in enumerate(item.completion):
            p, q = log_p[t, token].exp(), said[t].detach().exp()
            weight = q / (mix * p + (1 - mix) * q)
            after = sum(reward[t + 1 :]) / (n - t - 1) if t < n - 1 else 0.0
            step = (log_q[t].exp() * (log_q[t] - log_p[t])).sum()
            expected = expected + count / n * weight * (step - after * said[t])
            value += (count / n * weight * step).item()
    found = attack.distance(student, items, counts)
    assert found.item() == pytest.approx(value, rel=1e-5)
    torch.testing.assert_close(
        gradients(student, found), gradients(student, expected), rtol=1e-4, atol=1e-5
    )


def test_a_student_that_is_the_teacher_has_nothing_to_learn() -> None:
    teacher, student = small(0), small(0)
    attack = minillm(teacher, student, kd_weight=1, max_new_tokens=8)
    found = attack.loss(student, [example((3, 4), (1, 2))])
    assert found.total.item() == pytest.approx(0, abs=1e-6)
    assert gradients(student, found.total).abs().max() < 1e-5


@pytest.mark.parametrize("tokens", [1, 3])
def test_chunks_change_nothing(tokens: int) -> None:
    teacher, student = small(0), small(1)
    attack = minillm(teacher, student)
    items = [example((3, 4), (1, 3, 0, 4)), example((1,), (4, EOS))]
    whole = attack.distance(student, items, [4, 2])
    attack.budget = tokens * (VOCAB + 2)
    cut = attack.distance(student, items, [4, 2])
    assert cut.item() == pytest.approx(whole.item(), rel=1e-6)
    torch.testing.assert_close(gradients(student, cut), gradients(student, whole))


# The pocket models


@pytest.fixture(scope="module")
def teacher() -> Loaded:
    return load("pocket/teacher", device="cpu")


@pytest.fixture(scope="module")
def student() -> Loaded:
    return load("pocket/small", device="cpu")


@pytest.fixture(scope="module")
def traces() -> list[Trace]:
    return ground_truth(TASK, TASK.problems("train", 6))


def test_micro_batches_write_and_learn_the_same(teacher, student, traces) -> None:
    attack = minillm(teacher, student)
    items = attack.examples(student, traces, TASK, BOUNDARY)
    torch.manual_seed(5)
    whole = attack.loss(student, items)
    parts = [attack.loss(student, [item]) for item in reversed(items)]
    assert whole.count == sum(part.count for part in parts)
    total = sum((part.total for part in parts), torch.zeros(()))
    assert total.item() == pytest.approx(whole.total.item(), rel=1e-5)
    one, other = gradients(student, total), gradients(student, whole.total)
    assert (one - other).norm() < 1e-4 * other.norm()
    # Another step writes other texts.
    texts = [item.completion for item in attack.write(student, items)]
    torch.manual_seed(6)
    assert [item.completion for item in attack.write(student, items)] != texts
    torch.manual_seed(5)
    assert [item.completion for item in attack.write(student, items)] == texts


def test_the_loss_is_the_mixture_of_its_terms(teacher, student, traces) -> None:
    torch.manual_seed(5)
    items = minillm(teacher, student).examples(student, traces, TASK, BOUNDARY)
    plain = attacks.resolve({"name": "text_sft"}).loss(student, items)
    none = minillm(teacher, student, kd_weight=0).loss(student, items)
    assert torch.equal(none.total, plain.total)
    assert none.count == plain.count
    for weight, temperature in ((1.0, 1.0), (0.3, 2.0)):
        settings = {"kd_weight": weight, "temperature": temperature}
        attack = minillm(teacher, student, **settings)
        written = attack.write(student, items)
        kd = attack.distance(student, written, [len(item.completion) for item in items])
        expected = (1 - weight) * plain.total + weight * temperature**2 * kd
        found = attack.loss(student, items).total
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)
        assert kd.item() > 1


def test_without_distillation_the_teacher_is_not_queried(student, traces) -> None:
    silent = load("pocket/teacher", device="cpu")
    attack = minillm(silent, student, kd_weight=0)

    def refuse(*_: object) -> None:
        raise AssertionError("the teacher was asked")

    silent.model.base_model.register_forward_pre_hook(refuse)
    items = attack.examples(student, traces, TASK, BOUNDARY)
    assert attack.loss(student, items).total.isfinite()


def text_kl(teacher: Loaded, student: Loaded) -> float:
    """KL(q || p) of whole texts of at most two tokens, by adding all of them up."""
    total = 0.0
    with torch.no_grad():
        for text in every_text(2):
            item = example((3, 4), text)
            chosen = torch.tensor(text)[:, None]
            log_q, log_p = (
                log_softmax(loaded, item, VOCAB).gather(-1, chosen).sum().item()
                for loaded in (student, teacher)
            )
            total += math.exp(log_q) * (log_q - log_p)
    return total


@pytest.mark.parametrize("mix", [0.0, 0.2])
def test_a_student_learns_to_write_what_the_teacher_would(mix: float) -> None:
    teacher, student = small(0), small(1)
    attack = minillm(teacher, student, mix=mix, kd_weight=1, max_new_tokens=2)
    items = [example((3, 4), (EOS,), str(number)) for number in range(32)]
    before = text_kl(teacher, student)
    config = FitConfig(steps=40, batch_size=32, learning_rate=1e-2, warmup=0)
    parameters = list(student.model.parameters())
    fit(parameters, items, lambda batch: attack.loss(student, batch), config)
    assert text_kl(teacher, student) < 0.2 * before


# What is refused


def test_the_whole_teacher_is_needed(teacher, student) -> None:
    head = head_of(teacher.model)
    attack = attacks.resolve({"name": "minillm"})
    with pytest.raises(
        ValueError, match=r"needs the whole model; give TeacherHead\(\.\.\., model="
    ):
        attack.attach(TeacherHead(teacher.tokenizer, head.weight, head.bias, []), student)


def test_another_vocabulary_is_refused(teacher) -> None:
    message = r"teacher \(129 tokens\) and student \(\d+ tokens\), which must have one vocabulary"
    with pytest.raises(ValueError, match=message):
        minillm(teacher, load("pocket/other", device="cpu"))


def test_a_teacher_must_be_attached_first(student, traces) -> None:
    attack = attacks.resolve({"name": "minillm"})
    with pytest.raises(ValueError, match="minillm learns from a teacher; attach one first"):
        attack.examples(student, traces, TASK, BOUNDARY)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"view": {"top_k": 5}}, "sees all of its logits; leave out view, pairs and agreement"),
        ({"pairs": 5}, "leave out view, pairs and agreement, or use reverse_kl"),
        ({"agreement": True}, "leave out view, pairs and agreement"),
        ({"mix": 1.0}, "mix: .*less than 1, got 1.0"),
        ({"mix": -0.1}, "mix: .*greater than or equal to 0, got -0.1"),
        ({"max_new_tokens": 0}, "max_new_tokens: .*greater than or equal to 1, got 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        attacks.resolve({"name": "minillm", **settings})


def test_texts_longer_than_the_context_are_refused() -> None:
    attack = minillm(small(0), small(1), max_new_tokens=15)
    with pytest.raises(ValueError, match="exceed the model's context of 16; lower max_new_tokens"):
        attack.write(small(1), [example((3, 4), (EOS,))])
