"""Rows of `results.json`: their columns, how they are written, and how older files are read."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from azeotrope.config import Config, explain

SCHEMA = 2
SCHEMA_1_CLEANUPS = {"none", "correct_only", "drop_reasoning", "digits"}
"""The clean-ups of the versions that wrote schema 1. In that schema the variant of an attack stood
in the column `cleanup`, so any other value there is a variant."""


class AttackCost(Config):
    """What an attacker spent beside the observed traces and the student's training."""

    queries: int = Field(default=0, ge=0, description="requests to any model")
    tokens: int = Field(default=0, ge=0, description="tokens that these models wrote")
    seconds: float = Field(default=0.0, ge=0, description="wall time")


class ResultRow(Config):
    """One measured number of `results.json`."""

    role: Literal["teacher", "student", "suspect"]
    model: str = Field(description="short name of the checkpoint")
    defense: str = "none"
    strength: float | None = Field(default=None, allow_inf_nan=False)
    attack: str = Field(default="none", description="`none` is the base student")
    variant: str = Field(default="none", description="tells settings of one attack apart")
    cleanup: str = Field(default="none", description="labels of clean-ups, joined with `+`")
    settings: dict[str, Any] = Field(
        default={},
        description="resolved settings: `defense` (a list of its parts), `attack`, and `cleanup` "
        "(a list of its parts); a key is absent where nothing was applied",
    )
    cost: AttackCost | None = Field(default=None, description="null if unknown")
    decoding: str = Field(default="greedy", description="`greedy` or `sampled@T`")
    traces: int = Field(default=0, ge=0, description="traces that the attacker observed")
    task: str
    metric: str
    value: float = Field(allow_inf_nan=False)
    n: int = Field(ge=0, description="problems behind the value")
    ci95: tuple[float, float]
    seed: int = 0
    seconds: float = Field(default=0.0, ge=0)


def results_document(run: Mapping[str, Any], rows: Sequence[ResultRow]) -> dict[str, Any]:
    """The content of `results.json`: the schema version, facts about the run, and the rows."""
    return {"schema": SCHEMA, "run": dict(run), "rows": [row.dump() for row in rows]}


def read_document(path: Path) -> tuple[dict[str, Any], list[ResultRow]]:
    """The run's facts and the rows of a results file of schema 1 or 2.

    Raises:
        ValueError: if the file is missing, is not JSON, has another schema version, or holds a
            row that does not fit; the message names the file and the row.
    """
    if not path.is_file():
        raise ValueError(f"no results at {path}")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(document, dict) or "schema" not in document:
        raise ValueError(f"{path} is not a results file: it has no schema version")
    schema = document["schema"]
    if schema not in (1, SCHEMA):
        raise ValueError(f"{path} has schema {schema!r}; this version reads schemas 1 and {SCHEMA}")
    run, rows = document.get("run", {}), document.get("rows")
    if not isinstance(run, dict) or not isinstance(rows, list):
        raise ValueError(f"{path} must hold a mapping 'run' and a list 'rows'")
    if schema == 1:
        rows = [_upgraded(row) for row in rows]
    return run, [_row(row, index, path) for index, row in enumerate(rows)]


def _upgraded(row: Any) -> Any:
    """A row of schema 1 in the columns of schema 2; settings and cost were not recorded."""
    if not isinstance(row, dict) or row.get("cleanup", "none") in SCHEMA_1_CLEANUPS:
        return row
    return {**row, "variant": row["cleanup"], "cleanup": "none"}


def _row(data: Any, index: int, path: Path) -> ResultRow:
    try:
        return ResultRow.model_validate(data)
    except ValidationError as error:
        raise ValueError(f"{path}, row {index}: {explain(error, ResultRow, whole='row')}") from None
