"""Traces: completions that a model writes, and the ground truth of problems."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from actors import pool
from actors.generator import GenerationJob, GenerationWorker
from azeotrope import models
from azeotrope.tasks import build as build_task
from azeotrope.traces import ground_truth, read_traces, write_traces
from experiment.plan import ProblemRange, TraceRequest
from experiment.stages import Stage
from experiment.steps.complete import check_complete
from experiment.steps.context import StepContext


class TraceSteps:
    """Makes stages of traces."""

    def __init__(self, context: StepContext) -> None:
        self._context = context

    def generate(self, requests: Sequence[TraceRequest]) -> list[Stage]:
        """Make all requested traces in one pass over the generation workers.

        Raises:
            WorkerError: if a worker met bad data or a full disk.
            ValueError: if a trace occurs twice in a stage.
            IncompleteStageError: if a shard that was made is missing or too short.
        """
        context = self._context
        started = time.perf_counter()
        stages = [self.stage_of(request) for request in requests]
        by_key = {stage.key: request for request, stage in zip(requests, stages, strict=True)}
        # Locked from here on, so that a second process waits instead of writing the same texts.
        with context.cache.claim(list({stage.key: stage for stage in stages}.values())) as missing:
            jobs = {stage.key: self.jobs(by_key[stage.key], stage) for stage in missing}
            self._run([job for shards in jobs.values() for job in shards], by_key, missing)
            # Stages made in one pass share its time: their shards were made side by side.
            seconds = time.perf_counter() - started
            for stage in missing:
                shards = {Path(job.output): job.count for job in jobs[stage.key]}
                check_complete(stage, shards)
                # Reading refuses ids that occur twice, within a shard and over all of them.
                read_traces(stage.partial)
                context.cache.finish(stage, seconds)
        return stages

    def _run(
        self,
        jobs: Sequence[GenerationJob],
        requests: Mapping[str, TraceRequest],
        stages: Sequence[Stage],
    ) -> None:
        """Make the shards that do not exist yet."""
        open_jobs = [job for job in jobs if not Path(job.output).is_file()]
        if not open_jobs:
            return
        context = self._context
        labels = sorted({requests[stage.key].label for stage in stages})
        with context.display.task(f"generate: {', '.join(labels)}", len(open_jobs)) as advance:
            context.start_ray()
            texts = [job.model_dump_json() for job in open_jobs]
            chain = [pool.Link(GenerationWorker)]
            pool.run_jobs(texts, chain, context.config.resources, on_done=advance)

    def stage_of(self, request: TraceRequest) -> Stage:
        """The stage that holds the requested traces once they are made."""
        config, problems = self._context.config, request.problems
        return self._context.cache.stage(
            "traces",
            model=self._context.fingerprint(request.model),
            label=request.label,
            task=config.task.described(),
            split=problems.split,
            count=problems.count,
            sampling=request.sampling.dump(),
            defense=request.defense,
            decoding=[_content(part) for part in request.decoding],
            seed=request.seed,
            **({"skip": problems.skip} if problems.skip else {}),
            # Rows of one shard are one batch, and a batch of another shape rounds otherwise.
            shard=config.shard,
        )

    def jobs(self, request: TraceRequest, stage: Stage) -> list[GenerationJob]:
        """The shards of a request, each one job of a worker."""
        config, problems = self._context.config, request.problems
        # At least two shards, so that two workers have something to do.
        shard = min(config.shard, max(1, -(-problems.count // 2)))
        return [
            GenerationJob(
                model=models.resolve(request.model),
                label=request.label,
                task=config.task,
                split=problems.split,
                start=problems.skip + start,
                count=min(shard, problems.count - start),
                sampling=request.sampling,
                seed=request.seed,
                defense=request.defense,
                decoding=request.decoding,
                output=str(stage.partial / f"{start:07d}.parquet"),
            )
            for start in range(0, problems.count, shard)
        ]

    def ground_truth(self, problems: ProblemRange) -> Stage:
        """Reference solutions as traces: what an attacker has without any teacher."""
        task_config = self._context.config.task
        # Stages of the first training problems are described by their number alone.
        origin = {"split": problems.split, "skip": problems.skip}
        description = {} if origin == {"split": "train", "skip": 0} else origin
        stage = self._context.cache.stage(
            "truth", task=task_config.described(), count=problems.count, **description
        )

        def make(folder: Path) -> None:
            task = build_task(task_config)
            selected = task.problems(problems.split, problems.count, skip=problems.skip)
            write_traces(folder / "0000000.parquet", ground_truth(task, selected))

        return self._context.cache.build(stage, make)


def _content(part: dict[str, Any]) -> dict[str, Any]:
    """A decoding defense as stages describe it: by what it holds, not by where that lies."""
    if not part.get("prepared"):
        return part
    # A prepared proxy lies in a stage, whose folder is named by its content.
    return {**part, "prepared": [Path(folder).name for folder in part["prepared"]]}
