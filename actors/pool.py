"""Send jobs through chains of actors with Ray Data: parallel, restarted on death, with progress."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.data import ActorPoolStrategy, DataContext
from ray.exceptions import RayError

from actors.resources import Resources, Slots


class WorkerError(RuntimeError):
    """An actor met bad data or a full disk; the message is the one it raised."""


@dataclass(frozen=True)
class Link:
    """One kind of actor in the chain, and what each is constructed with."""

    actor: type
    arguments: dict[str, Any] = field(default_factory=dict)


def run_jobs(
    jobs: Sequence[str],
    chain: Sequence[Link],
    resources: Resources,
    *,
    on_done: Callable[[int], None] | None = None,
) -> None:
    """Push every job (a JSON text) through every link, in order.

    Actors write their own files and do so idempotently; what flows on is the job itself.

    Args:
        on_done: called with the number of jobs finished since the last call.

    Raises:
        WorkerError: the first error of an actor that its user can do something about.
        Exception: any other, as it came.
    """
    if not jobs:
        return
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.verbose_stats_logs = False
    slots = Slots.of(resources).generation(resources, len(jobs))
    # All links of a chain live at once, so together they ask for what one worker may have.
    workers = max(1, slots // len(chain))
    cpus, gpus = resources.cpus / len(chain), resources.gpus / len(chain)
    data = ray.data.from_items([{"job": job} for job in jobs], override_num_blocks=len(jobs))
    with warnings.catch_warnings():
        # Ray 2.60 warns about these two, and has no named parameters for them yet; without
        # them an actor that dies of the same cause every time is restarted for ever.
        warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
        for link in chain:
            data = data.map_batches(
                link.actor,
                fn_constructor_kwargs=link.arguments,
                batch_size=1,
                compute=ActorPoolStrategy(size=workers),
                num_cpus=cpus,
                num_gpus=gpus or None,
                max_restarts=resources.restarts,
                max_task_retries=resources.restarts,
            )
    try:
        for _ in data.iter_rows():
            if on_done is not None:
                on_done(1)
    except Exception as error:
        reason = _reason(error)
        if reason is None:
            raise
        raise WorkerError(str(reason)) from error


def _reason(error: BaseException | None) -> Exception | None:
    """The innermost error of a chain, if it is of a kind whose message is for the user."""
    found: Exception | None = None
    while error is not None:
        inner = getattr(error, "cause", None)
        if isinstance(inner, ValueError | OSError):
            found = inner
        if isinstance(error, ValueError | OSError) and not isinstance(error, RayError):
            found = error
        error = inner if isinstance(inner, BaseException) else error.__cause__
    return found
