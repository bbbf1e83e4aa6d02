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
    """An actor failed because of bad data or a full disk; the message is the one it raised."""


@dataclass(frozen=True)
class Link:
    """One kind of actor in the chain, and the arguments of its constructor."""

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

    Actors write their own files, and writing twice gives the same file. They pass the job on.

    Args:
        on_done: called with the number of jobs finished since the last call.

    Raises:
        WorkerError: the first ValueError or OSError of an actor.
        Exception: any other error of an actor, unchanged.
    """
    if not jobs:
        return
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.verbose_stats_logs = False
    slots = Slots.of(resources).generation(resources, len(jobs))
    # All links of a chain run at once, so together they request the resources of one worker.
    workers = max(1, slots // len(chain))
    cpus, gpus = resources.cpus / len(chain), resources.gpus / len(chain)
    data = ray.data.from_items([{"job": job} for job in jobs], override_num_blocks=len(jobs))
    with warnings.catch_warnings():
        # Ray 2.60 warns about the last two but has no named parameters for them yet. Without them
        # Ray restarts an actor for ever that dies from the same cause every time.
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
    """The innermost ValueError or OSError of a chain: their messages are for the user."""
    innermost: Exception | None = None
    while error is not None:
        inner = getattr(error, "cause", None)
        if isinstance(inner, ValueError | OSError):
            innermost = inner
        if isinstance(error, ValueError | OSError) and not isinstance(error, RayError):
            innermost = error
        error = inner if isinstance(inner, BaseException) else error.__cause__
    return innermost
