"""Collect traces: let a model answer a task's problems and record what it wrote."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from azeotrope.decoding import DecodingHooks
from azeotrope.endings import end_ids
from azeotrope.generation import Sampling, generate
from azeotrope.models import Loaded
from azeotrope.problems import Problem, Task
from azeotrope.tokens import decode, encode_prompt
from azeotrope.traces import Trace, row_seed, trace_id

BEGUN = 0.25
"""Share of a right solution that a teacher gets as its own beginning, to continue from there."""
SHARD = 250
"""Problems that are answered in one batch. The batch decides the last bits of every logit."""
T = TypeVar("T")


@dataclass(frozen=True)
class Origin:
    """Where traces come from: what is recorded in them, and what their random numbers depend on."""

    seed: int = 0
    sample: int = 0
    """Number of the sample, for several completions of one problem."""
    model: str = "teacher"
    defense: str = "none"


def shards(sequence: Sequence[T], size: int | None) -> Iterator[Sequence[T]]:
    """Consecutive parts of at most `size` entries; None for all in one part."""
    step = size or max(len(sequence), 1)
    return (sequence[start : start + step] for start in range(0, len(sequence), step))


def collect(
    loaded: Loaded,
    task: Task,
    problems: Sequence[Problem],
    sampling: Sampling,
    *,
    origin: Origin = Origin(),  # it is immutable
    hooks: Sequence[DecodingHooks] = (),
    shard: int | None = None,
) -> list[Trace]:
    """One trace per problem, in order.

    A row's random numbers depend on its id and the origin's seed alone.

    Args:
        hooks: decoding defenses, in the order in which they act.
        shard: number of problems that are answered in one batch; None for all of them.
    """
    return [
        trace
        for part in shards(problems, shard)
        for trace in _collect(loaded, task, part, sampling, origin, hooks)
    ]


def _collect(
    loaded: Loaded,
    task: Task,
    problems: Sequence[Problem],
    sampling: Sampling,
    origin: Origin,
    hooks: Sequence[DecodingHooks],
) -> list[Trace]:
    tokenizer = loaded.tokenizer
    ids = [trace_id(problem, task.template, origin.sample) for problem in problems]
    seeds = [row_seed(identity, origin.seed) for identity in ids]
    prompts = [encode_prompt(tokenizer, task.messages(p.question)) for p in problems]
    completions = generate(
        loaded.model,
        prompts,
        sampling,
        end_ids=end_ids(tokenizer),
        pad_id=int(tokenizer.pad_token_id),  # type: ignore[arg-type]
        seeds=seeds,
        hooks=hooks,
    )
    texts = [decode(tokenizer, completion.ids) for completion in completions]
    return [
        Trace(
            id=ids[row],
            problem=problem.id,
            template=task.template,
            sample=origin.sample,
            question=problem.question,
            reference=problem.answer,
            text=texts[row],
            prompt_ids=prompts[row],
            completion_ids=completions[row].ids,
            finished=completions[row].finished,
            correct=task.check(texts[row], problem.answer),
            model=origin.model,
            defense=origin.defense,
            decoding=sampling.label,
            seed=seeds[row],
        )
        for row, problem in enumerate(problems)
    ]


def finish(
    loaded: Loaded,
    task: Task,
    texts: Sequence[Trace],
    sampling: Sampling,
    *,
    share: float = BEGUN,
    shard: int = SHARD,
) -> list[bool]:
    """Whether a model arrives at the right answer if it continues the beginning of a solution.

    Args:
        share: of each text's tokens that the model gets as written already; it writes the rest.
        shard: number of texts that are finished in one batch.

    Raises:
        ValueError: if the share is not in [0, 1).
    """
    if not 0 <= share < 1:
        raise ValueError(f"share must be in [0, 1), got {share}")
    return [
        right
        for part in shards(texts, shard)
        for right in _finish(loaded, task, part, sampling, share)
    ]


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
        end_ids=end_ids(tokenizer),
        pad_id=int(tokenizer.pad_token_id),  # type: ignore[arg-type]
        seeds=[row_seed(text.id, 0) for text in texts],
    )
    return [
        task.check(decode(tokenizer, [*ids, *completion.ids]), text.reference)
        for text, ids, completion in zip(texts, begun, completions, strict=True)
    ]
