"""Attacks on logits: weights, temperature, what the API shows, and agreement with the text."""

import pytest
import torch
import torch.nn.functional as F
from logit_reference import (
    BOUNDARY,
    PLAIN,
    TASK,
    Plain,
    agree,
    attach,
    every_divergence,
    gradients,
    logits_of,
    read,
    reference,
)
from torch import Tensor

from azeotrope.attacks import base as attacks
from azeotrope.models import Loaded, head_of
from azeotrope.traces import Trace


@every_divergence
def test_without_distillation_it_is_text_sft_to_the_bit(
    name: str, teacher_head, student, traces
) -> None:
    attack = attach(teacher_head, student, name, kd_weight=0)
    plain = attacks.resolve({"name": "text_sft"})
    found = attack.loss(student, attack.examples(student, traces, TASK, BOUNDARY))
    expected = plain.loss(student, plain.examples(student, traces, TASK, BOUNDARY))
    assert found.count == expected.count
    assert torch.equal(found.total, expected.total)
    pairs = gradients(student, found.total), gradients(student, expected.total)
    assert all(torch.equal(one, other) for one, other in zip(*pairs, strict=True))


@every_divergence
@pytest.mark.parametrize(("weight", "temperature"), [(1.0, 1.0), (1.0, 4.0), (0.25, 0.5)])
def test_weight_and_temperature(
    name: str, weight: float, temperature: float, teacher_head, teacher, student, traces
) -> None:
    settings = {"kd_weight": weight, "temperature": temperature}
    attack = attach(teacher_head, student, name, **settings)
    chosen = traces[2:]
    found = attack.loss(student, attack.examples(student, chosen, TASK, BOUNDARY)).total
    expected = reference(teacher, student, chosen, PLAIN[name], weight, temperature)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    agree(gradients(student, found), gradients(student, expected))


@every_divergence
def test_the_top_of_everything_is_everything(name: str, teacher_head, student, traces) -> None:
    full = attach(teacher_head, student, name)
    top = attach(teacher_head, student, name, view={"top_k": teacher_head.rows})
    lessons = full.examples(student, traces[:3], TASK, BOUNDARY)
    one, other = full.loss(student, lessons).total, top.loss(student, lessons).total
    assert torch.equal(one, other)


@every_divergence
@pytest.mark.parametrize("top_k", [1, 5])
def test_what_is_not_shown_is_one_event(
    name: str, top_k: int, teacher_head, teacher, student, traces
) -> None:
    attack = attach(teacher_head, student, name, view={"top_k": top_k}, kd_weight=1)

    def seen(term: Plain) -> Plain:
        def through(p: Tensor, q: Tensor) -> Tensor:
            order = p.argsort(-1, descending=True)
            shown = [x.gather(-1, order[:, :top_k]) for x in (p, q)]
            rest = [x.gather(-1, order[:, top_k:]).sum(-1, keepdim=True) for x in (p, q)]
            # In float32 less than this cannot be told from nothing.
            rest[0] = rest[0].clamp(min=torch.finfo().eps)
            return term(*(torch.cat(pair, -1) for pair in zip(shown, rest, strict=True)))

        return through

    found = attack.loss(student, attack.examples(student, traces, TASK, BOUNDARY)).total
    expected = reference(teacher, student, traces, [seen(t) for t in PLAIN[name]], weight=1)
    assert found.item() == pytest.approx(expected.item(), rel=2e-3)


@pytest.mark.parametrize("decimals", [0, 1])
def test_rounded_logprobs_are_learned_as_they_are_shown(
    decimals: int, teacher_head, teacher, student, traces
) -> None:
    attack = attach(teacher_head, student, "forward_kl", view={"decimals": decimals}, kd_weight=1)

    def rounded(p: Tensor, q: Tensor) -> Tensor:
        shown = (p.log() * 10**decimals).round() / 10**decimals
        return PLAIN["forward_kl"][0](shown.softmax(-1), q)

    found = attack.loss(student, attack.examples(student, traces, TASK, BOUNDARY)).total
    expected = reference(teacher, student, traces, [rounded], weight=1)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    exact = reference(teacher, student, traces, PLAIN["forward_kl"], weight=1)
    assert found.item() != pytest.approx(exact.item(), rel=1e-5)


def per_token_agreement(student: Loaded, teacher: Loaded, trace: Trace, term: Plain) -> Tensor:
    """1 where the two gradients at the last hidden state do not oppose each other."""
    example = read(student, trace)
    ids = torch.tensor([example.prompt + example.completion])
    with torch.no_grad():
        z = logits_of(teacher, example)
        states = student.model.base_model(input_ids=ids).last_hidden_state[0]
    states = states[len(example.prompt) - 1 : -1]
    keep = []
    for t, target in enumerate(example.completion):
        h = states[t].clone().requires_grad_()
        s = head_of(student.model)(h)
        (one,) = torch.autograd.grad(F.cross_entropy(s, torch.tensor(target)), h, retain_graph=True)
        (other,) = torch.autograd.grad(term(z[t].softmax(-1), s.softmax(-1)), h)
        keep.append(float(one @ other >= 0))
    return torch.tensor(keep)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("tokens", [10_000, 9])
def test_tokens_whose_gradients_oppose_are_dropped(
    name: str, tokens: int, teacher_head, teacher, student, traces
) -> None:
    attack = attach(teacher_head, student, name, agreement=True, kd_weight=1)
    attack.budget = tokens * teacher_head.rows
    chosen, (term,) = traces[:3], PLAIN[name]
    keep = [per_token_agreement(student, teacher, trace, term) for trace in chosen]
    assert 0 < torch.cat(keep).mean() < 1
    expected = torch.zeros(())
    for trace, kept in zip(chosen, keep, strict=True):
        example = read(student, trace)
        with torch.no_grad():
            p = logits_of(teacher, example).softmax(-1)
        expected = expected + (term(p, logits_of(student, example).softmax(-1)) * kept).sum()
    found = attack.loss(student, attack.examples(student, chosen, TASK, BOUNDARY)).total
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    agree(gradients(student, found), gradients(student, expected))


def test_agreement_without_distillation_is_no_different(teacher_head, student, traces) -> None:
    pair = [
        attach(teacher_head, student, "alpha", agreement=flag, kd_weight=0)
        for flag in (True, False)
    ]
    one, other = (a.loss(student, a.examples(student, traces, TASK, BOUNDARY)).total for a in pair)
    assert torch.equal(one, other)
