"""Attacks on logits: settings, texts and teachers that are refused."""

import math
from typing import Any

import pytest
from logit_reference import (
    BOUNDARY,
    TASK,
    attach,
)

from azeotrope.attacks import base as attacks
from azeotrope.attacks.logits.teacher import TeacherHead
from azeotrope.config import ConfigError
from azeotrope.models import head_of, load
from azeotrope.traces import ground_truth


def test_a_teacher_must_be_attached_first(student, traces) -> None:
    attack = attacks.resolve({"name": "abkd"})
    with pytest.raises(ValueError, match="abkd learns from a teacher's logits; attach one first"):
        attack.examples(student, traces, TASK, BOUNDARY)


def test_a_text_that_was_not_scored_is_named(teacher_head, student) -> None:
    attack = attach(teacher_head, student, "forward_kl")
    (other,) = ground_truth(TASK, TASK.problems("test", 1))
    with pytest.raises(ValueError, match=f"the teacher was not asked about trace {other.id}"):
        attack.examples(student, [other], TASK, BOUNDARY)


@pytest.mark.parametrize("model", ["pocket/small", "pocket/other"])
def test_a_text_rewritten_since_it_was_scored_is_refused(model: str, teacher_head, traces) -> None:
    loaded = load(model, device="cpu")
    attack = attach(teacher_head, loaded, "forward_kl")
    trace = traces[0]
    # As long as the other, so that a count of tokens would not tell.
    other = trace.text.replace("####", "then")
    assert other != trace.text
    rewritten = trace.with_text(other, correct=False)
    message = f"asked about another text than that of trace {trace.id}; a clean-up that rewrites"
    with pytest.raises(ValueError, match=message):
        attack.examples(loaded, [rewritten], TASK, BOUNDARY)


def test_a_view_of_too_many_tokens_is_refused(teacher_head, student) -> None:
    with pytest.raises(ValueError, match=r"view.top_k 130 is larger than the vocabulary, 129 tok"):
        attach(teacher_head, student, "forward_kl", view={"top_k": 130})


def test_an_inversion_wants_full_logits_and_a_snapshot(teacher_head, defended, student) -> None:
    with pytest.raises(ValueError, match=r"needs full logits; leave out view.top_k or pairs"):
        attach(defended, student, "forward_kl", pairs=8, view={"top_k": 5})
    with pytest.raises(ValueError, match="needs the head of an undefended snapshot; none was"):
        attach(teacher_head, student, "forward_kl", pairs=8)
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
        return attacks.resolve({"name": "alphanet", **settings}).config.divergence.alphas

    assert alphas() == (0.2, 0.9)
    assert alphas(variant_of="original") == (-1.0, 1.0)
    assert alphas(low=0.1) == (0.1, 0.9)
    assert alphas(variant_of="original", high=0.5) == (-1.0, 0.5)


def test_the_released_limits_are_a_factor_off(teacher_head, student, traces) -> None:
    def loss(**settings: Any) -> float:
        attack = attach(teacher_head, student, "abkd", alpha=0.3, beta=0.0, kd_weight=1, **settings)
        return attack.loss(student, attack.examples(student, traces, TASK, BOUNDARY)).total.item()

    assert loss(release_compat=True) == pytest.approx(0.3 * loss(), rel=1e-5)
