"""Attacks on logits: each loss is its formula, however it is cut, padded or seen.

The references here run whole models, one text at a time, and know nothing of chunks or features.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from azeotrope import tasks
from azeotrope.attacks import base as attacks
from azeotrope.attacks.logits import LogitAttack, TeacherHead
from azeotrope.collect import collect
from azeotrope.config import ConfigError
from azeotrope.generation import Sampling
from azeotrope.heads import chunked
from azeotrope.heads.features import Features, compute
from azeotrope.heads.folding import fold
from azeotrope.logits import divergences
from azeotrope.models import Loaded, head_of, load
from azeotrope.tokens import Boundary, Example, encode, from_ids
from azeotrope.traces import Trace, ground_truth
from azeotrope.training import FitConfig, fit

BOUNDARY = Boundary()
TASK = tasks.build(tasks.PocketConfig())
NAMES = [
    name
    for name in attacks.names()
    if isinstance(found := attacks.resolve({"name": name}), LogitAttack)
    and found.needs != "teacher"
]
every = pytest.mark.parametrize("name", NAMES)
PLAIN: dict[str, list[Callable[[Tensor, Tensor], Tensor]]] = {
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


def test_every_attack_has_a_reference() -> None:
    assert set(NAMES) == set(PLAIN)


@pytest.fixture(scope="module")
def teacher() -> Loaded:
    return load("pocket/teacher", device="cpu")


@pytest.fixture(scope="module")
def student() -> Loaded:
    return load("pocket/small", device="cpu")


@pytest.fixture(scope="module")
def stranger() -> Loaded:
    """A student with another vocabulary."""
    return load("pocket/other", device="cpu")


@pytest.fixture(scope="module")
def traces() -> list[Trace]:
    found = ground_truth(TASK, TASK.problems("train", 6))
    # One that was cut: nobody learns to stop there.
    return [*found[:-1], replace(found[-1], finished=False)]


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


@pytest.fixture(scope="module")
def features(teacher: Loaded, traces: list[Trace]) -> list[Features]:
    return compute(teacher.model, [read(teacher, trace) for trace in traces])


@pytest.fixture(scope="module")
def asked(teacher: Loaded, features: list[Features]) -> TeacherHead:
    head = head_of(teacher.model)
    return TeacherHead(teacher.tokenizer, head.weight, head.bias, features)


def attach(asked: TeacherHead, student: Loaded, name: str, **settings: Any) -> LogitAttack:
    attack = attacks.resolve({"name": name, **settings})
    assert isinstance(attack, LogitAttack)
    attack.attach(asked, student)
    return attack


def logits_of(loaded: Loaded, example: Example) -> Tensor:
    ids = torch.tensor([example.prompt + example.completion])
    return loaded.model(input_ids=ids).logits[0, len(example.prompt) - 1 : -1]


Plain = Callable[[Tensor, Tensor], Tensor]


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


# The loss is its formula


@every
def test_the_loss_is_its_formula(name: str, asked, teacher, student, traces) -> None:
    attack = attach(asked, student, name)
    found = attack.loss(student, attack.examples(student, traces, TASK, BOUNDARY))
    expected = reference(teacher, student, traces, PLAIN[name])
    assert found.count == sum(len(read(student, trace).completion) for trace in traces)
    assert found.total.item() == pytest.approx(expected.item(), rel=1e-5)
    agree(gradients(student, found.total), gradients(student, expected))


@every
@pytest.mark.parametrize("tokens", [1, 7, 50])
def test_chunks_change_nothing(name: str, tokens: int, asked, student, traces) -> None:
    whole = attach(asked, student, name)
    lessons = whole.examples(student, traces[:3], TASK, BOUNDARY)
    chunked = attach(asked, student, name)
    chunked.budget = tokens * asked.rows
    one, other = whole.loss(student, lessons), chunked.loss(student, lessons)
    assert one.count == other.count
    assert other.total.item() == pytest.approx(one.total.item(), rel=1e-5)
    agree(gradients(student, other.total), gradients(student, one.total))


@every
def test_the_order_and_the_company_of_texts_change_nothing(
    name: str, asked, student, traces
) -> None:
    attack = attach(asked, student, name)
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


def test_alphanet_takes_the_larger_sum_of_the_batch(asked, teacher, student, traces) -> None:
    def parts(attack: LogitAttack, chosen: Sequence[Trace]) -> float:
        return attack.loss(student, attack.examples(student, chosen, TASK, BOUNDARY)).total.item()

    pair = [attach(asked, student, "alpha", alpha=a, kd_weight=1) for a in (-0.5, 0.9)]
    both = attach(asked, student, "alphanet", low=-0.5, high=0.9, kd_weight=1)
    low, high = (parts(attack, traces) for attack in pair)
    assert parts(both, traces) == pytest.approx(max(low, high), rel=1e-6)
    # The original decides at each position, so it is never below either.
    settings = {"variant_of": "original", "clip": 1e6, "kd_weight": 1}
    original = attach(asked, student, "alphanet", low=-0.5, high=0.9, **settings)
    assert parts(original, traces) > max(low, high)


def test_the_original_alphanet_is_its_divergence(asked, teacher, student, traces) -> None:
    attack = attach(asked, student, "alphanet", variant_of="original")

    def term(p: Tensor, q: Tensor) -> Tensor:
        return divergences.alphanet(p.log(), q.log(), -1.0, 1.0, 5.0)

    found = attack.loss(student, attack.examples(student, traces, TASK, BOUNDARY)).total
    expected = reference(teacher, student, traces, [term])
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    agree(gradients(student, found), gradients(student, expected))


def test_padding_gets_no_gradient(asked, student, traces) -> None:
    attack = attach(asked, student, "forward_kl")
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


# Weights, temperature, views


@every
def test_without_distillation_it_is_text_sft_to_the_bit(name: str, asked, student, traces) -> None:
    attack = attach(asked, student, name, kd_weight=0)
    plain = attacks.resolve({"name": "text_sft"})
    found = attack.loss(student, attack.examples(student, traces, TASK, BOUNDARY))
    expected = plain.loss(student, plain.examples(student, traces, TASK, BOUNDARY))
    assert found.count == expected.count
    assert torch.equal(found.total, expected.total)
    pairs = gradients(student, found.total), gradients(student, expected.total)
    assert all(torch.equal(one, other) for one, other in zip(*pairs, strict=True))


@every
@pytest.mark.parametrize(("weight", "temperature"), [(1.0, 1.0), (1.0, 4.0), (0.25, 0.5)])
def test_weight_and_temperature(
    name: str, weight: float, temperature: float, asked, teacher, student, traces
) -> None:
    settings = {"kd_weight": weight, "temperature": temperature}
    attack = attach(asked, student, name, **settings)
    chosen = traces[2:]
    found = attack.loss(student, attack.examples(student, chosen, TASK, BOUNDARY)).total
    expected = reference(teacher, student, chosen, PLAIN[name], weight, temperature)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    agree(gradients(student, found), gradients(student, expected))


@every
def test_the_top_of_everything_is_everything(name: str, asked, student, traces) -> None:
    full = attach(asked, student, name)
    top = attach(asked, student, name, view={"top_k": asked.rows})
    lessons = full.examples(student, traces[:3], TASK, BOUNDARY)
    one, other = full.loss(student, lessons).total, top.loss(student, lessons).total
    assert torch.equal(one, other)


@every
@pytest.mark.parametrize("top_k", [1, 5])
def test_what_is_not_shown_is_one_event(
    name: str, top_k: int, asked, teacher, student, traces
) -> None:
    attack = attach(asked, student, name, view={"top_k": top_k}, kd_weight=1)

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
    decimals: int, asked, teacher, student, traces
) -> None:
    attack = attach(asked, student, "forward_kl", view={"decimals": decimals}, kd_weight=1)

    def rounded(p: Tensor, q: Tensor) -> Tensor:
        shown = (p.log() * 10**decimals).round() / 10**decimals
        return PLAIN["forward_kl"][0](shown.softmax(-1), q)

    found = attack.loss(student, attack.examples(student, traces, TASK, BOUNDARY)).total
    expected = reference(teacher, student, traces, [rounded], weight=1)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    exact = reference(teacher, student, traces, PLAIN["forward_kl"], weight=1)
    assert found.item() != pytest.approx(exact.item(), rel=1e-5)


# Agreement


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
    name: str, tokens: int, asked, teacher, student, traces
) -> None:
    attack = attach(asked, student, name, agreement=True, kd_weight=1)
    attack.budget = tokens * asked.rows
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


def test_agreement_without_distillation_is_no_different(asked, student, traces) -> None:
    pair = [attach(asked, student, "alpha", agreement=flag, kd_weight=0) for flag in (True, False)]
    one, other = (a.loss(student, a.examples(student, traces, TASK, BOUNDARY)).total for a in pair)
    assert torch.equal(one, other)


# Undoing a matrix


@pytest.fixture(scope="module")
def defended(teacher: Loaded, features: list[Features]) -> TeacherHead:
    """The same trunk with a head into which a matrix of rank 6 is folded."""
    head = head_of(teacher.model)
    generator = torch.Generator().manual_seed(0)
    rows = len(head.weight)
    down = torch.randn(6, rows, generator=generator) / math.sqrt(rows)
    up = 0.4 * torch.randn(rows, 6, generator=generator)
    weight, bias = fold(head.weight.detach(), head.bias, up, down)
    snapshot = head.weight, head.bias
    return TeacherHead(teacher.tokenizer, weight, bias, features, snapshot=snapshot)


def test_pairs_bring_the_clean_loss_back(asked, defended, student, traces) -> None:
    def sums(teacher: TeacherHead, **settings: Any) -> tuple[float, list[Tensor]]:
        attack = attach(teacher, student, "forward_kl", kd_weight=1, **settings)
        total = attack.loss(student, attack.examples(student, traces, TASK, BOUNDARY)).total
        return total.item(), gradients(student, total)

    clean, wanted = sums(asked)

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
    everything = chunked.logits(hidden, *defended.snapshot)
    rows = [int((everything - row).abs().sum(-1).argmin()) for row in clean]
    assert len(set(rows)) == 20
    assert rows != sorted(rows)
    torch.testing.assert_close(defended.logits(hidden[rows]), seen)


def test_pairs_in_half_precision(teacher, features, student) -> None:
    head = head_of(teacher.model)
    half = head.weight.to(torch.bfloat16), torch.zeros(len(head.weight), dtype=torch.bfloat16)
    items = [replace(item, hidden=item.hidden.to(torch.bfloat16)) for item in features]
    asked = TeacherHead(teacher.tokenizer, *half, items, snapshot=half)
    clean, seen = asked.pairs(5)
    assert clean.dtype == torch.float32
    assert torch.equal(clean, seen)
    assert not clean.requires_grad


# Another vocabulary


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
    name: str, top_k: int | None, asked, teacher, stranger, traces
) -> None:
    attack = attach(asked, stranger, name, kd_weight=1, view={"top_k": top_k})
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
    view: dict[str, int], asked, stranger, traces
) -> None:
    attack = attach(asked, stranger, "reverse_kl", view=view)
    lessons = attack.examples(stranger, traces, TASK, BOUNDARY)
    whole = attack.loss(stranger, lessons)
    chunked = attach(asked, stranger, "reverse_kl", view=view)
    chunked.budget = 11 * 400
    cut = chunked.loss(stranger, lessons[::-1])
    assert cut.total.item() == pytest.approx(whole.total.item(), rel=1e-5)
    agree(gradients(stranger, cut.total), gradients(stranger, whole.total))
    parts = sum(attack.loss(stranger, [lesson]).total.item() for lesson in lessons)
    assert parts == pytest.approx(whole.total.item(), rel=1e-5)


def test_agreement_and_pairs_work_for_another_vocabulary(asked, defended, stranger, traces) -> None:
    def loss(teacher: TeacherHead, **settings: Any) -> float:
        attack = attach(teacher, stranger, "forward_kl", kd_weight=1, **settings)
        return attack.loss(stranger, attack.examples(stranger, traces, TASK, BOUNDARY)).total.item()

    clean = loss(asked)
    assert 0 < loss(asked, agreement=True) < clean
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
def test_students_learn(model: str, settings: dict[str, Any], asked, traces) -> None:
    student = load(model, device="cpu")
    attack = attach(asked, student, **settings)
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
    asked, stranger, traces
) -> None:
    full, top = (
        attach(asked, stranger, "forward_kl", view=view).examples(stranger, traces, TASK, BOUNDARY)
        for view in ({}, {"top_k": 5})
    )
    for lesson, start in zip(full, top, strict=True):
        pieces = stranger.tokenizer.convert_ids_to_tokens(list(lesson.example.completion))
        assert lesson.at.tolist() == list(range(len(pieces)))
        # Of tokens that are not shown, nobody knows how they go on.
        assert not any(pieces[index].isdigit() for index in start.at.tolist())
        assert any(piece.isdigit() for piece in pieces)


# The teacher's own texts, padded heads


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
    asked = TeacherHead(teacher.tokenizer, head.weight, head.bias, own)
    for loaded in (student, stranger):
        attack = attach(asked, loaded, "forward_kl", kd_weight=1)
        lessons = attack.examples(loaded, written, TASK, BOUNDARY)
        for lesson, trace in zip(lessons, written, strict=True):
            assert len(lesson.at) == len(lesson.example.completion)
            stops = lesson.example.completion[-1] == loaded.tokenizer.eos_token_id
            assert stops == trace.finished
    same = attach(asked, student, "forward_kl", kd_weight=1)
    found = same.loss(student, same.examples(student, written, TASK, BOUNDARY)).total
    expected = reference(teacher, student, written, PLAIN["forward_kl"], weight=1)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


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

    def loss(asked: TeacherHead, loaded: Loaded, **settings: Any) -> float:
        attack = attach(asked, loaded, "forward_kl", kd_weight=1, **settings)
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


# What is refused


def test_a_teacher_must_be_attached_first(student, traces) -> None:
    attack = attacks.resolve({"name": "abkd"})
    with pytest.raises(ValueError, match="abkd learns from a teacher's logits; attach one first"):
        attack.examples(student, traces, TASK, BOUNDARY)


def test_a_text_that_was_not_scored_is_named(asked, student) -> None:
    attack = attach(asked, student, "forward_kl")
    (other,) = ground_truth(TASK, TASK.problems("test", 1))
    with pytest.raises(ValueError, match=f"the teacher was not asked about trace {other.id}"):
        attack.examples(student, [other], TASK, BOUNDARY)


@pytest.mark.parametrize("model", ["pocket/small", "pocket/other"])
def test_a_text_rewritten_since_it_was_scored_is_refused(model: str, asked, traces) -> None:
    loaded = load(model, device="cpu")
    attack = attach(asked, loaded, "forward_kl")
    trace = traces[0]
    # As long as the other, so that a count of tokens would not tell.
    other = trace.text.replace("####", "then")
    assert other != trace.text
    rewritten = trace.with_text(other, correct=False)
    message = f"asked about another text than that of trace {trace.id}; a clean-up that rewrites"
    with pytest.raises(ValueError, match=message):
        attack.examples(loaded, [rewritten], TASK, BOUNDARY)


def test_a_view_of_too_many_tokens_is_refused(asked, student) -> None:
    with pytest.raises(ValueError, match=r"view.top_k 130 is larger than the vocabulary, 129 tok"):
        attach(asked, student, "forward_kl", view={"top_k": 130})


def test_an_inversion_wants_full_logits_and_a_snapshot(asked, defended, student) -> None:
    with pytest.raises(ValueError, match=r"needs full logits; leave out view.top_k or pairs"):
        attach(defended, student, "forward_kl", pairs=8, view={"top_k": 5})
    with pytest.raises(ValueError, match="needs the head of an undefended snapshot; none was"):
        attach(asked, student, "forward_kl", pairs=8)
    count = sum(len(item.targets) for item in defended.features.values())
    message = f"there are {count} positions to pair, but `pairs` asks for {count + 1}"
    with pytest.raises(ValueError, match=message):
        attach(defended, student, "forward_kl", pairs=count + 1)


def test_a_snapshot_is_a_state_of_the_same_model(teacher, features) -> None:
    head = head_of(teacher.model)
    other = head_of(load("pocket/proxy-a", device="cpu").model).weight
    with pytest.raises(
        ValueError, match=r"snapshot's head is \(129, \d+\) and the teacher's \(129"
    ):
        TeacherHead(teacher.tokenizer, head.weight, head.bias, features, snapshot=(other, None))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kd_weight": 1.5}, "kd_weight: .*less than or equal to 1, got 1.5"),
        ({"kd_weight": -0.1}, "kd_weight: .*greater than or equal to 0, got -0.1"),
        ({"temperature": 0}, "temperature: .*greater than 0, got 0"),
        ({"temperature": math.inf}, "temperature: .*finite number"),
        ({"pairs": -1}, "pairs: .*greater than or equal to 0, got -1"),
        ({"contexts": "both"}, "contexts: .*'truth' or 'own', got 'both'"),
        ({"view": {"top_k": 0}}, "view.top_k: .*greater than or equal to 1, got 0"),
        ({"view": {"topk": 5}}, "unknown key 'view.topk'; allowed: decimals, top_k"),
        ({"name": "alphanet", "low": 0.5, "high": 0.5}, r"low must be below high, got 0\.5 and 0"),
        ({"name": "alphanet", "low": 1.0}, r"low must be below high, got 1\.0 and 0\.9"),
        ({"name": "alphanet", "clip": 1.0}, "clip: .*greater than 1, got 1.0"),
        ({"name": "alphanet", "variant_of": "cmi"}, "variant_of: .*'abkd' or 'original'"),
        ({"name": "abkd", "alpha": math.inf}, "alpha: .*finite number"),
        ({"name": "alpha", "alpha": math.nan}, "alpha: .*finite number"),
        ({"name": "skew_kl", "skew": 1.0}, "skew: .*less than 1, got 1.0"),
        ({"name": "jensen_shannon", "share": 0.0}, "share: .*greater than 0, got 0.0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        attacks.resolve({"name": "forward_kl", **settings})


def test_variants_have_their_own_alphas() -> None:
    def alphas(**settings: Any) -> tuple[float, float]:
        return attacks.resolve({"name": "alphanet", **settings}).config.alphas

    assert alphas() == (0.2, 0.9)
    assert alphas(variant_of="original") == (-1.0, 1.0)
    assert alphas(low=0.1) == (0.1, 0.9)
    assert alphas(variant_of="original", high=0.5) == (-1.0, 0.5)


def test_the_released_limits_are_a_factor_off(asked, student, traces) -> None:
    def loss(**settings: Any) -> float:
        attack = attach(asked, student, "abkd", alpha=0.3, beta=0.0, kd_weight=1, **settings)
        return attack.loss(student, attack.examples(student, traces, TASK, BOUNDARY)).total.item()

    assert loss(release_compat=True) == pytest.approx(0.3 * loss(), rel=1e-5)
