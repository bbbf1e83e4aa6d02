"""The benchmarks of head training run, at a size that measures nothing.

Their variants run in this process here: starting five processes with torch takes far longer than
the work.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import cmi_step, head_training, head_variants
from benchmarks.head_shapes import Shape
from benchmarks.measured import MeasuredProcess


class InThisProcess(MeasuredProcess):
    """Takes the place of a variant's process."""

    def __init__(self, step: Callable[[int], dict[str, Any]], first: dict[str, Any]) -> None:
        self.take, self.first = step, first
        self.seconds, self.answers = [], []

    def __exit__(self, *_: object) -> None:
        pass

    def answer(self) -> dict[str, Any]:
        return self.first

    def step(self, number: int, *, counts: bool) -> None:
        started = time.perf_counter()
        values = self.take(number)
        seconds = time.perf_counter() - started
        self.answers.append({**values, "seconds": seconds, "peak": 1 << 20})
        if counts:
            self.seconds.append(seconds)


def start_here(role: str, shape: Shape, tokens: int, folder: Path) -> MeasuredProcess:
    if role == "prepare":
        return InThisProcess(lambda _: {}, head_variants.prepare(shape, tokens, folder))
    make = {"cached": head_variants.cached, "full": head_variants.full}[role]
    return InThisProcess(make(shape, folder), {"ready": True})


def test_stored_features_train_like_whole_models(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(head_training, "start", start_here)
    monkeypatch.setattr(sys, "argv", ["head_training", "--shape", "smoke", "--steps", "2"])
    # The benchmark itself fails if the losses of its two variants differ.
    head_training.main()
    assert "smoke: nats per token, first step" in capsys.readouterr().out


def test_the_closed_form_has_the_gradient_of_double_backward(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def start(_: str, arguments: list[str]) -> MeasuredProcess:
        *_, name, method = arguments
        return InThisProcess(cmi_step.setup(cmi_step.SHAPES[name], method), {"ready": True})

    monkeypatch.setattr(cmi_step, "MeasuredProcess", start)
    monkeypatch.setattr(sys, "argv", ["cmi_step", "--shape", "smoke"])
    # The benchmark itself fails if the gradients of its two variants differ.
    cmi_step.main()
    assert "smoke" in capsys.readouterr().out


def test_a_variant_answers_from_a_process_of_its_own() -> None:
    with MeasuredProcess("counting", ["tests.unit.benchmarks.counting_child"]) as variant:
        assert variant.answer() == {"ready": True}
        for number in range(3):
            variant.step(number, counts=number > 0)
    assert [answer["double"] for answer in variant.answers] == [0, 2, 4]
    assert len(variant.seconds) == 2
    assert variant.peak >= 0
    assert variant.milliseconds >= 0


def test_a_variant_that_ends_early_is_named() -> None:
    with (
        MeasuredProcess("counting", ["benchmarks.no_such_module"]) as variant,
        pytest.raises(SystemExit, match="counting ended early with code 1"),
    ):
        variant.answer()
