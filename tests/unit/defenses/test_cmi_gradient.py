"""CMI's gradient against double backward, finite differences and autograd."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cmi_cases import (
    LAYERS,
    RANK,
    ROWS,
    both_ways,
    cosine_only,
    difference,
    drawn,
    gradient,
    turned,
)
from torch import Tensor
from torch.func import functional_call

from azeotrope import models
from azeotrope.defenses.cmi import Cmi, Config
from azeotrope.heads import chunked
from azeotrope.heads.export import head_from
from azeotrope.heads.features import join
from azeotrope.heads.gradient_cosine import restrained_logits
from azeotrope.heads.head import Head
from azeotrope.heads.surrogate import surrogate_from
from azeotrope.logits.chunks import head_logits
from azeotrope.tokens import Example, collate


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
    assert Cmi(Config()).cosine.closed_form
    assert not Cmi(Config(method="double_backward")).cosine.closed_form
    assert not Cmi(Config(divergence="reverse_kl")).cosine.closed_form


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
        gradients = torch.autograd.grad(loss, list(self.watched.values()), retain_graph=True)
        return torch.cat([value.flatten() for value in gradients])

    def __call__(self, up: Tensor, down: Tensor) -> float:
        defended = self.clean + self.clean @ down.T @ up.T
        gradients = self.gradient(self.clean), self.gradient(defended)
        return float(F.cosine_similarity(*gradients, dim=0))


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
    # Along the gradient itself the slope is its norm; across it the slope is zero.
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
    actual = gradient(parts, turned(parts, head), surrogates, batch)
    assert actual[0] == pytest.approx(expected[0], rel=1e-5)
    assert difference(actual[1], expected[1]) < 1e-5


def test_a_surrogate_in_bfloat16_computes_in_float32(
    teacher: models.Loaded, case: Callable
) -> None:
    made = case("last")
    low = models.load("pocket/proxy-a", dtype=torch.bfloat16, device="cpu")
    surrogates = (surrogate_from(low, teacher, "last", "proxy-a"),)
    both_ways(head_from(teacher), surrogates, cosine_only(made), layer="last")


def restrained_gradient(
    teacher: models.Loaded,
    states: Tensor,
    *,
    top_k: int | None = None,
    keep_margin: bool = False,
) -> Tensor:
    """What a gradient of random numbers on the logits becomes in B, restrained by the settings."""
    head = turned(Cmi(Config(layer="last", rank=RANK)), head_from(teacher))
    logits = restrained_logits(head, states, top_k=top_k, keep_margin=keep_margin)
    (logits * drawn(7, len(states), ROWS)).sum().backward()
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
    actual = restrained_gradient(teacher, states, keep_margin=True)
    torch.testing.assert_close(actual, head.up.grad)
    assert not torch.allclose(actual, restrained_gradient(teacher, states))


def test_top_k_lets_only_the_clean_teachers_likeliest_move(
    teacher: models.Loaded, case: Callable
) -> None:
    states = join(case("last")[1]).teacher[:20]
    clean = head_from(teacher)
    head = turned(Cmi(Config(layer="last", rank=RANK)), clean)
    likeliest = (states @ clean.weight.detach().T).topk(3, dim=-1).indices
    likeliest_mask = torch.zeros(len(states), ROWS).scatter(-1, likeliest, 1.0)
    (head.logits(states) * (drawn(7, len(states), ROWS) * likeliest_mask)).sum().backward()
    assert head.up.grad is not None
    actual = restrained_gradient(teacher, states, top_k=3)
    torch.testing.assert_close(actual, head.up.grad)
    unrestrained = restrained_gradient(teacher, states, top_k=ROWS)
    torch.testing.assert_close(unrestrained, restrained_gradient(teacher, states))


@pytest.mark.parametrize("settings", [{"keep_margin": True}, {"top_k": 4}])
def test_both_ways_to_the_gradient_are_restrained_alike(
    teacher: models.Loaded, case: Callable, settings: dict[str, Any]
) -> None:
    surrogates, _ = case("last")
    both_ways(head_from(teacher), surrogates, cosine_only(case("last")), layer="last", **settings)
