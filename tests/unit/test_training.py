"""`fit`: one mean over all micro-batches, and a resumed run that equals an uninterrupted one."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from azeotrope.training import (
    STATE,
    FitConfig,
    NonFiniteLossError,
    TokenSum,
    fit,
    rate_at,
    sample_order,
)

Sample = tuple[Tensor, Tensor, int]
STEPS = 10


class Killed(Exception):
    """Stands for the process that dies."""


def samples(count: int = 11) -> list[Sample]:
    """Regression samples with 1, 2 or 3 tokens, so that batches and tokens are told apart."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for index in range(count):
        tokens = index % 3 + 1
        inputs = torch.randn(tokens, 3, dtype=torch.float64, generator=generator)
        found.append((inputs, inputs.sum(1, keepdim=True).expand(-1, 2), tokens))
    return found


def weight(seed: int = 1) -> nn.Parameter:
    generator = torch.Generator().manual_seed(seed)
    return nn.Parameter(torch.randn(2, 3, dtype=torch.float64, generator=generator))


def squares(parameter: nn.Parameter) -> Callable[[list[Sample]], TokenSum]:
    def loss(items: list[Sample]) -> TokenSum:
        total = torch.zeros((), dtype=torch.float64)
        for inputs, targets, _ in items:
            total = total + (inputs @ parameter.T - targets).square().sum()
        return TokenSum(total, sum(tokens for *_, tokens in items))

    return loss


def settings(**changes: object) -> FitConfig:
    base = {
        "steps": STEPS,
        "batch_size": 4,
        "learning_rate": 0.05,
        "checkpoint_every": 3,
        "log_every": 1,
        "seed": 3,
    }
    return FitConfig.model_validate({**base, **changes})


def test_four_micro_batches_of_one_equal_one_batch_of_four() -> None:
    whole, parts = weight(), weight()
    first = fit([whole], samples(), squares(whole), settings())
    second = fit([parts], samples(), squares(parts), settings(accumulation=4))
    torch.testing.assert_close(whole, parts, rtol=1e-11, atol=1e-12)
    assert first.tokens == second.tokens
    for one, other in zip(first.log, second.log, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-11)
        assert one.gradient_norm == pytest.approx(other.gradient_norm, rel=1e-11)


def test_the_gradient_is_divided_by_the_tokens_of_the_window() -> None:
    data, parameter = samples(), weight()
    chosen = next(sample_order(len(data), 4, seed=3))
    inputs = torch.cat([data[index][0] for index in chosen])
    targets = torch.cat([data[index][1] for index in chosen])
    error = inputs @ parameter.detach().T - targets
    expected_loss = error.square().sum() / len(inputs)
    expected_norm = (2 * error.T @ inputs / len(inputs)).norm()
    entry = fit([parameter], data, squares(parameter), settings(steps=1, accumulation=2)).log[0]
    assert entry.loss == pytest.approx(expected_loss.item(), rel=1e-12)
    assert entry.gradient_norm == pytest.approx(expected_norm.item(), rel=1e-6)


def test_fit_learns() -> None:
    parameter = weight()
    config = settings(steps=300, learning_rate=0.1)
    log = fit([parameter], samples(), squares(parameter), config).log
    assert log[-1].loss < 1e-3 * log[0].loss
    torch.testing.assert_close(parameter.detach(), torch.ones_like(parameter), atol=0.1, rtol=0)


def test_a_loss_that_calls_backward_itself_gives_the_same_weights() -> None:
    plain, piecewise = weight(), weight()

    def loss(items: list[Sample]) -> TokenSum:
        parts = [squares(piecewise)([item]) for item in items]
        for part in parts:
            part.total.backward()
        total = torch.stack([part.total.detach() for part in parts]).sum()
        return TokenSum(total, sum(part.count for part in parts))

    fit([plain], samples(), squares(plain), settings())
    fit([piecewise], samples(), loss, settings())
    torch.testing.assert_close(plain, piecewise, rtol=1e-11, atol=1e-12)


