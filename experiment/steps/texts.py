"""Traces after a defense of stage `text`, with a count of what happened to them."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from azeotrope.defenses.base import Defense, FinishedText, RewriteContext, RewrittenText
from azeotrope.files import write_json
from azeotrope.problems import Task
from azeotrope.tasks import build as build_task
from azeotrope.traces import Trace, read_traces, write_traces
from experiment.stages import Stage
from experiment.steps.context import StepContext

COUNTS = "text.json"
"""The file of a stage that counts texts per status, and per reason those that fell back."""


class TextSteps:
    """Rewrites finished traces."""

    def __init__(self, context: StepContext) -> None:
        self._context = context

    def rewrite(self, source: Stage, defense: Defense, label: str) -> Stage:
        """The traces of a stage after a text defense; the task checks changed answers again.

        Args:
            label: the defense's name in result tables.

        Raises:
            ValueError: if the defense returns another number of texts than it was given.
        """
        context = self._context
        boundary = context.config.boundary
        stage = context.cache.stage(
            "text",
            source=source.key,
            defense=defense.config.dump(),
            boundary=boundary.dump(),
            label=label,
        )

        def make(folder: Path) -> None:
            task = build_task(context.config.task)
            traces = read_traces(source.path)
            rewrite_context = RewriteContext(boundary, has_answer=task.check)
            results: list[RewrittenText] = []
            try:
                with context.display.task(f"rewrite: {label}", len(traces)) as advance:
                    for start in range(0, len(traces), context.config.shard):
                        batch = traces[start : start + context.config.shard]
                        texts = [FinishedText(t.text, t.question, t.reference) for t in batch]
                        results += defense.rewrite(texts, rewrite_context)
                        advance(len(batch))
            finally:
                defense.close()
            pairs = zip(traces, results, strict=True)
            rewritten = [_with_result(trace, result, task) for trace, result in pairs]
            write_traces(folder / "0000000.parquet", rewritten)
            write_json(folder / COUNTS, counts(results))

        return context.cache.build(stage, make)


def _with_result(trace: Trace, result: RewrittenText, task: Task) -> Trace:
    unchanged = result.text == trace.text
    correct = trace.correct if unchanged else task.check(result.text, trace.reference)
    return trace.with_text(result.text, correct)


def counts(results: Sequence[RewrittenText]) -> dict[str, Any]:
    """The number of texts per status, and per reason of those that fell back."""
    return {
        "statuses": Counter(result.status for result in results),
        "fell_back": Counter(r.reason for r in results if r.status == "fell_back"),
    }
