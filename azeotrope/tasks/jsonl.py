"""A task from JSONL files: a question, an answer and, if there is one, a worked solution."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from azeotrope.tasks import answers
from azeotrope.tasks.base import Problem, TaskSettings
from azeotrope.tasks.rows import ProblemText, content_hash, read, take, text_of
from azeotrope.tokens import Message

INSTRUCTION = "Reason step by step, and finish with a line of the form\n#### <answer>"
_EXPECTED = 'one JSON object per line, {"question": ..., "answer": ..., "solution": ... (optional)}'
logger = logging.getLogger(__name__)


class Config(TaskSettings):
    name: Literal["jsonl"] = "jsonl"
    train: str = Field(description='JSONL file of {"question", "answer"[, "solution"]}')
    test: str = Field(description="the same, for problems that no model is trained on")
    validation: str | None = Field(default=None, description="the same, to choose settings with")

    @field_validator("train", "test", "validation")
    @classmethod
    def _absolute(cls, path: str | None) -> str | None:
        # Workers may run in another folder than the one the path was written in.
        return None if path is None else str(Path(path).expanduser().resolve())

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(Path(path) for path in (self.train, self.test, self.validation) if path)


class Jsonl:
    """The task's name holds a hash of its text, so results of edited files are not mixed with old.

    If every answer is a number, completions are searched for numbers as in GSM8K. Otherwise an
    answer is compared as words or as a short expression, and counts only where it is marked.
    """

    template = "jsonl-chat-1"

    def __init__(self, config: Config) -> None:
        self.config = config
        paths = {"train": config.train, "validation": config.validation, "test": config.test}
        self._rows = {
            split: read(Path(path).expanduser(), parse, expected=_EXPECTED)
            for split, path in paths.items()
            if path is not None
        }
        self.name = f"jsonl-{content_hash(*self._rows.values())}"
        every = [row for rows in self._rows.values() for row in rows]
        self._numeric = all(answers.number(row.answer) is not None for row in every)
        _warn_of_overlap(self._rows)

    def problems(self, split: str, count: int, *, skip: int = 0) -> Sequence[Problem]:
        """Problems of one split, in the order of their file.

        Raises:
            ValueError: if there is no file for this split, or it has fewer problems.
        """
        if split not in self._rows:
            raise ValueError(
                f"this task has files for {', '.join(self._rows)}; got {split!r}, "
                f"so set task.{split} to a file of problems"
            )
        return take(self._rows[split], count, skip, dataset=self.name, split=split)

    def messages(self, question: str) -> list[Message]:
        return [{"role": "user", "content": question + "\n\n" + INSTRUCTION}]

    def extract(self, completion: str) -> str | None:
        return answers.extract(completion, numeric=self._numeric)

    def check(self, completion: str, answer: str) -> bool:
        extracted = self.extract(completion)
        return extracted is not None and answers.same(extracted, answer)


def build(config: Config) -> Jsonl:
    """The task, its files read.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a row is broken.
    """
    return Jsonl(config)


def parse(fields: Mapping[str, Any]) -> ProblemText:
    """One row; without a solution the ground truth is the answer line alone.

    Raises:
        ValueError: if a field is missing, or the solution ends with another answer.
    """
    question, answer = text_of(fields, "question"), _answer(fields)
    if fields.get("solution") is None:
        return ProblemText(question, answer, f"#### {answer}")
    solution = text_of(fields, "solution")
    _, mark, final = solution.rpartition("####")
    if not mark:
        return ProblemText(question, answer, f"{solution}\n#### {answer}")
    if not answers.same(final.strip(), answer):
        raise ValueError(f"has answer {answer!r} but a solution that ends in {final.strip()!r}")
    return ProblemText(question, answer, solution)


def _answer(fields: Mapping[str, Any]) -> str:
    value = fields.get("answer")
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    answer = text_of(fields, "answer")
    if "\n" in answer:
        raise ValueError('has an "answer" of several lines; put the reasoning into "solution"')
    return answers.spell(answer)


def _warn_of_overlap(rows: Mapping[str, tuple[ProblemText, ...]]) -> None:
    test = {row.question for row in rows["test"]}
    for split in ("train", "validation"):
        shared = sum(row.question in test for row in rows.get(split, ()))
        if shared:
            logger.warning("%d questions of %s are also in test", shared, split)
