"""The finite difference is the derivative, or the step is refused."""

import pytest
import torch

from azeotrope import models
from azeotrope.decoding import DecodingRow
from azeotrope.proxies.companion import Companion
from azeotrope.proxies.direction import downstream_gradient, mean_loss
from azeotrope.proxies.perturbed import (
    Context,
    PerturbedPair,
    choose_epsilon,
    exact_change,
    length_of,
    relative_errors,
)
from azeotrope.tokens import Boundary, encode

TEXTS = [
    ("how many ?", "at first 7 . then 7 - 6 = 1 . #### 1"),
    ("how many eggs ?", "start with 2 . double 2 gives 4 . #### 4"),
]


@pytest.fixture(scope="module", params=["pocket/proxy-a", "pocket/proxy-b"])
def proxy(request: pytest.FixtureRequest) -> models.Loaded:
    return models.load(request.param, dtype=torch.float32)


@pytest.fixture(scope="module")
def examples(proxy: models.Loaded):
    return [
        encode(
            proxy.tokenizer,
            [{"role": "user", "content": question}],
            text,
            boundary=Boundary(),
            max_length=160,
        )
        for question, text in TEXTS
    ]


@pytest.fixture(scope="module")
def direction(proxy: models.Loaded, examples) -> dict[str, torch.Tensor]:
    return downstream_gradient(proxy, examples)[0]


@pytest.fixture(scope="module")
def contexts(examples) -> list[Context]:
    return [Context((*e.prompt, *e.completion), tuple(range(4, len(e)))) for e in examples]


def test_the_direction_has_length_1_and_raises_the_loss(proxy, examples, direction) -> None:
    assert length_of(direction) == pytest.approx(1, abs=1e-5)
    before, step = mean_loss(proxy, examples), 1e-3
    _, _, slope = downstream_gradient(proxy, examples)
    moved = models.load(proxy.model.name_or_path, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in moved.model.named_parameters():
            weight.add_(direction[name], alpha=step)
    assert mean_loss(moved, examples) - before == pytest.approx(step * slope, rel=0.1)


def test_the_difference_is_the_derivative(proxy, direction, contexts) -> None:
    rows = proxy.model.config.vocab_size
    errors = relative_errors(proxy.model, direction, contexts, rows)
    assert min(errors.values()) < 5e-3
    # The error grows with the square of the step where the step is large.
    assert errors[0.1] > 5 * errors[0.01] > 25 * errors[0.001]
    assert choose_epsilon(errors, None) == max(e for e, error in errors.items() if error <= 0.01)
    assert choose_epsilon({1e-3: 0.015, 1e-2: 0.2}, None) == 1e-3


def test_a_coarse_step_is_refused_and_the_best_is_named(proxy, direction, contexts) -> None:
    errors = relative_errors(proxy.model, direction, contexts, 100, (1e-3, 10.0))
    with pytest.raises(ValueError, match=r"epsilon 10: .* best step found is epsilon 0.001"):
        choose_epsilon(errors, 10.0)
    with pytest.raises(ValueError, match="is allowed"):
        choose_epsilon({1e-3: float("nan")}, None)


@torch.no_grad()
def test_cached_steps_give_what_the_whole_text_gives(proxy, direction) -> None:
    tokens = proxy.model.config.vocab_size
    pair = PerturbedPair(proxy.model, direction, 1e-3, tokens)
    reader = Companion(pair, pad_id=0, device=proxy.device)
    rows = [DecodingRow((5, 6, 7, 8)), DecodingRow((9,))]
    for token in (10, 11, 12):
        said = reader.outputs(rows)
        for row, change in zip(rows, said, strict=True):
            ids = (*row.prompt, *row.written)
            whole = pair.at(Context(ids, (len(ids) - 1,)))[0]
            # Logits are right to 1e-6, and their difference is divided by 2e-3.
            assert torch.allclose(change, whole, atol=5e-3)
            row.written.append(token)


def test_the_copies_are_exact_only_in_float32(proxy, direction) -> None:
    half = models.load(proxy.model.name_or_path, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="float32"):
        PerturbedPair(half.model, direction, 1e-3, 100)
    with pytest.raises(ValueError, match="length 1"):
        PerturbedPair(proxy.model, {n: 2 * t for n, t in direction.items()}, 1e-3, 100)
    with pytest.raises(ValueError, match="another model"):
        PerturbedPair(proxy.model, {}, 1e-3, 100)


def test_the_exact_derivative_matches_reverse_mode(proxy, direction, contexts) -> None:
    context, token = contexts[0], 7
    tokens = proxy.model.config.vocab_size
    change = exact_change(proxy.model, direction, context, tokens)
    proxy.model.requires_grad_(True)
    proxy.model.zero_grad(set_to_none=True)
    log_p = proxy.model(input_ids=torch.tensor([context.ids])).logits[0].log_softmax(-1)
    last = context.positions[-1]
    log_p[last, token].backward()
    inner = sum(
        float((weight.grad * direction[name]).sum())
        for name, weight in proxy.model.named_parameters()
        if weight.grad is not None
    )
    proxy.model.zero_grad(set_to_none=True)
    # Of log-probabilities, so that the mean over the proxy's own distribution is subtracted.
    p = log_p[last].softmax(-1).detach()
    assert float(change[-1, token] - (p * change[-1]).sum()) == pytest.approx(inner, rel=1e-3)
