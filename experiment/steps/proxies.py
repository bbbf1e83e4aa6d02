"""Proxies that are prepared to read along while the teacher writes."""

from collections.abc import Sequence

from actors import pool
from actors.preparer import PreparationActor, PreparationJob
from azeotrope import models
from azeotrope.defenses.proxied import ProxiedDecoding
from experiment.stages import Stage
from experiment.steps.context import StepContext


class ProxySteps:
    """Makes stages of prepared proxies, one for each proxy."""

    def __init__(self, context: StepContext) -> None:
        self._context = context

    def prepare(
        self, defense: ProxiedDecoding, proxies: Sequence[str], teacher: str, traces: Stage
    ) -> list[Stage]:
        """Measure proxies on clean traces, and take their directions if the defense needs them.

        Args:
            teacher: the model that wrote the traces.
            traces: held-out traces that the attacker does not see; all of them are used.

        Raises:
            WorkerError: if a proxy has other tokens than the teacher, learned too little of it, or
                no step makes the finite difference accurate enough.
        """
        context, config = self._context, self._context.config
        settings = defense.config.preparation
        stages = {
            name: context.cache.stage(
                "proxy",
                proxy=context.fingerprint(name),
                teacher=context.fingerprint(teacher),
                traces=traces.key,
                settings=settings.dump(),
                with_direction=defense.needs_direction,
                boundary=config.boundary.dump(),
                max_length=config.max_length,
            )
            for name in proxies
        }
        with context.cache.claim(list(stages.values())) as missing:
            keys = {stage.key for stage in missing}
            jobs = [
                PreparationJob(
                    proxy=models.resolve(name),
                    teacher=models.resolve(teacher),
                    traces=tuple(str(file) for file in sorted(traces.path.glob("*.parquet"))),
                    folder=str(stage.partial),
                    settings=settings,
                    with_direction=defense.needs_direction,
                    boundary=config.boundary,
                    max_length=config.max_length,
                    task=config.task,
                ).model_dump_json()
                for name, stage in stages.items()
                if stage.key in keys
            ]
            if jobs:
                with context.display.task("prepare proxies", len(jobs)) as advance:
                    context.start_ray()
                    chain = [pool.Link(PreparationActor)]
                    pool.run_jobs(jobs, chain, config.resources, on_done=advance)
            for stage in missing:
                context.cache.finish(stage, 0.0)
        return list(stages.values())
