"""GSM8K: grade-school word problems with worked solutions (Cobbe et al. 2021, arXiv:2110.14168)."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from azeotrope.tasks import answers
from azeotrope.tasks.base import Problem, TaskSettings
from azeotrope.tasks.rows import Row, collect, read, take, text_of
from azeotrope.tokens import Message

HUB = "openai/gsm8k"
DATA = "AZEOTROPE_DATA"
SPLITS = ("train", "validation", "test")
INSTRUCTION = "Reason step by step, and finish with a line of the form\n#### <number>"
_CALCULATOR = re.compile(r"<<[^<>]*>>")
_EXPECTED = (
    'one JSON object a line, {"question": ..., "answer": ... #### 18}, as in train.jsonl and '
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
    def folder(self) -> Path | None:
        """Where the files are on this machine; None if they must be downloaded.

        The data folder is looked for at each call and never written down, so a stage made with it
        is the same as one made from the hub.
        """
        if self.path is not None:
            return Path(self.path)
        root = data_folder()
        return root / "gsm8k" if root is not None else None


def data_folder() -> Path | None:
    """The folder whose `gsm8k/` has the files.

    The one in the environment variable, or else `data` or `shared/data` in the working folder or
    in one above it.
    """
    given = os.environ.get(DATA)
    here = Path.cwd()
    above = [up / name for up in (here, *here.parents) for name in ("data", "shared/data")]
    for root in [Path(given).expanduser()] if given else above:
        if (root / "gsm8k" / "train.jsonl").is_file():
            return root
    return None


class Gsm8k:
    """All rows are read and checked at the start, so that a broken file fails in a second.

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
        given = self.extract(completion)
        return given is not None and answers.same(given, answer)


def build(config: Config) -> Gsm8k:
    return Gsm8k(config)


def parse(fields: Mapping[str, Any]) -> Row:
    """A row of the published files: reasoning with calculator marks, then `#### 1,000`.

    Raises:
        ValueError: if a field is missing or the answer does not end with a number after `####`.
    """
    question, worked = text_of(fields, "question"), text_of(fields, "answer")
    reasoning, found, final = worked.rpartition("####")
    if not found:
        raise ValueError('has an "answer" without a final "#### number"')
    if answers.number(final) is None:
        raise ValueError(f'has an "answer" with {final.strip()!r} after ####, not a number')
    answer = answers.spell(final.strip())
    steps = _CALCULATOR.sub("", reasoning).strip()
    return Row(question, answer, f"{steps}\n#### {answer}".lstrip())


def _load(folder: Path | None) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    if folder is None:
        return _download("train"), _download("test")
    train = read(folder / "train.jsonl", parse, expected=_EXPECTED)
    return train, read(folder / "test.jsonl", parse, expected=_EXPECTED)


def _download(split: str) -> tuple[Row, ...]:
    from datasets import load_dataset

    try:
        table = load_dataset(HUB, "main", split=split)
    except OSError as error:
        # Both "no network" and "not in the cache" are OSErrors, with messages about URLs.
        raise ConnectionError(
            f"cannot get {HUB} from the Hugging Face hub ({error}); download train.jsonl and "
            f"test.jsonl once and set path to their folder, or {DATA} to the folder of gsm8k/"
        ) from error
    items = ((f"row {index}", _giver(dict(fields))) for index, fields in enumerate(table))
    return collect(items, parse, source=f"{HUB} ({split})")


def _giver(fields: dict[str, Any]) -> Any:
    return lambda: fields
