"""The teacher, its prompts, and a defense that reads the strength and key of a request."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from azeotrope.defenses.base import Defense
    from azeotrope.models import Loaded


@pytest.fixture(scope="module")
def teacher() -> "Loaded":
    from azeotrope import models

    return models.load("pocket/teacher")


@pytest.fixture(scope="module")
def prompts(teacher: "Loaded") -> list[tuple[int, ...]]:
    from azeotrope import tasks
    from azeotrope.tokens import encode_prompt

    task = tasks.build(tasks.PocketConfig())
    return [
        encode_prompt(teacher.tokenizer, task.messages(problem.question))
        for problem in task.problems("test", 16)
    ]


@pytest.fixture
def raise_defense(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any]], "Defense"]:
    """Makes a defense, and lets engines make the same one: even tokens become likelier, and
    tokens up to the last one written even more so, by an amount that the key decides."""
    from azeotrope.defenses import base

    class RaiseConfig(base.DefenseConfig):
        key: str = "a"

    class Raise(base.Defense):
        stage = "decoding"

        def adjust_logits(self, logits, prefixes):
            if self.is_identity:
                return logits
            gain = torch.zeros_like(logits)
            for index, prefix in enumerate(prefixes):
                gain[index, ::2] += self.config.strength
                gain[index, : 1 + (prefix[-1] if prefix else 0)] += ord(self.config.key[0]) / 50
            return logits + gain

    def make(data: dict[str, Any]) -> base.Defense:
        return Raise(RaiseConfig.model_validate(data))

    monkeypatch.setattr(base, "resolve", make)
    return make
