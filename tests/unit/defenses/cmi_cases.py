"""Teachers, texts and surrogates for the tests of CMI."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from azeotrope import models, tasks
from azeotrope.collect import collect
from azeotrope.defenses.cmi import Cmi, Config, LowRankHead
from azeotrope.generation import Sampling
from azeotrope.heads.features import FeatureBatch, FeaturePair, compute, join, pair_up
from azeotrope.heads.head import Head
from azeotrope.heads.surrogate import Surrogate, first_block, surrogate_from
from azeotrope.tokens import Boundary, Example, encode, from_ids
from azeotrope.traces import ground_truth

NAMED = "model.layers.1.mlp.down_proj.weight"
LAYERS = ["last", "penultimate", NAMED, "lm_head.weight"]
ROWS, HIDDEN = 129, 160
RANK = 8
OWN, TRUTH = 3, 4


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def truth_examples(teacher: models.Loaded) -> list[Example]:
    """Reference solutions that no model wrote."""
    task = tasks.build(tasks.PocketConfig())
    return [
        encode(
            teacher.tokenizer, task.messages(trace.question), trace.text,
            boundary=Boundary(), max_length=160, id=f"truth-{number}",
        )
        for number, trace in enumerate(ground_truth(task, task.problems("train", TRUTH)))
    ]  # fmt: skip


def own_examples(teacher: models.Loaded) -> list[Example]:
    """Completions that the teacher writes."""
    task = tasks.build(tasks.PocketConfig())
    problems = task.problems("train", OWN, skip=50)
    return [
        from_ids(
            teacher.tokenizer, trace.prompt_ids, trace.completion_ids,
            boundary=Boundary(), max_length=160, id=f"own-{number}",
        )
        for number, trace in enumerate(collect(teacher, task, problems, Sampling(temperature=0.0)))
    ]  # fmt: skip


def features_of(
    teacher: models.Loaded,
    layer: str,
    names: Sequence[str],
    examples: Sequence[tuple[Sequence[Example], bool]],
) -> list[FeaturePair]:
    pairs: list[FeaturePair] = []
    for texts, is_own in examples:
        ours = compute(teacher.model, texts, own=is_own)
        theirs = []
        for name in names:
            proxy = models.load(name, device="cpu").model
            block = first_block(proxy, layer)
            theirs.append(compute(proxy, texts, before_block=block, own=is_own))
        pairs += pair_up(ours, theirs)
    return pairs


Case = tuple[tuple[Surrogate, ...], list[FeaturePair]]


def case_maker(
    teacher: models.Loaded, own: list[Example], truth: list[Example]
) -> Callable[..., Case]:
    """Surrogates cut at a layer, and the features that belong to them; made once each."""
    made: dict[tuple[str, ...], Case] = {}

    def build(layer: str, names: tuple[str, ...] = ("pocket/proxy-a",)) -> Case:
        if (layer, *names) not in made:
            surrogates = tuple(
                surrogate_from(models.load(name, device="cpu"), teacher, layer, name)
                for name in names
            )
            made[(layer, *names)] = (
                surrogates,
                features_of(teacher, layer, names, [(own, True), (truth, False)]),
            )
        return made[(layer, *names)]

    return build


def turned(cmi: Cmi, head: Head, clean: Head | None = None, rows: int = ROWS) -> LowRankHead:
    """A head whose matrix is no longer zero, as after some steps."""
    made = cmi.parametrise(head, clean or head, rows)
    with torch.no_grad():
        made.up.copy_(0.2 * drawn(5, *made.up.shape))
    return made


def gradient(
    cmi: Cmi, head: LowRankHead, surrogates: tuple[Surrogate, ...], batch: FeatureBatch
) -> tuple[dict[str, float], Tensor]:
    """The parts of the loss, and the gradients of both factors as one vector."""
    head.zero_grad()
    actual = cmi.loss(head, surrogates, batch)
    assert actual.count == len(batch.targets)
    assert not actual.total.requires_grad
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in (head.up, head.down)]
    return dict(actual.parts), torch.cat([grad.flatten() for grad in grads])


def difference(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def cosine_only(case: Case) -> FeatureBatch:
    """The ground truth alone: without own texts there is no cross-entropy."""
    return join(case[1]).only(own=False)


def both_ways(
    head: Head, surrogates: tuple[Surrogate, ...], batch: FeatureBatch, **settings: Any
) -> None:
    actual, expected = (
        gradient(cmi, turned(cmi, head), surrogates, batch)
        for cmi in (
            Cmi(Config(method=method, rank=RANK, **settings))
            for method in ("closed_form", "double_backward")
        )
    )
    assert set(actual[0]) == {"cosine"}
    assert expected[0]["cosine"] < 0.99, "a matrix that turns nothing would prove nothing"
    assert actual[0]["cosine"] == pytest.approx(expected[0]["cosine"], abs=1e-6)
    assert expected[1].norm() > 0
    assert difference(actual[1], expected[1]) < 1e-5
