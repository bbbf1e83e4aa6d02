"""Reading JSONL files row by row, with one error that names every kind of broken row."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from azeotrope.tasks.base import Problem

SHOWN = 5
"""How many broken rows an error lists; the rest are counted."""


@dataclass(frozen=True)
class Row:
    """The text of one problem; `solution` ends with `#### answer`."""

    question: str
    answer: str
    solution: str


Parse = Callable[[Mapping[str, Any]], Row]
"""Turns the fields of a row into text, or raises ValueError with what is wrong with them."""


def read(path: Path, parse: Parse, *, expected: str) -> tuple[Row, ...]:
    """Every row of a JSONL file, in order; blank lines are skipped.

    Args:
        expected: what the file should hold, for the error when it is missing.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: once for the whole file, if any row is broken or if there is none.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; expected {expected}")
    lines = path.read_bytes().splitlines()
    items = ((f"line {number}", line) for number, line in enumerate(lines, 1) if line.strip())
    return collect(((place, _decoder(line)) for place, line in items), parse, source=str(path))


def collect(
    items: Iterable[tuple[str, Callable[[], Any]]], parse: Parse, *, source: str
) -> tuple[Row, ...]:
    """Parse rows that come with the name of their place, and complain about all of them at once.

    Raises:
        ValueError: if any row is broken or if there is none.
    """
    rows: list[Row] = []
    broken: list[str] = []
    for place, decode in items:
        try:
            fields = decode()
            if not isinstance(fields, dict):
                raise ValueError(f"is a {type(fields).__name__}, not an object with named fields")
            rows.append(parse(fields))
        except ValueError as error:
            broken.append(f"{place} {error}")
    if broken:
        more = f"; and {len(broken) - SHOWN} more" if len(broken) > SHOWN else ""
        raise ValueError(
            f"{source}: {len(broken)} of {len(rows) + len(broken)} rows cannot be used: "
            f"{'; '.join(broken[:SHOWN])}{more}"
        )
    if not rows:
        raise ValueError(f"{source} has no rows")
    return tuple(rows)


def text_of(fields: Mapping[str, Any], key: str) -> str:
    """A field that must be a text with something in it.

    Raises:
        ValueError: if it is missing, of another type, or blank.
    """
    if key not in fields:
        known = ", ".join(sorted(map(str, fields))) or "nothing"
        raise ValueError(f'has no "{key}" (it has {known})')
    value = fields[key]
    if not isinstance(value, str):
        raise ValueError(f'has a "{key}" that is a {type(value).__name__}, not a text')
    if not value.strip():
        raise ValueError(f'has an empty "{key}"')
    return value.strip()


def take(
    rows: tuple[Row, ...], count: int, skip: int, *, dataset: str, split: str, first: int = 0
) -> list[Problem]:
    """Some rows as problems.

    Args:
        first: the number of the first row in its file, so that a problem keeps its id when the
            sizes of the splits change.

    Raises:
        ValueError: if there are fewer rows than asked for.
    """
    if skip + count > len(rows):
        raise ValueError(
            f"{dataset} has {len(rows)} problems in {split}, fewer than the {count} asked for"
            + (f" after the first {skip}" if skip else "")
        )
    return [
        Problem(dataset, split, first + index, row.question, row.answer, row.solution)
        for index, row in enumerate(rows[skip : skip + count], skip)
    ]


def content_hash(*splits: tuple[Row, ...]) -> str:
    """Eight hexadecimal digits that change when any text does."""
    digest = hashlib.sha256()
    for rows in splits:
        texts = [[row.question, row.answer, row.solution] for row in rows]
        digest.update(json.dumps(texts).encode())
    return digest.hexdigest()[:8]


def _decoder(line: bytes) -> Callable[[], Any]:
    def decode() -> Any:
        try:
            return json.loads(line)
        except UnicodeDecodeError:
            raise ValueError("is not UTF-8") from None
        except json.JSONDecodeError as error:
            raise ValueError(f"is not JSON ({error.msg}, column {error.colno})") from None

    return decode
