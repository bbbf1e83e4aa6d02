"""Collect traces: let a model answer a task's problems and record what it wrote."""

from collections.abc import Callable, Sequence

from torch import Tensor

from azeotrope.generation import Sampling, generate
from azeotrope.models import Loaded
from azeotrope.tasks.base import Problem, Task
from azeotrope.tokens import decode, encode_prompt
from azeotrope.traces import Trace, row_seed, trace_id

Adjust = Callable[[Tensor, list[list[int]]], Tensor]


def collect(
    loaded: Loaded,
    task: Task,
    problems: Sequence[Problem],
    sampling: Sampling,
    *,
    seed: int = 0,
    sample: int = 0,
    model: str = "teacher",
    defense: str = "none",
    adjust_logits: Adjust | None = None,
) -> list[Trace]:
    """One trace a problem, in order.

    A row's random numbers depend on its id and `seed` alone.

    Args:
        sample: number of the sample, for several completions of one problem.
        model, defense: recorded in the trace.
    """
    ids = [trace_id(problem, task.template, sample) for problem in problems]
    seeds = [row_seed(identity, seed) for identity in ids]
    prompts = [encode_prompt(loaded.tokenizer, task.messages(p.question)) for p in problems]
    completions = generate(
        loaded.model,
        prompts,
        sampling,
        eos_id=int(loaded.tokenizer.eos_token_id),  # type: ignore[arg-type]
        pad_id=int(loaded.tokenizer.pad_token_id),  # type: ignore[arg-type]
        seeds=seeds,
        adjust_logits=adjust_logits,
    )
    traces: list[Trace] = []
    for row, (problem, completion) in enumerate(zip(problems, completions, strict=True)):
        text = decode(loaded.tokenizer, completion.ids)
        traces.append(
            Trace(
                id=ids[row],
                problem=problem.id,
                template=task.template,
                sample=sample,
                question=problem.question,
                reference=problem.answer,
                text=text,
                prompt_ids=prompts[row],
                completion_ids=completion.ids,
                finished=completion.finished,
                correct=task.check(text, problem.answer),
                model=model,
                defense=defense,
                decoding=sampling.label,
                seed=seeds[row],
            )
        )
    return traces
