"""Send jobs through chains of actors with Ray Data: parallel, restarted on death, with progress."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.data import ActorPoolStrategy, DataContext

from actors.resources import Resources, Slots


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
        ray.exceptions.RayTaskError: the first error of an actor, its cause included.
    """
    if not jobs:
        return
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.verbose_stats_logs = False
    workers = Slots.of(resources).generation(resources, len(jobs))
    # All links of a chain live at once, so they share the CPUs that one link would take.
    cpus = resources.cpus / len(chain)
    data = ray.data.from_items([{"job": job} for job in jobs], override_num_blocks=len(jobs))
    for link in chain:
        data = data.map_batches(
            link.actor,
            fn_constructor_kwargs=link.arguments,
            batch_size=1,
            compute=ActorPoolStrategy(size=workers),
            num_cpus=cpus,
            num_gpus=resources.gpus / len(chain) or None,
            max_restarts=resources.restarts,
            max_task_retries=resources.restarts,
        )
    for _ in data.iter_rows():
        if on_done is not None:
            on_done(1)
