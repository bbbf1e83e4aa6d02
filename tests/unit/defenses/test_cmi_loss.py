"""The terms of CMI's loss, and the settings and data that it refuses."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cmi_cases import (
    HIDDEN,
    RANK,
    ROWS,
    TRUTH,
    cosine_only,
    difference,
    gradient,
    turned,
)
from torch import nn

from azeotrope import models
from azeotrope.config import ConfigError
from azeotrope.defenses import base as defenses
from azeotrope.defenses.cmi import Cmi, Config
from azeotrope.heads.export import head_from
from azeotrope.heads.features import FeatureBatch, FeaturePair, join
from azeotrope.heads.surrogate import surrogate_from
from azeotrope.training import NonFiniteLossError
from experiment import settings


@pytest.mark.parametrize("utility_on", ["own", "truth", "both"])
@pytest.mark.parametrize("cosine_on", ["own", "truth", "both"])
def test_each_term_looks_at_its_own_texts(
    cosine_on: str, utility_on: str, teacher: models.Loaded, case: Callable
) -> None:
    surrogates, pairs = case("last")
    # Texts of both kinds in turn, so that picking the first ones fails.
    batch = join([pairs[number] for number in (0, 3, 1, 4, 2, 5, 6)])
    config = Config(
        layer="last", rank=RANK, strength=0.4, utility_on=utility_on, cosine_on=cosine_on
    )
    cmi = Cmi(config)
    head = turned(cmi, head_from(teacher))
    actual = cmi.loss(head, surrogates, batch)
    kinds = {"own": [True], "truth": [False], "both": [True, False]}

    def chosen(contexts: str) -> FeatureBatch:
        return join([pair for pair in pairs if pair.teacher.own in kinds[contexts]])

    useful = chosen(utility_on)
    logits = head.logits(useful.teacher)
    expected = {
        "cross-entropy": F.cross_entropy(logits, useful.targets).item(),
        "cosine": cmi.score(head, surrogates, chosen(cosine_on)),
    }
    assert actual.parts == pytest.approx(expected, rel=1e-5)
    total = expected["cross-entropy"] + 0.4 * expected["cosine"]
    assert float(actual.total) == pytest.approx(total * actual.count, rel=1e-5)


def test_a_term_without_texts_is_left_out(teacher: models.Loaded, case: Callable) -> None:
    surrogates, pairs = case("last")
    cmi = Cmi(Config(layer="last", rank=RANK))
    head, whole = turned(cmi, head_from(teacher)), join(pairs)
    assert cmi.loss(head, surrogates, whole.only(own=True)).parts.keys() == {"cross-entropy"}
    assert cmi.loss(head, surrogates, whole.only(own=False)).parts.keys() == {"cosine"}


def test_the_gradient_of_the_utility_is_that_of_cross_entropy(
    teacher: models.Loaded, case: Callable
) -> None:
    surrogates, pairs = case("last")
    batch = join(pairs)
    cmi = Cmi(Config(layer="last", rank=RANK, strength=0.0, utility_on="own"))
    head = turned(cmi, head_from(teacher))
    _, actual = gradient(cmi, head, surrogates, batch)
    head.zero_grad()
    mine = batch.only(own=True)
    (len(batch.targets) * F.cross_entropy(head.logits(mine.teacher), mine.targets)).backward()
    expected = torch.cat([head.up.grad.flatten(), head.down.grad.flatten()])
    assert difference(actual, expected) < 1e-5


@pytest.mark.parametrize("cosine", ["batch", "sample"])
@pytest.mark.parametrize("method", ["closed_form", "double_backward"])
def test_the_score_is_the_cosine_and_trains_nothing(
    method: str, cosine: str, teacher: models.Loaded, case: Callable
) -> None:
    surrogates, pairs = case("last")
    batch = join(pairs)
    cmi = Cmi(Config(layer="last", rank=RANK, cosine=cosine, method=method))
    head = turned(cmi, head_from(teacher))
    actual = cmi.score(head, surrogates, batch)
    assert head.up.grad is None
    assert head.down.grad is None
    assert actual == pytest.approx(cmi.loss(head, surrogates, batch).parts["cosine"], rel=1e-6)
    assert cmi.score(head, surrogates, batch.only(own=True)) is None
    if cosine == "sample":
        alone = [
            cmi.score(head, surrogates, join([pair])) for pair in pairs if not pair.teacher.own
        ]
        assert actual == pytest.approx(sum(alone) / len(alone), rel=1e-6)


@pytest.mark.parametrize("method", ["closed_form", "double_backward"])
def test_a_gradient_that_vanishes_names_the_texts(
    method: str, teacher: models.Loaded, case: Callable
) -> None:
    made = case("last")
    loaded = models.load("pocket/proxy-a", device="cpu")
    surrogate = surrogate_from(loaded, teacher, "last", "proxy-a")
    surrogate.weight = nn.Buffer(torch.zeros_like(surrogate.weight))
    cmi = Cmi(Config(layer="last", rank=RANK, method=method))
    names = ", ".join(f"truth-{number}" for number in range(TRUTH))
    with pytest.raises(NonFiniteLossError, match=f"is nan on {names}: a gradient vanished"):
        cmi.loss(turned(cmi, head_from(teacher)), (surrogate,), cosine_only(made))


@pytest.mark.parametrize("method", ["closed_form", "double_backward"])
def test_of_several_texts_the_faulty_one_is_named(
    method: str, teacher: models.Loaded, case: Callable
) -> None:
    surrogates, pairs = case("last")
    broken = [pair for pair in pairs if not pair.teacher.own]
    bad = torch.full_like(broken[2].teacher.hidden, torch.nan)
    ours = type(broken[2].teacher)(**{**vars(broken[2].teacher), "hidden": bad})
    broken[2] = FeaturePair(ours, broken[2].proxies)
    cmi = Cmi(Config(layer="last", rank=RANK, method=method, cosine="sample"))
    head = turned(cmi, head_from(teacher))
    with pytest.raises(NonFiniteLossError, match="is nan on truth-2: a gradient"):
        cmi.loss(head, surrogates, join(broken))
    with pytest.raises(NonFiniteLossError, match="is nan on truth-2: a gradient"):
        cmi.score(head, surrogates, join(broken))


def test_without_a_surrogate_it_says_what_is_missing(
    teacher: models.Loaded, case: Callable
) -> None:
    cmi = Cmi(Config(rank=RANK))
    batch = cosine_only(case("last"))
    with pytest.raises(ValueError, match="cmi needs at least one proxy; name one under `proxies`"):
        cmi.loss(turned(cmi, head_from(teacher)), (), batch)


def test_a_rank_beyond_the_hidden_size_is_refused(teacher: models.Loaded) -> None:
    head = head_from(teacher)
    Cmi(Config(rank=HIDDEN)).parametrise(head, head, ROWS)
    with pytest.raises(ValueError, match="rank 161 is larger than the teacher's hidden size 160"):
        Cmi(Config(rank=HIDDEN + 1)).parametrise(head, head, ROWS)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rank": 0}, "rank: Input should be greater than or equal to 1, got 0"),
        ({"scale": 0}, "scale: Input should be greater than 0, got 0"),
        ({"temperature": 0}, "temperature: Input should be greater than 0, got 0"),
        ({"cosine_on": "all"}, "cosine_on: Input should be 'own', 'truth' or 'both', got 'all'"),
        (
            {"method": "closed_form", "divergence": "reverse_kl"},
            "method closed_form needs forward_kl: the gradient of reverse_kl is not linear in the "
            "teacher's probabilities; use auto or double_backward",
        ),
        ({"strength": math.inf}, "strength: Input should be a finite number"),
        ({"temperature": math.inf}, "temperature: Input should be a finite number"),
        (
            {"divergence": "alphanet"},
            "divergence alphanet holds the teacher fixed in its published gradient, so nothing "
            "would reach the matrix; use alpha or alpha_beta",
        ),
        ({"divergence": "kl"}, "unknown divergence 'kl'; there are forward_kl, reverse_kl,"),
        ({"divergence": "alpha"}, "alpha takes the parameters: a (it needs: a); got: none"),
        (
            {"parameters": {"a": 0.5}},
            "forward_kl takes the parameters: none (it needs: none); got: a",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused_in_one_line(
    changes: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    part = {"name": "cmi", **changes}
    with pytest.raises(ValueError) as error:  # noqa: PT011
        defenses.resolve(part)
    assert expected in str(error.value)
    # The same through a file, where it is an error of the configuration.
    path = tmp_path / "trial.yaml"
    path.write_text(json.dumps({"name": "trial", "defenses": [{"parts": [part]}]}))
    with pytest.raises(ConfigError) as refused:
        settings.load(str(path), [])
    assert expected in str(refused.value)
    assert "\n" not in str(refused.value)


def test_more_than_the_vocabulary_is_no_top_k(teacher: models.Loaded) -> None:
    cmi = Cmi(Config(rank=RANK, top_k=ROWS + 1))
    with pytest.raises(ValueError, match=f"top_k {ROWS + 1} is larger than the vocabulary"):
        cmi.parametrise(head_from(teacher), head_from(teacher), ROWS)
