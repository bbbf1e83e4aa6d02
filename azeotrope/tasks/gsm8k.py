"""GSM8K: grade-school word problems with worked solutions.

Reference: Cobbe et al. 2021, "Training verifiers to solve math word problems", arXiv:2110.14168.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from azeotrope.environment import Environment, variable
from azeotrope.tasks import answers
from azeotrope.tasks.base import Problem, TaskSettings
from azeotrope.tasks.rows import ProblemText, parse_rows, read, take, text_of
from azeotrope.tokens import Message

HUB = "openai/gsm8k"
SPLITS = ("train", "validation", "test")
INSTRUCTION = "Reason step by step, and finish with a line of the form\n#### <number>"
_CALCULATOR = re.compile(r"<<[^<>]*>>")
_EXPECTED = (
    'one JSON object per line, {"question": ..., "answer": ... #### 18}, as in train.jsonl and '
    f"test.jsonl of GSM8K; or leave path empty to download {HUB}"
)


class Config(TaskSettings):
    name: Literal["gsm8k"] = "gsm8k"
    path: str | None = Field(
        default=None,
        description="folder with train.jsonl and test.jsonl; null takes gsm8k/ of the data folder "
        f"(see data_folder) if its files are there, and downloads {HUB} if not",
    )
    validation: int = Field(
        default=500, ge=0, description="how many of the last train rows are the validation split"
    )

    @field_validator("path")
    @classmethod
    def _absolute(cls, path: str | None) -> str | None:
        # Workers may run in another folder than the one the path was written in.
        return None if path is None else str(Path(path).expanduser().resolve())

    @property
    def is_local(self) -> bool:
        return self.folder is not None

    @property
    def files(self) -> tuple[Path, ...]:
        folder = self.folder
        return () if folder is None else (folder / "train.jsonl", folder / "test.jsonl")

    @property
    def folder(self) -> Path | None:
        """Where the files are on this machine; None if they must be downloaded.

        The data folder is looked up at each call and is no part of the configuration: what the
        files hold decides the names of results.
        """
        if self.path is not None:
            return Path(self.path)
        root = data_folder()
        return root / "gsm8k" if root is not None else None


def data_folder() -> Path | None:
    """The folder whose `gsm8k/` has the files; None if there is none.

    If AZEOTROPE_DATA is set, only that folder is looked at. Otherwise `data` and `shared/data` are
    tried in the working folder and in each folder above it.
    """
    chosen = Environment().data
    working = Path.cwd()
    above = [up / name for up in (working, *working.parents) for name in ("data", "shared/data")]
    for root in [chosen] if chosen else above:
        if (root / "gsm8k" / "train.jsonl").is_file():
            return root
    return None


class Gsm8k:
    """All rows are read and checked at the start, so a broken file fails within a second.

    A problem's row is its row in the file. Validation rows keep the number they have in the train
    file, so an id means the same problem whatever the size of the validation split.
    """

    name = "gsm8k"
    template = "gsm8k-chat-1"

    def __init__(self, config: Config) -> None:
        self.config = config
        train, test = _load(config.folder)
        if config.validation >= len(train):
            raise ValueError(
                f"validation={config.validation} would take all {len(train)} train rows; lower it"
            )
        held_out = len(train) - config.validation
        self._first = {"train": 0, "validation": held_out, "test": 0}
        self._rows = {"train": train[:held_out], "validation": train[held_out:], "test": test}

    def problems(self, split: str, count: int, *, skip: int = 0) -> Sequence[Problem]:
        """Problems of one split, in the order of their file.

        Raises:
            ValueError: if there is no such split, or it has fewer problems.
        """
        if split not in SPLITS:
            raise ValueError(f"gsm8k has the splits {', '.join(SPLITS)}; got {split!r}")
        return take(
            self._rows[split],
            count,
            skip,
            dataset=self.name,
            split=split,
            first=self._first[split],
        )

    def messages(self, question: str) -> list[Message]:
        return [{"role": "user", "content": question + "\n\n" + INSTRUCTION}]

    def extract(self, completion: str) -> str | None:
        return answers.extract(completion, numeric=True)

    def check(self, completion: str, answer: str) -> bool:
        extracted = self.extract(completion)
        return extracted is not None and answers.same(extracted, answer)


def build(config: Config) -> Gsm8k:
    """The task, its files read.

    Raises:
        FileNotFoundError: if a file is missing.
        ConnectionError: if the files must be downloaded and the hub cannot be reached.
        ValueError: if a row is broken, or the validation split would leave no train row.
    """
    return Gsm8k(config)


def parse(fields: Mapping[str, Any]) -> ProblemText:
    """A row of the published files: reasoning with calculator marks, then `#### 1,000`.

    Raises:
        ValueError: if a field is missing or the answer does not end with a number after `####`.
    """
    question, worked = text_of(fields, "question"), text_of(fields, "answer")
    reasoning, mark, final = worked.rpartition("####")
    if not mark:
        raise ValueError('has an "answer" without a final "#### number"')
    if answers.number(final) is None:
        raise ValueError(f'has an "answer" with {final.strip()!r} after ####, not a number')
    answer = answers.spell(final.strip())
    steps = _CALCULATOR.sub("", reasoning).strip()
    return ProblemText(question, answer, f"{steps}\n#### {answer}".lstrip())


def _load(folder: Path | None) -> tuple[tuple[ProblemText, ...], tuple[ProblemText, ...]]:
    if folder is None:
        return _download("train"), _download("test")
    train = read(folder / "train.jsonl", parse, expected=_EXPECTED)
    return train, read(folder / "test.jsonl", parse, expected=_EXPECTED)


def _download(split: str) -> tuple[ProblemText, ...]:
    from datasets import load_dataset

    try:
        table = load_dataset(HUB, "main", split=split)
    except OSError as error:
        # Both "no network" and "not in the cache" are OSErrors, with messages about URLs.
        raise ConnectionError(
            f"cannot get {HUB} from the Hugging Face hub ({error}); download train.jsonl and "
            f"test.jsonl once and set path to their folder, or {variable('data')} to the folder "
            "that holds gsm8k/"
        ) from error
    numbered = ((f"row {index}", dict(fields)) for index, fields in enumerate(table))
    return parse_rows(numbered, dict, parse, source=f"{HUB} ({split})")
