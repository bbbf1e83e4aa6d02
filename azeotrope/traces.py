"""Traces: completions of problems, as an attacker collects them, with their origin.

A trace's id is a hash of the problem, the prompt template and the sample number. So the same row
that is made twice has the same id, and a file that holds an id twice is refused.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from azeotrope.files import write_parquet
from azeotrope.problems import Problem, Task
from azeotrope.tokens import Boundary, Example, encode

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("problem", pa.string()),
        ("template", pa.string()),
        ("sample", pa.int32()),
        ("question", pa.string()),
        ("reference", pa.string()),
        ("text", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("completion_ids", pa.list_(pa.int32())),
        ("finished", pa.bool_()),
        ("correct", pa.bool_()),
        ("model", pa.string()),
        ("defense", pa.string()),
        ("decoding", pa.string()),
        ("seed", pa.int64()),
    ]
)


@dataclass(frozen=True)
class Trace:
    """One completion of one problem.

    `model` is the writer (`ground_truth` for a reference solution), `defense` the active defense,
    `decoding` how tokens were drawn (`greedy` or `sampled@T`). `prompt_ids` and `completion_ids`
    are the writer's own tokens; they are empty for text that was not generated here.
    """

    id: str
    problem: str
    template: str
    sample: int
    question: str
    reference: str
    text: str
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    finished: bool
    correct: bool
    model: str
    defense: str
    decoding: str
    seed: int

    def with_text(self, text: str, correct: bool) -> "Trace":
        """The same trace rewritten; the writer's tokens no longer describe it."""
        return replace(self, text=text, correct=correct, prompt_ids=(), completion_ids=())


def trace_id(problem: Problem, template: str, sample: int) -> str:
    """The id of a trace, from what it answers and how often that was answered before."""
    key = f"{problem.dataset}\n{problem.split}\n{problem.row}\n{template}\n{sample}"
    return hashlib.sha256(key.encode()).hexdigest()[:24]


def row_seed(identity: str, seed: int) -> int:
    """The seed of one row's random numbers: a hash, so that rows and runs never share numbers."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{identity}".encode()).digest()[:8], "big") >> 1


def ground_truth(task: Task, problems: Sequence[Problem]) -> list[Trace]:
    """The reference solutions as traces: what an attacker has without any teacher."""
    return [
        Trace(
            id=trace_id(problem, task.template, 0),
            problem=problem.id,
            template=task.template,
            sample=0,
            question=problem.question,
            reference=problem.answer,
            text=problem.solution,
            prompt_ids=(),
            completion_ids=(),
            finished=True,
            correct=task.check(problem.solution, problem.answer),
            model="ground_truth",
            defense="none",
            decoding="none",
            seed=0,
        )
        for problem in problems
    ]


def example_of(
    trace: Trace,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    boundary: Boundary,
    max_length: int,
) -> Example:
    """A trace's question and text as the tokens of any model; the writer's own are not used.

    Raises:
        ValueError: if the example is longer than `max_length` tokens, or the text is empty.
    """
    return encode(
        tokenizer,
        task.messages(trace.question),
        trace.text,
        boundary=boundary,
        max_length=max_length,
        finished=trace.finished,
        id=trace.id,
    )


class DroppedTraces(NamedTuple):
    """How many traces a student could not learn from."""

    empty: int = 0
    too_long: int = 0


def fitting(
    traces: Sequence[Trace],
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    boundary: Boundary,
    longest: int,
    *,
    drops_long: bool = True,
) -> tuple[list[Trace], DroppedTraces]:
    """The traces that a student can learn from, and how many others there are.

    A trace is empty if a defense or a clean-up left nothing of it, such as the answer of a
    completion that was cut off in its reasoning.

    Args:
        longest: tokens of prompt and completion together.
        drops_long: leave longer traces out; otherwise they are kept, and reading them fails.
    """
    full = [trace for trace in traces if trace.text.strip()]
    kept = full
    if drops_long:
        read = [example_of(trace, tokenizer, task, boundary, 1 << 30) for trace in full]
        kept = [t for t, example in zip(full, read, strict=True) if len(example) <= longest]
    return kept, DroppedTraces(len(traces) - len(full), len(full) - len(kept))


def write_traces(path: Path, traces: Iterable[Trace]) -> None:
    """Write one Parquet file; it appears whole or not at all.

    Raises:
        ValueError: if an id occurs twice.
    """
    rows = [asdict(trace) for trace in traces]
    _refuse_repeats((row["id"] for row in rows), str(path))
    write_parquet(pa.Table.from_pylist(rows, schema=SCHEMA), path)


def read_traces(source: Path) -> list[Trace]:
    """Every trace of a file, or of all Parquet files of a folder in the order of their names.

    Raises:
        FileNotFoundError: if there is no Parquet file.
        ValueError: if a file has another schema, or an id occurs twice.
    """
    files = sorted(source.glob("*.parquet")) if source.is_dir() else [source]
    if not files or not files[0].is_file():
        raise FileNotFoundError(f"no traces at {source}: expected Parquet files")
    traces: list[Trace] = []
    names = [field.name for field in fields(Trace)]
    for path in files:
        table = pq.read_table(path)
        missing = [name for name in names if name not in table.column_names]
        if missing:
            raise ValueError(f"{path} is not a trace file: it lacks {', '.join(missing)}")
        for row in table.select(names).to_pylist():
            row["prompt_ids"] = tuple(row["prompt_ids"])
            row["completion_ids"] = tuple(row["completion_ids"])
            traces.append(Trace(**row))
    _refuse_repeats((trace.id for trace in traces), str(source))
    return traces


def _refuse_repeats(ids: Iterable[str], file: str) -> None:
    repeated = [identity for identity, count in Counter(ids).items() if count > 1]
    if repeated:
        raise ValueError(
            f"{file} would hold {len(repeated)} trace ids more than once, first {repeated[0]}; "
            "each problem, template and sample number makes one trace"
        )
