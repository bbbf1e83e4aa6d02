"""Seeded word problems of several steps; each step is one small arithmetic fact.

A problem starts from a value and applies additions, subtractions and doublings; all values stay in
0..20. Problems with a value above 10 are *full*, the others *easy*. A student base has seen easy
problems only. So a full problem needs a procedure that the base knows and facts that it lacks.
Distillation teaches the facts, and accuracy grows smoothly with the number of traces.

The splits of `pocket-v1` are disjoint by construction: the arithmetic of a problem (start and
steps, without names) is hashed, and the hash decides the split. All choices are drawn from
`Random.random()`, whose stream Python guarantees across versions, so the text never changes.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal, TypeVar

VERSION = "pocket-v1"
Split = Literal["train", "validation", "test"]
Range = Literal["easy", "full"]
Operation = Literal["add", "subtract", "double"]

LARGEST = 20
EASY_LARGEST = 10
_SPLIT_OF_BUCKET: dict[int, Split] = {0: "test", 1: "validation"}
_T = TypeVar("_T")

NAMES = ("ann", "ben", "carla", "dan", "eve", "finn", "gina", "hugo", "iris", "joe", "kim", "max")
THINGS = ("eggs", "coins", "pens", "cards", "books", "stamps", "shells", "apples")
ASKED = {
    "add": (
        "{name} finds {k} more.",
        "{name} wins {k} more.",
        "then {k} more arrive.",
        "{name} buys {k} {things}.",
    ),
    "subtract": (
        "{name} drops {k}.",
        "{name} gives away {k}.",
        "then {k} are lost.",
        "{name} sells {k} {things}.",
    ),
    "double": ("{name} doubles the {things}.", "then the {things} double."),
}
STARTS = ("{name} has {v} {things}.", "there are {v} {things} with {name}.")
QUESTIONS = ("how many {things} does {name} have?", "how many {things} are there now?")


@dataclass(frozen=True)
class PocketProblem:
    """One word problem: `values[i]` is the count after `steps[:i]`; the last is the answer."""

    row: int
    question: str
    name: str
    things: str
    steps: tuple[tuple[Operation, int], ...]
    values: tuple[int, ...]

    @property
    def answer(self) -> int:
        return self.values[-1]

    @property
    def arithmetic(self) -> str:
        """The problem without its words: equal strings mean the same computation."""
        return f"{self.values[0]}" + "".join(f",{operation[0]}{k}" for operation, k in self.steps)


def pick(rng: Random, options: Sequence[_T]) -> _T:
    """A uniform choice that uses one `random()` draw, so that the stream is frozen."""
    return options[int(rng.random() * len(options))]


def apply(operation: Operation, value: int, k: int) -> int:
    return {"add": value + k, "subtract": value - k, "double": 2 * value}[operation]


def split_of(arithmetic: str) -> Split:
    """The split that owns this computation: 1/10 test, 1/10 validation, the rest train."""
    bucket = hashlib.sha256(f"{VERSION}:{arithmetic}".encode()).digest()[0] % 10
    return _SPLIT_OF_BUCKET.get(bucket, "train")


def _draw(rng: Random, row: int, difficulty: Range, steps: tuple[int, int]) -> PocketProblem:
    largest = EASY_LARGEST if difficulty == "easy" else LARGEST
    name, things = pick(rng, NAMES), pick(rng, THINGS)
    values = [pick(rng, range(1, largest + 1))]
    chosen: list[tuple[Operation, int]] = []
    parts = [pick(rng, STARTS).format(name=name, things=things, v=values[0])]
    for _ in range(pick(rng, range(steps[0], steps[1] + 1))):
        value = values[-1]
        allowed: list[Operation] = []
        if value < largest:
            allowed.append("add")
        if value > 0:
            allowed.append("subtract")
        if 0 < value <= largest // 2:
            allowed.append("double")
        operation = pick(rng, allowed)
        room = {"add": largest - value, "subtract": value, "double": 2}[operation]
        k = 2 if operation == "double" else pick(rng, range(1, min(room, 10) + 1))
        chosen.append((operation, k))
        values.append(apply(operation, value, k))
        parts.append(pick(rng, ASKED[operation]).format(name=name, things=things, k=k))
    parts.append(pick(rng, QUESTIONS).format(name=name, things=things))
    return PocketProblem(row, " ".join(parts), name, things, tuple(chosen), tuple(values))


def problems(
    split: Split, *, difficulty: Range = "full", steps: tuple[int, int] = (3, 4), seed: int = 0
) -> Iterator[PocketProblem]:
    """An endless stream of distinct computations of one split; row i is always the same problem.

    Args:
        difficulty: `full` keeps only problems with a value above 10; `easy` only the others.
        steps: the least and greatest number of steps.
        seed: 0 is `pocket-v1`; another seed gives new problems of the same split.
    """
    rng = Random(f"{VERSION}:{split}:{difficulty}:{steps[0]}-{steps[1]}:{seed}")
    seen: set[str] = set()
    row = 0
    while True:
        problem = _draw(rng, row, difficulty, steps)
        key = problem.arithmetic
        is_full = max(problem.values) > EASY_LARGEST
        # There are few easy one-step problems: without repeats the stream would end.
        repeated = key in seen and difficulty == "full"
        if split_of(key) != split or repeated or is_full != (difficulty == "full"):
            continue
        seen.add(key)
        row += 1
        yield problem
