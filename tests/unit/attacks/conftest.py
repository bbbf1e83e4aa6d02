"""Models, texts and teachers that tests of attacks on logits share."""

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from azeotrope.attacks.logits.teacher import TeacherHead
    from azeotrope.heads.features import Features
    from azeotrope.models import Loaded
    from azeotrope.traces import Trace

# Imports stand inside the fixtures: the hook that checks array shapes is installed after this file
# is read, and would miss what is already loaded.


@pytest.fixture(scope="module")
def teacher() -> "Loaded":
    from azeotrope.models import load

    return load("pocket/teacher", device="cpu")


@pytest.fixture(scope="module")
def student() -> "Loaded":
    from azeotrope.models import load

    return load("pocket/small", device="cpu")


@pytest.fixture(scope="module")
def stranger() -> "Loaded":
    """A student with another vocabulary."""
    from azeotrope.models import load

    return load("pocket/other", device="cpu")


@pytest.fixture(scope="module")
def traces() -> "list[Trace]":
    from logit_reference import TASK

    from azeotrope.traces import ground_truth

    complete = ground_truth(TASK, TASK.problems("train", 6))
    # One that was cut: no student learns to stop there.
    return [*complete[:-1], replace(complete[-1], finished=False)]


@pytest.fixture(scope="module")
def features(teacher: "Loaded", traces: "list[Trace]") -> "list[Features]":
    from logit_reference import read

    from azeotrope.heads.features import compute

    return compute(teacher.model, [read(teacher, trace) for trace in traces])


@pytest.fixture(scope="module")
def teacher_head(teacher: "Loaded", features: "list[Features]") -> "TeacherHead":
    from azeotrope.attacks.logits.teacher import TeacherHead
    from azeotrope.models import head_of

    head = head_of(teacher.model)
    return TeacherHead(teacher.tokenizer, head.weight, head.bias, features)


@pytest.fixture(scope="module")
def defended(teacher: "Loaded", features: "list[Features]") -> "TeacherHead":
    """The same trunk with a head into which a matrix of rank 6 is folded."""
    from azeotrope.attacks.logits.teacher import TeacherHead
    from azeotrope.heads.folding import fold
    from azeotrope.models import head_of

    head = head_of(teacher.model)
    generator = torch.Generator().manual_seed(0)
    rows = len(head.weight)
    down = torch.randn(6, rows, generator=generator) / math.sqrt(rows)
    up = 0.4 * torch.randn(rows, 6, generator=generator)
    weight, bias = fold(head.weight.detach(), head.bias, up, down)
    snapshot = head.weight, head.bias
    return TeacherHead(teacher.tokenizer, weight, bias, features, snapshot=snapshot)
