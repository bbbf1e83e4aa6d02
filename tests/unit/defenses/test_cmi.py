"""CMI's gradient against autograd and finite differences, and the matrix that it leaves behind."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from azeotrope import models, tasks
from azeotrope.collect import collect
from azeotrope.config import ConfigError
from azeotrope.defenses import base as defenses
from azeotrope.defenses.cmi import Cmi, Config, LowRankHead
from azeotrope.defenses.doge import Config as DogeConfig
from azeotrope.defenses.doge import Doge
from azeotrope.generation import Sampling
from azeotrope.heads import chunked
from azeotrope.heads.export import export, head_from, proxy_head_from, stored_tensors
from azeotrope.heads.features import FeatureBatch, FeaturePair, compute, join, pair_up
from azeotrope.heads.head import Head
from azeotrope.heads.search import HeadTraining, Utility, train_head
from azeotrope.heads.surrogate import Surrogate, first_block, surrogate_from
from azeotrope.logits.chunks import head_logits
from azeotrope.tokens import Boundary, Example, collate, encode, from_ids
from azeotrope.traces import ground_truth
from azeotrope.training import FitConfig, NonFiniteLossError, fit
from experiment import settings

NAMED = "model.layers.1.mlp.down_proj.weight"
LAYERS = ["last", "penultimate", NAMED, "lm_head.weight"]
ROWS, HIDDEN = 129, 160
RANK = 8
OWN, TRUTH = 3, 4


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def teacher() -> models.Loaded:
    return models.load("pocket/teacher", device="cpu")


@pytest.fixture(scope="module")
def truth(teacher: models.Loaded) -> list[Example]:
    """Reference solutions that no model wrote."""
    task = tasks.build(tasks.PocketConfig())
    return [
        encode(
            teacher.tokenizer, task.messages(trace.question), trace.text,
            boundary=Boundary(), max_length=160, id=f"truth-{number}",
        )
        for number, trace in enumerate(ground_truth(task, task.problems("train", TRUTH)))
    ]  # fmt: skip


@pytest.fixture(scope="module")
def own(teacher: models.Loaded) -> list[Example]:
    """What the teacher writes."""
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


@pytest.fixture(scope="module")
def case(teacher: models.Loaded, own: list[Example], truth: list[Example]) -> Callable[..., Case]:
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
    """A head whose matrix is not zero any more, as after some steps."""
    made = cmi.parametrise(head, clean or head, rows)
    with torch.no_grad():
        made.up.copy_(0.2 * drawn(5, *made.up.shape))
    return made


def gradient(
    cmi: Cmi, head: LowRankHead, surrogates: tuple[Surrogate, ...], batch: FeatureBatch
) -> tuple[dict[str, float], Tensor]:
    """The parts of the loss, and the gradients of both factors as one vector."""
    head.zero_grad()
    found = cmi.loss(head, surrogates, batch)
    assert found.count == len(batch.targets)
    assert not found.total.requires_grad
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in (head.up, head.down)]
    return dict(found.parts), torch.cat([grad.flatten() for grad in grads])


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def cosine_only(case: Case) -> FeatureBatch:
    """The ground truth alone: without own texts there is no cross-entropy."""
    return join(case[1]).only(own=False)


# The gradient


def both_ways(
    head: Head, surrogates: tuple[Surrogate, ...], batch: FeatureBatch, **settings: Any
) -> None:
    found, expected = (
        gradient(cmi, turned(cmi, head), surrogates, batch)
        for cmi in (
            Cmi(Config(method=method, rank=RANK, **settings))
            for method in ("closed_form", "double_backward")
        )
    )
    assert set(found[0]) == {"cosine"}
    assert expected[0]["cosine"] < 0.99, "a matrix that turns nothing would prove nothing"
    assert found[0]["cosine"] == pytest.approx(expected[0]["cosine"], abs=1e-6)
    assert expected[1].norm() > 0
    assert difference(found[1], expected[1]) < 1e-5


@pytest.mark.parametrize("parametrisation", ["logits", "head"])
@pytest.mark.parametrize("cosine", ["batch", "sample"])
@pytest.mark.parametrize("layer", LAYERS)
def test_the_closed_form_is_the_double_backward(
    layer: str, cosine: str, parametrisation: str, teacher: models.Loaded, case: Callable
) -> None:
    surrogates, _ = made = case(layer)
    scale = {"logits": 3.0, "head": 30.0}[parametrisation]
    both_ways(
        head_from(teacher), surrogates, cosine_only(made),
        layer=layer, cosine=cosine, parametrisation=parametrisation, scale=scale,
    )  # fmt: skip


@pytest.mark.parametrize("cosine", ["batch", "sample"])
@pytest.mark.parametrize("layer", ["last", "lm_head.weight"])
@pytest.mark.parametrize("parametrisation", ["logits", "head"])
def test_it_is_so_with_temperature_biases_and_two_surrogates(
    layer: str, cosine: str, parametrisation: str, teacher: models.Loaded, case: Callable
) -> None:
    made = case(layer, ("pocket/proxy-a", "pocket/proxy-b"))
    biased = []
    for number, name in enumerate(("pocket/proxy-a", "pocket/proxy-b")):
        loaded = models.load(name, device="cpu")
        surrogate = surrogate_from(loaded, teacher, layer, name)
        surrogate.bias = drawn(20 + number, ROWS)
        biased.append(surrogate)
    head = Head(head_from(teacher).weight, 2 * drawn(22, ROWS))
    both_ways(
        head, tuple(biased), cosine_only(made), layer=layer, cosine=cosine,
        parametrisation=parametrisation, temperature=2.5, scale=30.0,
    )  # fmt: skip


def test_auto_takes_the_closed_form_where_there_is_one() -> None:
    assert Cmi(Config()).closed_form
    assert not Cmi(Config(method="double_backward")).closed_form
    assert not Cmi(Config(divergence="reverse_kl")).closed_form


class Written:
    """The cosine written out: whole models on whole texts, logits in float64."""

    def __init__(
        self, teacher: models.Loaded, texts: list[Example], layer: str, temperature: float
    ) -> None:
        self.batch, self.temperature = collate(texts, 0), temperature
        student = models.load("pocket/proxy-a", dtype=torch.float64, device="cpu").model
        student.set_attn_implementation("eager")
        blocks = len(student.base_model.layers)
        number = {"last": blocks - 1, "penultimate": blocks - 2}.get(layer)
        prefix = layer if number is None else f"model.layers.{number}."
        named = dict(student.named_parameters())
        self.watched = {n: p for n, p in named.items() if n.startswith(prefix)}
        assert self.watched
        arguments = {"input_ids": self.batch.input_ids, "use_cache": False}
        out = functional_call(student, self.watched, kwargs=arguments, tie_weights=False).logits
        self.log_q = (out[self.batch.mask] / temperature).log_softmax(-1)
        with torch.no_grad():
            hidden = chunked.hidden_states(teacher.model, self.batch).double()
            self.clean = hidden @ models.head_of(teacher.model).weight.double().T

    def gradient(self, logits: Tensor) -> Tensor:
        p = (logits / self.temperature).softmax(-1)
        loss = F.kl_div(self.log_q, p, reduction="sum")
        found = torch.autograd.grad(loss, list(self.watched.values()), retain_graph=True)
        return torch.cat([value.flatten() for value in found])

    def __call__(self, up: Tensor, down: Tensor) -> float:
        defended = self.clean + self.clean @ down.T @ up.T
        one, other = self.gradient(self.clean), self.gradient(defended)
        return float(F.cosine_similarity(one, other, dim=0))


@pytest.mark.parametrize("layer", LAYERS)
def test_the_gradient_is_what_finite_differences_say(
    layer: str, teacher: models.Loaded, truth: list[Example], case: Callable
) -> None:
    surrogates, _ = made = case(layer)
    cmi = Cmi(Config(layer=layer, rank=RANK, temperature=1.5, strength=1.0))
    head = turned(cmi, head_from(teacher))
    batch = cosine_only(made)
    parts, flat = gradient(cmi, head, surrogates, batch)
    written = Written(teacher, truth, layer, 1.5)
    up, down = head.up.detach().double(), head.down.detach().double()
    assert parts["cosine"] == pytest.approx(written(up, down), abs=1e-5)
    # Along the gradient itself the slope is its norm; across it nothing would be seen.
    for seed, mixed in ((0, 0.0), (1, 1.0), (2, 3.0)):
        noise = drawn(seed, len(flat))
        along = (flat / flat.norm() + mixed * noise / noise.norm()).double()
        turn = along[: up.numel()].view_as(up), along[up.numel() :].view_as(down)
        step = 1e-3
        ends = [written(up + s * step * turn[0], down + s * step * turn[1]) for s in (1, -1)]
        slope = (ends[0] - ends[1]) / (2 * step)
        # `loss` is a sum over tokens, and so is its gradient.
        expected = float(flat.double() @ along) / len(batch.targets)
        assert slope == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("method", ["closed_form", "double_backward"])
@pytest.mark.parametrize("parametrisation", ["logits", "head"])
def test_at_the_start_the_cosine_is_one_and_flat(
    parametrisation: str, method: str, teacher: models.Loaded, case: Callable
) -> None:
    surrogates, _ = made = case("penultimate")
    batch, head = cosine_only(made), head_from(teacher)
    cmi = Cmi(Config(rank=RANK, method=method, parametrisation=parametrisation))
    start = cmi.parametrise(head, head, ROWS)
    parts, flat = gradient(cmi, start, surrogates, batch)
    assert parts["cosine"] == pytest.approx(1.0, abs=1e-5)
    later = gradient(cmi, turned(cmi, head), surrogates, batch)[1]
    assert flat.norm() < 1e-3 * later.norm()
    states = batch.teacher[:5]
    torch.testing.assert_close(start.logits(states), head_logits(states, head.weight))


@pytest.mark.parametrize("cosine", ["batch", "sample"])
@pytest.mark.parametrize("layer", ["last", "lm_head.weight"])
@pytest.mark.parametrize("budget", [1, 7 * ROWS, 50 * ROWS])
def test_chunks_change_nothing(
    budget: int, layer: str, cosine: str, teacher: models.Loaded, case: Callable
) -> None:
    surrogates, pairs = case(layer)
    config = Config(layer=layer, rank=RANK, cosine=cosine)
    whole, parts = Cmi(config), Cmi(config, budget=budget)
    head, batch = head_from(teacher), join(pairs)
    assert budget < ROWS * len(batch.targets)
    expected = gradient(whole, turned(whole, head), surrogates, batch)
    found = gradient(parts, turned(parts, head), surrogates, batch)
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert difference(found[1], expected[1]) < 1e-5


def test_a_surrogate_in_bfloat16_computes_in_float32(
    teacher: models.Loaded, case: Callable
) -> None:
    made = case("last")
    low = models.load("pocket/proxy-a", dtype=torch.bfloat16, device="cpu")
    surrogates = (surrogate_from(low, teacher, "last", "proxy-a"),)
    both_ways(head_from(teacher), surrogates, cosine_only(made), layer="last")


# The matrix


@pytest.mark.parametrize("parametrisation", ["logits", "head"])
@pytest.mark.parametrize("bias", [False, True])
def test_the_folded_head_gives_the_same_logits(
    bias: bool, parametrisation: str, teacher: models.Loaded, case: Callable
) -> None:
    states = join(case("last")[1]).teacher
    weight = head_from(teacher).weight
    head = Head(weight, drawn(7, ROWS) if bias else None)
    cmi = Cmi(Config(rank=RANK, parametrisation=parametrisation))
    made = turned(cmi, head)
    folded = made.folded()
    with torch.no_grad():
        expected = made.logits(states)
        assert (expected - made.clean_logits(states)).abs().max() > 0.5
        found = head_logits(states, folded.weight, folded.bias)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert (folded.bias is None) == (not bias)
    assert folded.weight.shape == weight.shape
    # Only the two factors are trained, and folding does not change what is folded.
    assert {name for name, _ in made.named_parameters()} == {"up", "down"}
    assert torch.equal(made.weight, weight)


@pytest.mark.parametrize("parametrisation", ["logits", "head"])
@pytest.mark.parametrize("method", ["closed_form", "double_backward"])
def test_rows_that_pad_the_head_are_inert(
    method: str, parametrisation: str, teacher: models.Loaded, case: Callable
) -> None:
    surrogates, pairs = case("last")
    batch, plain = join(pairs), Head(head_from(teacher).weight, drawn(7, ROWS))
    padding = 40 * drawn(8, 7, HIDDEN), 40 * drawn(9, 7)
    padded = Head(torch.cat([plain.weight, padding[0]]), torch.cat([plain.bias, padding[1]]))
    cmi = Cmi(Config(layer="last", rank=RANK, method=method, parametrisation=parametrisation))
    one, other = turned(cmi, plain), turned(cmi, padded)
    assert one.up.shape == other.up.shape == (ROWS, RANK)
    expected = gradient(cmi, one, surrogates, batch)
    found = gradient(cmi, other, surrogates, batch)
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert difference(found[1], expected[1]) < 1e-5
    folded = other.folded()
    assert torch.equal(folded.weight[ROWS:], padding[0])
    assert torch.equal(folded.bias[ROWS:], padding[1])
    torch.testing.assert_close(folded.weight[:ROWS], one.folded().weight)
    torch.testing.assert_close(folded.bias[:ROWS], one.folded().bias)
    assert not torch.equal(folded.weight[:ROWS], plain.weight)


def test_the_seed_decides_the_matrix_and_the_scale_its_size(teacher: models.Loaded) -> None:
    head = head_from(teacher)

    def down(**settings: Any) -> Tensor:
        return Cmi(Config(**settings)).parametrise(head, head, ROWS).down.detach()

    assert torch.equal(down(seed=3), down(seed=3))
    assert not torch.equal(down(seed=3), down(seed=4))
    torch.testing.assert_close(down(scale=6.0), 2 * down(scale=3.0))
    assert float(down(rank=128).std()) == pytest.approx(3.0 / ROWS**0.5, rel=0.05)
    wide = down(rank=128, parametrisation="head")
    assert wide.shape == (128, HIDDEN)
    assert float(wide.std()) == pytest.approx(3.0 / HIDDEN**0.5, rel=0.05)


# Texts


@pytest.mark.parametrize("utility_on", ["own", "truth", "both"])
@pytest.mark.parametrize("cosine_on", ["own", "truth", "both"])
def test_each_term_looks_at_its_own_texts(
    cosine_on: str, utility_on: str, teacher: models.Loaded, case: Callable
) -> None:
    surrogates, pairs = case("last")
    # Texts of both kinds in turn, so that picking the first ones would be found out.
    batch = join([pairs[number] for number in (0, 3, 1, 4, 2, 5, 6)])
    config = Config(
        layer="last", rank=RANK, strength=0.4, utility_on=utility_on, cosine_on=cosine_on
    )
    cmi = Cmi(config)
    head = turned(cmi, head_from(teacher))
    found = cmi.loss(head, surrogates, batch)
    kinds = {"own": [True], "truth": [False], "both": [True, False]}

    def chosen(contexts: str) -> FeatureBatch:
        return join([pair for pair in pairs if pair.teacher.own in kinds[contexts]])

    useful = chosen(utility_on)
    logits = head.logits(useful.teacher)
    expected = {
        "cross-entropy": F.cross_entropy(logits, useful.targets).item(),
        "cosine": cmi.score(head, surrogates, chosen(cosine_on)),
    }
    assert found.parts == pytest.approx(expected, rel=1e-5)
    total = expected["cross-entropy"] + 0.4 * expected["cosine"]
    assert float(found.total) == pytest.approx(total * found.count, rel=1e-5)


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
    _, found = gradient(cmi, head, surrogates, batch)
    head.zero_grad()
    mine = batch.only(own=True)
    (len(batch.targets) * F.cross_entropy(head.logits(mine.teacher), mine.targets)).backward()
    expected = torch.cat([head.up.grad.flatten(), head.down.grad.flatten()])
    assert difference(found, expected) < 1e-5


@pytest.mark.parametrize("cosine", ["batch", "sample"])
@pytest.mark.parametrize("method", ["closed_form", "double_backward"])
def test_the_score_is_the_cosine_and_trains_nothing(
    method: str, cosine: str, teacher: models.Loaded, case: Callable
) -> None:
    surrogates, pairs = case("last")
    batch = join(pairs)
    cmi = Cmi(Config(layer="last", rank=RANK, cosine=cosine, method=method))
    head = turned(cmi, head_from(teacher))
    found = cmi.score(head, surrogates, batch)
    assert head.up.grad is None
    assert head.down.grad is None
    assert found == pytest.approx(cmi.loss(head, surrogates, batch).parts["cosine"], rel=1e-6)
    assert cmi.score(head, surrogates, batch.only(own=True)) is None
    if cosine == "sample":
        alone = [
            cmi.score(head, surrogates, join([pair])) for pair in pairs if not pair.teacher.own
        ]
        assert found == pytest.approx(sum(alone) / len(alone), rel=1e-6)


# Faults


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
def test_of_several_texts_the_guilty_one_is_named(
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
    ("given", "expected"),
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
    given: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    part = {"name": "cmi", **given}
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


# Training


@pytest.mark.parametrize(
    ("divergence", "parameters"),
    [
        ("forward_kl", {}),
        ("reverse_kl", {}),
        ("alpha", {"a": 0.5}),
        ("alpha_beta", {"a": 0.2, "b": 0.7}),
        ("skew_kl", {}),
        ("jensen_shannon", {}),
    ],
)
def test_any_divergence_can_be_turned_away(
    divergence: str, parameters: dict[str, float], teacher: models.Loaded, case: Callable
) -> None:
    surrogates, _ = made = case("last")
    batch = cosine_only(made)
    cmi = Cmi(
        Config(
            layer="last", rank=RANK, strength=1.0, method="double_backward",
            divergence=divergence, parameters=parameters,
        )
    )  # fmt: skip
    head = cmi.parametrise(head_from(teacher), head_from(teacher), ROWS)
    with torch.no_grad():
        # At zero the slope is zero: any small step leaves the plateau.
        head.up.copy_(0.01 * drawn(6, *head.up.shape))
    before = cmi.score(head, surrogates, batch)
    config = FitConfig(steps=12, batch_size=1, learning_rate=0.01, warmup=0.0)
    fit(
        list(head.parameters()), [batch], lambda items: cmi.loss(head, surrogates, items[0]), config
    )
    after = cmi.score(head, surrogates, batch)
    assert before is not None
    assert after is not None
    assert before > 0.99
    assert after < before - 0.02


def trained(
    cmi: Cmi, head: Head, surrogates: tuple[Any, ...], pairs: list[FeaturePair], **changes: object
) -> Any:
    training = {
        "fit": {"steps": 40, "batch_size": 4, "learning_rate": 2e-2},
        "floor": {"rounds": 1, "problems": 1},
        "held_out": 2,
        **changes,
    }
    fine = Utility(1.0, 1.0)
    return train_head(
        head,
        surrogates,
        pairs,
        cmi,
        HeadTraining.model_validate(training),
        measure=lambda _: fine,
        clean=fine,
    )


def test_training_lowers_the_cosine_on_texts_held_out(
    teacher: models.Loaded, case: Callable
) -> None:
    surrogates, pairs = case("last")
    cmi = Cmi(Config(layer="last", rank=32, strength=1.0))
    head = cmi.parametrise(head_from(teacher), head_from(teacher), ROWS)
    # The last two texts are the ones that training does not see.
    held_out = join(pairs[-2:])
    assert cmi.score(head, surrogates, held_out) == pytest.approx(1.0, abs=1e-5)
    result = trained(cmi, head, surrogates, pairs)
    after = cmi.score(head, surrogates, held_out)
    assert after is not None
    assert after < 0.95
    assert result.rounds[0].score == pytest.approx(after)
    assert result.log[-1].parts.keys() == {"cross-entropy", "cosine"}


def test_doge_then_cmi_is_one_plain_checkpoint(
    teacher: models.Loaded, own: list[Example], truth: list[Example], case: Callable, tmp_path: Path
) -> None:
    clean = head_from(teacher)
    prompts = [list(text.prompt) for text in truth]
    # First DOGe, on last hidden states, exported as a workflow does.
    proxy = models.load("pocket/proxy-a", device="cpu")
    theirs = compute(proxy.model, own)
    first = Doge(DogeConfig(strength=0.3))
    doged = head_from(teacher)
    training = HeadTraining.model_validate({"fit": {"steps": 20, "batch_size": 3}, "floor": None})
    against = (proxy_head_from(proxy, teacher, "proxy-a"),)
    train_head(doged, against, pair_up(compute(teacher.model, own), [theirs]), first, training)
    other = models.load("pocket/teacher", device="cpu")
    export(other, doged, tmp_path / "doge", prompts)
    loaded = models.load(str(tmp_path / "doge"), device="cpu")

    # Then CMI on that head; what it turns away from is still the undefended teacher.
    surrogates, pairs = case("last")
    second = Cmi(Config(layer="last", rank=16, strength=1.0))
    head = second.parametrise(head_from(loaded), clean, ROWS)
    states = join(pairs).teacher
    torch.testing.assert_close(head.clean_logits(states), head_logits(states, clean.weight))
    torch.testing.assert_close(head.logits(states), head_logits(states, doged.weight))
    assert (head.logits(states) - head.clean_logits(states)).abs().max() > 0.1
    before = second.score(head, surrogates, join(pairs))
    assert before is not None
    assert before < 0.9999
    trained(second, head, surrogates, pairs)
    after = second.score(head, surrogates, join(pairs))
    assert after is not None
    assert after < before - 0.02

    check = export(loaded, head.folded(), tmp_path / "both", prompts)
    assert check.prompts == len(prompts)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "both", dtype=torch.float32).eval()
    assert type(plain) is type(teacher.model)
    for text in truth:
        ids = torch.tensor([text.prompt + text.completion])
        with torch.no_grad():
            hidden = teacher.model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
            expected = head.logits(hidden)
            found = plain(input_ids=ids).logits[0]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    # Nothing of ours is in it: the teacher's tensors, and the head apart from the embedding.
    names = set(stored_tensors(tmp_path / "both"))
    assert names == set(teacher.model.state_dict()) | {"lm_head.weight"}
    assert "auto_map" not in json.loads((tmp_path / "both" / "config.json").read_text())
    assert not list((tmp_path / "both").glob("*.py"))


# What restrains the matrix


def test_greedy_targets_are_the_undefended_teachers_likeliest(
    teacher: models.Loaded, case: Callable
) -> None:
    surrogates, pairs = case("last")
    mine = join(pairs).only(own=True)
    cmi = Cmi(Config(layer="last", rank=RANK, strength=0.0, utility_on="own", targets="greedy"))
    clean = head_from(teacher)
    head = turned(cmi, clean)
    parts, found = gradient(cmi, head, surrogates, mine)
    likeliest = (mine.teacher @ clean.weight.detach().T).argmax(-1)
    head.zero_grad()
    expected = F.cross_entropy(head.logits(mine.teacher), likeliest)
    assert parts["cross-entropy"] == pytest.approx(expected.item(), rel=1e-5)
    (len(mine.targets) * expected).backward()
    assert head.up.grad is not None
    assert head.down.grad is not None
    assert difference(found, torch.cat([head.up.grad.flatten(), head.down.grad.flatten()])) < 1e-5


def restrained_gradient(teacher: models.Loaded, states: Tensor, **settings: Any) -> Tensor:
    """What a gradient of random numbers on the logits becomes in B, restrained by the settings."""
    cmi = Cmi(Config(layer="last", rank=RANK, **settings))
    head = turned(cmi, head_from(teacher))
    (cmi._restrained(head, states) * drawn(7, len(states), ROWS)).sum().backward()
    assert head.up.grad is not None
    return head.up.grad


def test_a_kept_margin_takes_its_own_direction_out_of_the_gradient(
    teacher: models.Loaded, case: Callable
) -> None:
    states = join(case("last")[1]).teacher[:20]
    head = turned(Cmi(Config(layer="last", rank=RANK)), head_from(teacher))
    pushed = drawn(7, len(states), ROWS)
    with torch.no_grad():
        first, second = head.logits(states).topk(2, dim=-1).indices.T
    row = torch.arange(len(states))
    # Half of the difference leaves the one and goes to the other: their gradients become equal.
    mean = (pushed[row, first] + pushed[row, second]) / 2
    expected = pushed.clone()
    expected[row, first] = mean
    expected[row, second] = mean
    (head.logits(states) * expected).sum().backward()
    assert head.up.grad is not None
    found = restrained_gradient(teacher, states, keep_margin=True)
    torch.testing.assert_close(found, head.up.grad)
    assert not torch.allclose(found, restrained_gradient(teacher, states))


def test_top_k_lets_only_the_clean_teachers_likeliest_move(
    teacher: models.Loaded, case: Callable
) -> None:
    states = join(case("last")[1]).teacher[:20]
    clean = head_from(teacher)
    head = turned(Cmi(Config(layer="last", rank=RANK)), clean)
    likeliest = (states @ clean.weight.detach().T).topk(3, dim=-1).indices
    kept = torch.zeros(len(states), ROWS).scatter(-1, likeliest, 1.0)
    (head.logits(states) * (drawn(7, len(states), ROWS) * kept)).sum().backward()
    assert head.up.grad is not None
    found = restrained_gradient(teacher, states, top_k=3)
    torch.testing.assert_close(found, head.up.grad)
    everything = restrained_gradient(teacher, states, top_k=ROWS)
    torch.testing.assert_close(everything, restrained_gradient(teacher, states))


def test_more_than_the_vocabulary_is_no_top_k(teacher: models.Loaded) -> None:
    cmi = Cmi(Config(rank=RANK, top_k=ROWS + 1))
    with pytest.raises(ValueError, match=f"top_k {ROWS + 1} is larger than the vocabulary"):
        cmi.parametrise(head_from(teacher), head_from(teacher), ROWS)


@pytest.mark.parametrize("settings", [{"keep_margin": True}, {"top_k": 4}])
def test_both_ways_to_the_gradient_are_restrained_alike(
    teacher: models.Loaded, case: Callable, settings: dict[str, Any]
) -> None:
    surrogates, _ = case("last")
    both_ways(head_from(teacher), surrogates, cosine_only(case("last")), layer="last", **settings)
