"""Sequence-level distillation: fine-tune a student on the text of observed traces.

    L = - sum_t log q(y_t | x, y_<t)   over the completion, end-of-sequence included.

The student reads the text through its own tokenizer, so teacher and student may differ in it.
Reference: Kim and Rush 2016, "Sequence-level knowledge distillation", arXiv:1606.07947.
"""

from collections.abc import Sequence
from typing import Literal

from azeotrope.attacks.base import Attack, AttackConfig, longest
from azeotrope.heads.chunked import sequence_loss
from azeotrope.models import Loaded
from azeotrope.problems import Task
from azeotrope.tokens import Boundary, Example, collate
from azeotrope.traces import Trace, example_of
from azeotrope.training import TokenSum


class Config(AttackConfig):
    name: Literal["text_sft"] = "text_sft"


class TextSft(Attack):
    needs = "text"

    def examples(
        self, student: Loaded, traces: Sequence[Trace], task: Task, boundary: Boundary
    ) -> list[Example]:
        """Observed texts as the student reads them.

        Raises:
            ValueError: if a trace is longer than the student's context.
        """
        return [
            example_of(trace, student.tokenizer, task, boundary, longest(self.config, student))
            for trace in traces
        ]

    def loss(self, student: Loaded, examples: list[Example]) -> TokenSum:
        pad = int(student.tokenizer.pad_token_id)  # type: ignore[arg-type]
        return sequence_loss(student.model, collate(examples, pad).to(student.device))


def build(config: Config) -> TextSft:
    return TextSft(config)
