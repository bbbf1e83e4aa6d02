"""The embedded task `pocket-v1`: word problems with reasoning in tags and `#### answer`."""

import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import islice
from random import Random
from typing import Literal, get_args

from pydantic import Field

from azeotrope.pocket import language
from azeotrope.pocket.problems import VERSION, Split, problems
from azeotrope.tasks.base import Problem, TaskSettings
from azeotrope.tokens import Message

_ANSWER = re.compile(r"####\s*(-?\d+)\s*$")


class Config(TaskSettings):
    name: Literal["pocket"] = "pocket"
    slip: float = Field(
        default=0.25,
        ge=0,
        le=1,
        description="share of wrong steps in the ground truth (cheap labels)",
    )


class Pocket:
    """Problems come from an endless seeded stream; row i of a split never changes."""

    name = VERSION
    template = "pocket-chat-1"

    def __init__(self, config: Config) -> None:
        self.config = config

    def problems(self, split: str, count: int, *, skip: int = 0) -> Sequence[Problem]:
        """Problems of one split, in the order of its stream.

        Raises:
            ValueError: if there is no such split.
        """
        if split not in get_args(Split):
            raise ValueError(f"pocket has the splits {', '.join(get_args(Split))}; got {split!r}")
        return _problems(split, count + skip, self.config.slip)[skip:]  # type: ignore[arg-type]

    def messages(self, question: str) -> list[Message]:
        return [{"role": "user", "content": question}]

    def extract(self, completion: str) -> str | None:
        match = _ANSWER.search(completion)
        return match.group(1) if match else None

    def check(self, completion: str, answer: str) -> bool:
        return self.extract(completion) == answer


@lru_cache(maxsize=8)
def _problems(split: Split, count: int, slip: float) -> tuple[Problem, ...]:
    drawn: list[Problem] = []
    for problem in islice(problems(split), count):
        rng = Random(f"{VERSION}:{split}:{problem.row}:solution")
        solution = language.reasoning(problem, rng, slip=slip)
        answer = str(problem.answer)
        drawn.append(Problem(VERSION, split, problem.row, problem.question, answer, solution))
    return tuple(drawn)


def build(config: Config) -> Pocket:
    return Pocket(config)
