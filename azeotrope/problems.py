"""What the rest of the library knows of a task: problems, a prompt, and a check of the answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from azeotrope.tokens import Message


@dataclass(frozen=True)
class Problem:
    """One question with its reference answer and, if the task has it, a worked solution."""

    dataset: str
    split: str
    row: int
    question: str
    answer: str
    solution: str

    @property
    def id(self) -> str:
        return f"{self.dataset}/{self.split}/{self.row}"


@runtime_checkable
class Task(Protocol):
    """Anything with a name, problems by split, a prompt template and an answer checker."""

    name: str
    template: str
    """Version of the prompt template; part of every trace's identity."""

    def problems(self, split: str, count: int, *, skip: int = 0) -> Sequence[Problem]: ...

    def messages(self, question: str) -> list[Message]: ...

    def extract(self, completion: str) -> str | None: ...

    def check(self, completion: str, answer: str) -> bool: ...
