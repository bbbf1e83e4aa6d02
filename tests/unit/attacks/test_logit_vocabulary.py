"""Attacks on logits by students of another vocabulary, and on the teacher's own texts."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from logit_reference import (
    BOUNDARY,
    PLAIN,
    TASK,
    agree,
    attach,
    gradients,
    logits_of,
    read,
    reference,
)
from torch import Tensor

from azeotrope.attacks.logits.teacher import TeacherHead
from azeotrope.collect import collect
from azeotrope.generation import Sampling
from azeotrope.heads.features import compute
from azeotrope.models import Loaded, head_of, load
from azeotrope.tokens import from_ids
from azeotrope.traces import Trace
from azeotrope.training import FitConfig, fit


def naive(
    teacher: Loaded,
    student: Loaded,
    trace: Trace,
    distance: Callable[[Tensor, Tensor], Tensor],
    top_k: int | None = None,
) -> Tensor:
    """Pieces as strings: every position of the student's, every token of the teacher's."""
    ours, theirs = read(student, trace), read(teacher, trace)
    with torch.no_grad():
        p = logits_of(teacher, theirs).softmax(-1)
    q = logits_of(student, ours).softmax(-1)

    def spell(token: int) -> list[int]:
        text = teacher.tokenizer.convert_ids_to_tokens(token).replace("▁", " ")
        roles = {"<eos>": "eos", "<bos>": "bos", "<pad>": "pad", "<unk>": "unk"}
        if text in roles:
            return [getattr(student.tokenizer, f"{roles[text]}_token_id")]
        return student.tokenizer("a" + text, add_special_tokens=False)["input_ids"][
            len(student.tokenizer("a", add_special_tokens=False)["input_ids"]) :
        ]

    words = [spell(token) for token in range(p.shape[-1])]
    total, count, at = torch.zeros(()), 0, 0
    for t, token in enumerate(theirs.completion):
        order = p[t].argsort(descending=True).tolist()
        shown = order if top_k is None else order[:top_k]
        for depth, _ in enumerate(words[token]):
            if top_k is None or depth == 0:
                begun = words[token][:depth]
                mass: dict[int | None, float] = {None: 0.0}
                for other in shown:
                    if words[other][:depth] != begun:
                        continue
                    key = words[other][depth] if len(words[other]) > depth else None
                    mass[key] = mass.get(key, 0.0) + p[t, other].item()
                if top_k is not None:
                    mass[None] = p[t, order[top_k:]].sum().item()
                pieces = [key for key in mass if key is not None]
                share = torch.tensor([*(mass[key] for key in pieces), mass[None]])
                share = (share / share.sum()).clamp(min=torch.finfo().eps)
                named = q[at, pieces]
                total = total + distance(share, torch.cat([named, (1 - named.sum())[None]]))
                count += 1
            at += 1
    assert at == len(ours.completion), "the teacher's words are made of the student's pieces"
    return total * (at / count)


@pytest.mark.parametrize("name", ["forward_kl", "jensen_shannon", "skew_kl", "alpha"])
@pytest.mark.parametrize("top_k", [None, 4])
def test_a_student_of_another_vocabulary_is_compared_piece_by_piece(
    name: str, top_k: int | None, teacher_head, teacher, stranger, traces
) -> None:
    attack = attach(teacher_head, stranger, name, kd_weight=1, view={"top_k": top_k})
    chosen = [traces[0], traces[-1]]
    lessons = attack.examples(stranger, chosen, TASK, BOUNDARY)
    found = attack.loss(stranger, lessons)
    assert found.count == sum(len(read(stranger, trace).completion) for trace in chosen)
    (term,) = PLAIN[name]
    expected = torch.stack([naive(teacher, stranger, trace, term, top_k) for trace in chosen]).sum()
    assert found.total.item() == pytest.approx(expected.item(), rel=1e-3)
    agree_roughly = gradients(stranger, found.total), gradients(stranger, expected)
    size = torch.stack([value.norm() for value in agree_roughly[1]]).norm()
    apart = torch.stack([(x - y).norm() for x, y in zip(*agree_roughly, strict=True)]).norm()
    assert apart < 2e-3 * size


@pytest.mark.parametrize("view", [{}, {"top_k": 3}, {"decimals": 2}])
def test_chunks_and_company_change_nothing_for_another_vocabulary(
    view: dict[str, int], teacher_head, stranger, traces
) -> None:
    attack = attach(teacher_head, stranger, "reverse_kl", view=view)
    lessons = attack.examples(stranger, traces, TASK, BOUNDARY)
    whole = attack.loss(stranger, lessons)
    chunked = attach(teacher_head, stranger, "reverse_kl", view=view)
    chunked.budget = 11 * 400
    cut = chunked.loss(stranger, lessons[::-1])
    assert cut.total.item() == pytest.approx(whole.total.item(), rel=1e-5)
    agree(gradients(stranger, cut.total), gradients(stranger, whole.total))
    parts = sum(attack.loss(stranger, [lesson]).total.item() for lesson in lessons)
    assert parts == pytest.approx(whole.total.item(), rel=1e-5)


def test_agreement_and_pairs_work_for_another_vocabulary(
    teacher_head, defended, stranger, traces
) -> None:
    def loss(teacher: TeacherHead, **settings: Any) -> float:
        attack = attach(teacher, stranger, "forward_kl", kd_weight=1, **settings)
        return attack.loss(stranger, attack.examples(stranger, traces, TASK, BOUNDARY)).total.item()

    clean = loss(teacher_head)
    assert 0 < loss(teacher_head, agreement=True) < clean
    assert loss(defended, pairs=200) == pytest.approx(clean, rel=2e-2)
    assert loss(defended) != pytest.approx(clean, rel=5e-2)


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("pocket/small", {"name": "forward_kl", "kd_weight": 1}),
        ("pocket/other", {"name": "forward_kl", "kd_weight": 1}),
        ("pocket/other", {"name": "reverse_kl", "view": {"top_k": 5}}),
    ],
)
def test_students_learn(model: str, settings: dict[str, Any], teacher_head, traces) -> None:
    student = load(model, device="cpu")
    attack = attach(teacher_head, student, **settings)
    lessons = attack.examples(student, traces, TASK, BOUNDARY)
    config = FitConfig(steps=8, batch_size=6, learning_rate=2e-3, log_every=1, warmup=0)
    result = fit(
        list(student.model.parameters()),
        lessons,
        lambda items: attack.loss(student, items),
        config,
        identify=lambda lesson: lesson.id,
    )
    losses = [entry.loss for entry in result.log]
    assert losses[-1] < 0.7 * losses[0]


def test_digits_inside_a_word_are_compared_where_everything_is_shown(
    teacher_head, stranger, traces
) -> None:
    full, top = (
        attach(teacher_head, stranger, "forward_kl", view=view).examples(
            stranger, traces, TASK, BOUNDARY
        )
        for view in ({}, {"top_k": 5})
    )
    for lesson, start in zip(full, top, strict=True):
        pieces = stranger.tokenizer.convert_ids_to_tokens(list(lesson.example.completion))
        assert lesson.at.tolist() == list(range(len(pieces)))
        # It is unknown how hidden tokens continue.
        assert not any(pieces[index].isdigit() for index in start.at.tolist())
        assert any(piece.isdigit() for piece in pieces)


def test_the_teachers_own_text_is_scored_by_its_own_tokens(teacher, student, stranger) -> None:
    sampling = Sampling(temperature=1.0, max_new_tokens=44)
    written = collect(teacher, TASK, TASK.problems("train", 4), sampling)
    own = compute(
        teacher.model,
        [
            from_ids(
                teacher.tokenizer, trace.prompt_ids, trace.completion_ids,
                boundary=BOUNDARY, max_length=256, id=trace.id,
            )
            for trace in written
        ],
    )  # fmt: skip
    assert not all(trace.finished for trace in written), "some are cut"
    head = head_of(teacher.model)
    teacher_head = TeacherHead(teacher.tokenizer, head.weight, head.bias, own)
    for loaded in (student, stranger):
        attack = attach(teacher_head, loaded, "forward_kl", kd_weight=1)
        lessons = attack.examples(loaded, written, TASK, BOUNDARY)
        for lesson, trace in zip(lessons, written, strict=True):
            assert len(lesson.at) == len(lesson.example.completion)
            stops = lesson.example.completion[-1] == loaded.tokenizer.eos_token_id
            assert stops == trace.finished
    same = attach(teacher_head, student, "forward_kl", kd_weight=1)
    found = same.loss(student, same.examples(student, written, TASK, BOUNDARY)).total
    expected = reference(teacher, student, written, PLAIN["forward_kl"], weight=1)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
