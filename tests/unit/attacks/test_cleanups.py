"""Clean-ups: what each does to traces, how they are specified and combined, what they report."""

from collections.abc import Sequence
from dataclasses import replace
from random import Random

import pytest

from azeotrope.attacks.cleanups import base as cleanups
from azeotrope.attacks.cleanups.base import (
    AttackerAssets,
    CleanedTraces,
    Cleanup,
    CleanupChain,
    CleanupConfig,
    CleanupCost,
    CleanupSpec,
)
from azeotrope.config import ConfigError
from azeotrope.pocket import language
from azeotrope.pocket.problems import problems
from azeotrope.tokens import Boundary
from azeotrope.traces import Trace

BOUNDARY = Boundary()
NO_ASSETS = AttackerAssets()


def trace(identity: str, text: str = "<think> 1 + 2 = 3. </think> #### 3") -> Trace:
    return Trace(
        id=identity,
        problem="sums/train/3",
        template="plain-1",
        sample=0,
        question="one and two?",
        reference="3",
        text=text,
        prompt_ids=(1, 2),
        completion_ids=(5, 6, 7),
        finished=True,
        correct=True,
        model="teacher",
        defense="none",
        decoding="greedy",
        seed=0,
    )


def cleaned(spec: CleanupSpec, traces: Sequence[Trace]) -> list[Trace]:
    return cleanups.resolve(spec).clean(traces, BOUNDARY, NO_ASSETS).traces


def test_correct_only_keeps_right_answers_untouched() -> None:
    observed = [trace("a"), replace(trace("b"), correct=False), trace("c")]
    assert cleaned("correct_only", observed) == [observed[0], observed[2]]
    assert cleaned("none", observed) == observed


def test_drop_reasoning_leaves_the_answer() -> None:
    (answer,) = cleaned("drop_reasoning", [trace("a")])
    assert answer.text == "#### 3"
    assert (answer.prompt_ids, answer.completion_ids) == ((), ())
    assert (answer.id, answer.correct, answer.question) == ("a", True, "one and two?")


def test_digits_undo_number_words() -> None:
    stream = problems("train", seed=5)
    for problem, seed in zip(stream, range(60), strict=False):
        in_words = language.reasoning(problem, Random(seed), notation="words")
        in_digits = language.reasoning(problem, Random(seed), notation="digits")
        (rewritten,) = cleaned("digits", [trace("a", text=in_words)])
        assert in_words != in_digits
        assert rewritten.text == in_digits
        assert rewritten.completion_ids == ()


def test_a_list_is_applied_in_its_order() -> None:
    observed = [trace("a", "<think> one. </think> #### 3"), replace(trace("b"), correct=False)]
    both = cleaned(["correct_only", "digits"], observed)
    assert [(item.id, item.text) for item in both] == [("a", "<think> 1. </think> #### 3")]
    assert both == cleaned("digits", cleaned("correct_only", observed))


@pytest.mark.parametrize(
    ("spec", "shortest", "label"),
    [
        ("none", "none", "none"),
        ("digits", "digits", "digits"),
        ({"name": "digits"}, "digits", "digits"),
        (["digits"], "digits", "digits"),
        ([{"name": "correct_only"}, "digits"], ["correct_only", "digits"], "correct_only+digits"),
        (
            {"name": "digits", "label": "again"},
            {"name": "digits", "label": "again"},
            "again",
        ),
    ],
)
def test_a_specification_has_one_shortest_form(
    spec: CleanupSpec, shortest: CleanupSpec, label: str
) -> None:
    chain = cleanups.resolve(spec)
    assert (chain.spec, chain.label) == (shortest, label)
    assert cleanups.resolve(chain.spec).spec == shortest


class Paraphrasing(Cleanup):
    """A clean-up that asks a model about every trace."""

    def clean(
        self, traces: Sequence[Trace], boundary: Boundary, assets: AttackerAssets
    ) -> CleanedTraces:
        if assets.paraphraser is None:
            raise ValueError("paraphrasing needs a paraphraser")
        rewritten = [item.with_text(f"{assets.paraphraser}: {item.text}", True) for item in traces]
        return CleanedTraces(rewritten, CleanupCost(queries=len(traces), tokens=7 * len(traces)))


def test_costs_add_up_and_assets_reach_every_clean_up() -> None:
    parts = [Paraphrasing(CleanupConfig(name=name)) for name in ("first", "second")]
    chain = CleanupChain((*parts, *cleanups.resolve("digits").parts))
    result = chain.clean([trace("a"), trace("b")], BOUNDARY, AttackerAssets(paraphraser="p"))
    assert (result.cost.queries, result.cost.tokens) == (4, 28)
    assert result.cost.seconds >= 0
    assert result.traces[0].text.startswith("p: p: ")
    with pytest.raises(ValueError, match="needs a paraphraser"):
        chain.clean([trace("a")], BOUNDARY, NO_ASSETS)


def test_traces_that_stay_as_they_are_cost_nothing() -> None:
    assert cleanups.resolve("none").clean([trace("a")], BOUNDARY, NO_ASSETS).cost == CleanupCost()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("polish", "unknown clean-up 'polish'; there are correct_only, digits, drop_reasoning"),
        (["digits", "none"], "unknown clean-up 'none'; there are correct_only"),
        ({"name": "digits", "bsae": 10}, "unknown key 'bsae'; allowed: label, name"),
        ({"name": "digits", "label": "a+b"}, "label: .*pattern.*got 'a\\+b'"),
        ([], "a list of clean-ups is empty; name at least one of correct_only"),
    ],
)
def test_what_does_not_fit_is_refused(spec: CleanupSpec, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cleanups.resolve(spec)
