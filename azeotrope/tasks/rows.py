"""Read JSONL files row by row, with one error that lists the broken rows."""

import codecs
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from azeotrope.problems import Problem

UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
SHOWN = 5
"""How many broken rows an error lists; the rest are counted."""


@dataclass(frozen=True)
class ProblemText:
    """The text of one problem; `solution` ends with `#### answer`."""

    question: str
    answer: str
    solution: str


T = TypeVar("T")
Parse = Callable[[Mapping[str, Any]], ProblemText]
"""Turns the fields of a row into text, or raises ValueError with the reason why it cannot."""


def read(path: Path, parse: Parse, *, expected: str) -> tuple[ProblemText, ...]:
    """Every row of a JSONL file, in order; blank lines are skipped.

    Args:
        expected: what the file should hold, for the error when it is missing.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: once for the whole file, if any row is broken or if there is none.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; expected {expected}")
    content = path.read_bytes()
    if content.startswith(UTF16):
        raise ValueError(f"{path} is not UTF-8 but UTF-16; save it as UTF-8")
    lines = content.splitlines()
    numbered = ((f"line {number}", line) for number, line in enumerate(lines, 1) if line.strip())
    return parse_rows(numbered, _decode, parse, source=str(path))


def parse_rows(
    numbered: Iterable[tuple[str, T]], decode: Callable[[T], Any], parse: Parse, *, source: str
) -> tuple[ProblemText, ...]:
    """Parse rows that come with their positions, and report all broken ones at once.

    Args:
        numbered: the position of each row, such as `line 3`, and the row.
        decode: turns a row into its fields; raises ValueError with the reason if it cannot.
        source: the name of the file, for errors.

    Raises:
        ValueError: if any row is broken or if there is none.
    """
    rows: list[ProblemText] = []
    broken: list[str] = []
    for position, raw in numbered:
        try:
            fields = decode(raw)
            if not isinstance(fields, dict):
                raise ValueError(f"is a {type(fields).__name__}, not an object with named fields")
            rows.append(parse(fields))
        except ValueError as error:
            broken.append(f"{position} {error}")
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
    """A field that must be a text that is not blank.

    Raises:
        ValueError: if it is missing, of another type, or blank.
    """
    if key not in fields:
        present = ", ".join(sorted(map(str, fields))) or "nothing"
        raise ValueError(f'has no "{key}" (it has {present})')
    value = fields[key]
    if not isinstance(value, str):
        raise ValueError(f'has a "{key}" that is a {type(value).__name__}, not a text')
    if not value.strip():
        raise ValueError(f'has an empty "{key}"')
    return value.strip()


def take(
    rows: tuple[ProblemText, ...],
    count: int,
    skip: int,
    *,
    dataset: str,
    split: str,
    first: int = 0,
) -> list[Problem]:
    """The rows from `skip` on, `count` of them, as problems.

    Args:
        first: number of the first of `rows` in its file. With it a problem keeps its id when the
            sizes of the splits change.

    Raises:
        ValueError: if there are too few rows.
    """
    if skip + count > len(rows):
        raise ValueError(
            f"{dataset} has {len(rows)} problems in {split}, fewer than the {count} requested"
            + (f" after the first {skip}" if skip else "")
        )
    return [
        Problem(dataset, split, first + index, row.question, row.answer, row.solution)
        for index, row in enumerate(rows[skip : skip + count], skip)
    ]


def content_hash(*splits: tuple[ProblemText, ...]) -> str:
    """Eight hexadecimal digits that change when any text does."""
    digest = hashlib.sha256()
    for rows in splits:
        texts = [[row.question, row.answer, row.solution] for row in rows]
        digest.update(json.dumps(texts).encode())
    return digest.hexdigest()[:8]


def _decode(line: bytes) -> Any:
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8") from None
    try:
        fields = json.loads(text, parse_constant=_no_constant, parse_float=_finite)
        # A lone half of a surrogate pair, which JSON can spell, is no character.
        json.dumps(fields, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON ({error.msg}, column {error.colno})") from None
    except UnicodeEncodeError:
        raise ValueError("holds half of a surrogate pair, which is no character") from None
    except RecursionError:
        raise ValueError("is nested too deeply to be a row") from None
    return fields


def _no_constant(name: str) -> Any:
    raise ValueError(f"holds {name}, which is no number; write a finite one, or a text")


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"holds {number}, which is too large; write a smaller number, or a text")
    return value
