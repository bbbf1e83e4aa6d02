"""Collect traces: let a model answer a task's problems and record what it wrote."""

from collections.abc import Callable, Sequence

from torch import Tensor

from azeotrope.generation import Sampling, generate
from azeotrope.models import Loaded
from azeotrope.tasks.base import Problem, Task
from azeotrope.tokens import decode, encode_prompt
from azeotrope.traces import Trace, row_seed, trace_id

BEGUN = 0.25
"""Share of a right solution that a teacher is given as its own, to go on from there."""
SHARD = 250
"""Problems that are answered side by side."""
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


def finish(
    loaded: Loaded,
    task: Task,
    texts: Sequence[Trace],
    sampling: Sampling,
    *,
    share: float = BEGUN,
    shard: int = SHARD,
) -> list[bool]:
    """Whether a model comes to the right answer when others have begun the completion.

    Args:
        share: of each text's tokens that are given to the model as written already; the model
            writes the rest.
        shard: texts that are finished side by side.

    Raises:
        ValueError: if the share is not in [0, 1).
    """
    if not 0 <= share < 1:
        raise ValueError(f"share must be in [0, 1), got {share}")
    parts = (texts[at : at + shard] for at in range(0, len(texts), shard))
    return [right for part in parts for right in _finish(loaded, task, part, sampling, share)]


def _finish(
    loaded: Loaded, task: Task, texts: Sequence[Trace], sampling: Sampling, share: float
) -> list[bool]:
    tokenizer = loaded.tokenizer
    begun: list[list[int]] = []
    for text in texts:
        ids: list[int] = tokenizer(text.text, add_special_tokens=False)["input_ids"]  # type: ignore[assignment]
        begun.append(ids[: int(share * len(ids))])
    prompts = [
        (*encode_prompt(tokenizer, task.messages(text.question)), *ids)
        for text, ids in zip(texts, begun, strict=True)
    ]
    completions = generate(
        loaded.model,
        prompts,
        sampling,
        eos_id=int(tokenizer.eos_token_id),  # type: ignore[arg-type]
        pad_id=int(tokenizer.pad_token_id),  # type: ignore[arg-type]
        seeds=[row_seed(text.id, 0) for text in texts],
    )
    return [
        task.check(decode(tokenizer, [*ids, *completion.ids]), text.reference)
        for text, ids, completion in zip(texts, begun, completions, strict=True)
    ]