def dies_in_loss(parameter: nn.Parameter, step: int) -> Callable[[list[Sample]], TokenSum]:
    calls = 0
    inner = squares(parameter)

    def loss(items: list[Sample]) -> TokenSum:
        nonlocal calls
        calls += 1
        # With two micro-batches a step, this is between them: half a gradient is there.
        if calls == 2 * step + 2:
            raise Killed
        return inner(items)

    return loss


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("step", [0, 1, 2, 3, 5, 7, 9])
def test_a_killed_and_resumed_run_equals_one_that_was_not(
    step: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    def made(seed: int) -> nn.Parameter:
        return nn.Parameter(weight(seed).detach().to(dtype))

    data = [(x.to(dtype), y.to(dtype), n) for x, y, n in samples()]
    config = settings(accumulation=2, schedule="cosine")
    straight = made(1)
    expected = fit([straight], data, squares(straight), config)
    killed = made(1)
    with pytest.raises(Killed):
        fit([killed], data, dies_in_loss(killed, step), config, checkpoint=tmp_path)
    # Before the first checkpoint nothing was saved, so the same start is needed; afterwards
    # everything has to come from the folder.
    resumed = made(1 if step < 3 else 99)
    found = fit([resumed], data, squares(resumed), config, checkpoint=tmp_path)
    assert torch.equal(resumed, straight)
    assert found.log == expected.log
    assert (found.steps, found.tokens) == (expected.steps, expected.tokens)


def test_a_run_killed_at_a_checkpoint_has_saved_it(tmp_path: Path) -> None:
    straight, killed, resumed = weight(), weight(), weight(99)
    expected = fit([straight], samples(), squares(straight), settings())
    steps_done = 0

    def dies_after_six(items: list[Sample]) -> TokenSum:
        nonlocal steps_done
        if steps_done == 6:
            raise Killed
        steps_done += 1
        return squares(killed)(items)

    with pytest.raises(Killed):
        fit([killed], samples(), dies_after_six, settings(), checkpoint=tmp_path)
    calls = 0

    def counted(items: list[Sample]) -> TokenSum:
        nonlocal calls
        calls += 1
        return squares(resumed)(items)

    found = fit([resumed], samples(), counted, settings(), checkpoint=tmp_path)
    assert calls == STEPS - 6
    assert torch.equal(resumed, straight)
    assert found.log == expected.log


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    parameter, other = weight(), weight(99)
    expected = fit([parameter], samples(), squares(parameter), settings(), checkpoint=tmp_path)

    def never(items: list[Sample]) -> TokenSum:
        raise AssertionError("a finished run computed a loss")

    found = fit([other], samples(), never, settings(), checkpoint=tmp_path)
    assert torch.equal(parameter, other)
    assert found.log == expected.log


def test_a_half_written_state_is_ignored(tmp_path: Path) -> None:
    parameter, other = weight(), weight()
    (tmp_path / f".{STATE}.1-0.tmp").write_bytes(b"cut in the mid")
    fit([parameter], samples(), squares(parameter), settings())
    fit([other], samples(), squares(other), settings(), checkpoint=tmp_path)
    assert torch.equal(parameter, other)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == [STATE]


def test_the_state_of_another_model_is_refused(tmp_path: Path) -> None:
    parameter = weight()
    fit([parameter], samples(), squares(parameter), settings(steps=1), checkpoint=tmp_path)
    other = nn.Parameter(torch.zeros(2, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="it belongs to another model"):
        fit([other], samples(), squares(other), settings(), checkpoint=tmp_path)


def test_a_loss_that_is_not_finite_names_the_step_and_the_samples(tmp_path: Path) -> None:
    parameter = weight()
    data = samples(8)
    order = sample_order(len(data), 4, seed=3)
    next(order)
    second = next(order)
    bad = data[second[1]][0]
    before: list[Tensor] = []

    def loss(items: list[Sample]) -> TokenSum:
        found = squares(parameter)(items)
        if not any(item[0] is bad for item in items):
            return found
        before.append(parameter.detach().clone())
        return TokenSum(found.total * math.nan, found.count)

    names = {id(item): f"sample-{index}" for index, item in enumerate(data)}
    with pytest.raises(NonFiniteLossError) as caught:
        fit(
            [parameter],
            data,
            loss,
            settings(accumulation=2, checkpoint_every=2),
            checkpoint=tmp_path,
            identify=lambda item: names[id(item)],
        )
    # Two micro-batches take every other sample; the second one holds the bad sample.
    guilty = ", ".join(f"sample-{index}" for index in second[1::2])
    assert f"the loss is nan at step 1 on samples {guilty};" in str(caught.value)
    assert torch.equal(parameter, before[0])
    assert not (tmp_path / STATE).exists()


def test_a_gradient_that_is_not_finite_stops_before_the_weights_change() -> None:
    parameter = nn.Parameter(torch.zeros(3))

    def loss(items: list[int]) -> TokenSum:
        # The value is 0 and its slope is infinite.
        return TokenSum(parameter.abs().sqrt().sum(), len(items))

    with pytest.raises(NonFiniteLossError, match="at step 0"):
        fit([parameter], [0, 1], loss, settings(batch_size=2))
    assert torch.equal(parameter, torch.zeros(3))


def test_a_batch_that_does_not_divide_is_refused() -> None:
    parameter = weight()
    with pytest.raises(ValueError, match="batch_size 4 does not divide into 3"):
        fit([parameter], samples(), squares(parameter), settings(accumulation=3))


def test_an_empty_data_set_is_refused() -> None:
    parameter = weight()
    with pytest.raises(ValueError, match="the data set is empty"):
        fit([parameter], [], squares(parameter), settings())


@pytest.mark.parametrize(("size", "batch_size"), [(7, 3), (8, 4), (3, 7), (1, 2)])
def test_each_epoch_visits_each_sample_once(size: int, batch_size: int) -> None:
    batches = sample_order(size, batch_size, seed=4)
    drawn = [next(batches) for _ in range(3 * size)]
    assert all(len(batch) == batch_size for batch in drawn)
    flat = [index for batch in drawn for index in batch]
    epochs = [flat[start : start + size] for start in range(0, len(flat), size)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    if size > 3:
        assert len({tuple(epoch) for epoch in epochs[:3]}) == 3, "each epoch has its own order"


def test_the_order_is_decided_by_the_seed() -> None:
    def first(seed: int) -> list[int]:
        return next(sample_order(50, 50, seed))

    assert first(0) == first(0)
    assert first(0) != first(1)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", {0: 0.5, 1: 1.0, 2: 1.0, 6: 0.5, 9: 0.125}),
        ("cosine", {0: 0.5, 1: 1.0, 2: 1.0, 4: 0.5 + math.sqrt(0.125), 6: 0.5}),
        ("constant", {0: 0.5, 1: 1.0, 2: 1.0, 9: 1.0}),
    ],
)
def test_rates_by_hand(schedule: str, expected: dict[int, float]) -> None:
    config = settings(schedule=schedule, warmup=0.2)
    for step, rate in expected.items():
        assert rate_at(step, config) == pytest.approx(rate, abs=1e-12)


def test_no_warmup_starts_at_the_full_rate_and_the_log_tells_it() -> None:
    parameter = weight()
    config = settings(warmup=0.0)
    assert rate_at(0, config) == 1.0
    log = fit([parameter], samples(), squares(parameter), config).log
    assert [entry.learning_rate for entry in log] == [
        pytest.approx(0.05 * (1 - step / STEPS)) for step in range(STEPS)
    ]
    assert [entry.step for entry in log] == list(range(1, STEPS + 1))


def with_parts(parameter: nn.Parameter) -> Callable[[list[Sample]], TokenSum]:
    """The loss with two of its terms: one of every sample, and one of samples of two tokens."""
    inner = squares(parameter)

    def loss(items: list[Sample]) -> TokenSum:
        total, count, _ = inner(items)
        parts = {"mean": float(total.detach()) / count}
        if any(tokens == 2 for *_, tokens in items):
            parts["pairs"] = float(sum(tokens == 2 for *_, tokens in items))
        return TokenSum(total, count, parts)

    return loss


def test_parts_are_means_over_the_micro_batches_that_have_them() -> None:
    data, parameter = samples(), weight()
    chosen = next(sample_order(len(data), 4, seed=3))
    loss = with_parts(parameter)
    # With two micro-batches a step, every other sample is in the same one.
    seen = [loss([data[index] for index in chosen[start::2]]).parts for start in (0, 1)]
    entry = fit([parameter], data, loss, settings(steps=1, accumulation=2)).log[0]
    assert entry.parts["mean"] == pytest.approx((seen[0]["mean"] + seen[1]["mean"]) / 2)
    having = [part["pairs"] for part in seen if "pairs" in part]
    assert entry.parts.get("pairs", 0.0) == pytest.approx(sum(having) / max(len(having), 1))


def test_parts_are_only_looked_at() -> None:
    plain, watched = weight(), weight()
    first = fit([plain], samples(), squares(plain), settings())
    second = fit([watched], samples(), with_parts(watched), settings())
    assert torch.equal(plain, watched)
    assert [entry.loss for entry in first.log] == [entry.loss for entry in second.log]
    assert all(entry.parts == {} for entry in first.log)
    # Parts of steps that are not logged are not in the log.
    sparse = fit([weight()], samples(), with_parts(weight()), settings(log_every=4))
    assert [entry.step for entry in sparse.log] == [4, 8, 10]
    missing = [entry.step for entry in second.log if "pairs" not in entry.parts]
    assert missing, "a term that a batch does not have is not taken for zero"
    assert len(missing) < STEPS


@pytest.mark.parametrize("step", [3, 5, 7])
def test_parts_survive_a_kill(step: int, tmp_path: Path) -> None:
    straight, killed, resumed = weight(), weight(), weight(99)
    config = settings(accumulation=2)
    expected = fit([straight], samples(), with_parts(straight), config)
    dies, calls = with_parts(killed), 0

    def loss(items: list[Sample]) -> TokenSum:
        nonlocal calls
        calls += 1
        if calls == 2 * step + 2:
            raise Killed
        return dies(items)

    with pytest.raises(Killed):
        fit([killed], samples(), loss, config, checkpoint=tmp_path)
    found = fit([resumed], samples(), with_parts(resumed), config, checkpoint=tmp_path)
    assert found.log == expected.log
    assert all("mean" in entry.parts for entry in found.log)
    assert torch.equal(resumed, straight)
