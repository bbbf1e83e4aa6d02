"""Texts that a student learns from, with the teacher's hidden states where both can be compared."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from azeotrope.attacks.logits.teacher import TeacherHead
from azeotrope.endings import end_ids
from azeotrope.logits.alignment import Meeting, meetings
from azeotrope.tokens import Example
from azeotrope.traces import Trace


@dataclass(frozen=True)
class Lesson:
    """A text as the student reads it, and the teacher's hidden states where both can be compared.

    `at` counts the student's completion tokens. `hidden` and `prefixes` have one row for each of
    them; a prefix is the pieces of the teacher's token that the student has already written, with
    -1 after the last.
    """

    example: Example
    at: Int[Tensor, " positions"]
    hidden: Float[Tensor, "positions hidden"]
    prefixes: Int[Tensor, "positions depth"]

    @property
    def id(self) -> str:
        return self.example.id


@dataclass(frozen=True)
class ComparedPositions:
    """The positions of a batch at which student and teacher are compared, one row per position."""

    hidden: Tensor
    prefixes: Tensor
    share: Tensor
    """Number of its text's tokens that a position stands for."""


def make_lesson(
    example: Example,
    trace: Trace,
    student: PreTrainedTokenizerBase,
    teacher: TeacherHead,
    table: Int[Tensor, "vocab depth"] | None,
    *,
    shows_all: bool,
) -> Lesson:
    """Align a text with the teacher's hidden states.

    Args:
        table: `spellings` of the teacher's tokens; None if both models have one vocabulary.
        shows_all: whether the API shows every token. If not, positions inside a token of the
            teacher's are left out, because it is unknown how the hidden tokens continue.

    Raises:
        ValueError: if the teacher has read another text under this trace's id, or none.
    """
    scored = teacher.features.get(trace.id)
    if scored is None:
        raise ValueError(f"the teacher was not asked about trace {trace.id}")
    written = scored.targets.tolist()
    if table is None and written == list(example.completion):
        no_prefix = torch.zeros(len(written), 0, dtype=torch.long)
        return Lesson(example, torch.arange(len(written)), scored.hidden, no_prefix)
    compared = [
        meeting
        for meeting in _meetings(trace, student, teacher, table, written)
        if shows_all or not meeting.prefix
    ]
    width = max([1, *(len(meeting.prefix) for meeting in compared)])
    prefixes = torch.full((len(compared), width), -1, dtype=torch.long)
    for row, meeting in enumerate(compared):
        prefixes[row, : len(meeting.prefix)] = torch.tensor(meeting.prefix, dtype=torch.long)
    at = torch.tensor([meeting.ours for meeting in compared], dtype=torch.long)
    hidden = scored.hidden[[meeting.theirs for meeting in compared]]
    return Lesson(example, at, hidden, prefixes)


def _meetings(
    trace: Trace,
    student: PreTrainedTokenizerBase,
    teacher: TeacherHead,
    table: Tensor | None,
    written: list[int],
) -> list[Meeting]:
    if table is None:
        # Tokens of one vocabulary are not made of one another's pieces.
        table = torch.zeros(teacher.rows, 0, dtype=torch.long)
    stops = trace.finished and written[-1:] != [] and written[-1] in end_ids(teacher.tokenizer)
    try:
        return meetings(
            trace.text,
            student,
            teacher.tokenizer,
            table,
            finished=stops,
            written=written[:-1] if stops else written,
        )
    except ValueError as error:
        raise ValueError(
            f"the teacher was asked about another text than that of trace {trace.id}; a "
            "clean-up that rewrites text does not go together with logits of the old one"
        ) from error


def join_lessons(
    lessons: Sequence[Lesson], device: torch.device
) -> tuple[Int[Tensor, " tokens"], ComparedPositions]:
    """For each of the batch's tokens its row among the compared positions, or -1; and those."""
    rows: list[Tensor] = []
    shares: list[Tensor] = []
    first, width = 0, max(lesson.prefixes.shape[1] for lesson in lessons)
    for lesson in lessons:
        tokens, count = len(lesson.example.completion), len(lesson.at)
        row = torch.full((tokens,), -1, dtype=torch.long)
        row[lesson.at] = torch.arange(first, first + count)
        rows.append(row)
        first += count
        shares.append(torch.full((count,), tokens / max(count, 1)))
    prefixes = [F.pad(x.prefixes, (0, width - x.prefixes.shape[1]), value=-1) for x in lessons]
    positions = ComparedPositions(
        torch.cat([lesson.hidden for lesson in lessons]).to(device),
        torch.cat(prefixes).to(device),
        torch.cat(shares).to(device),
    )
    return torch.cat(rows).to(device), positions
