"""The steps of an experiment, each a cached stage: traces, features, heads, students."""

import json
import shutil
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors import pool, session, trainer
from actors.generator import GenerationJob, GenerationWorker
from actors.heads import HeadJob
from actors.proxy import ProxyActor
from actors.resources import Slots
from actors.students import StudentJob
from actors.teacher import FeatureJob, TeacherActor
from azeotrope import models
from azeotrope.config import digest
from azeotrope.defenses.base import Defense
from azeotrope.generation import Sampling
from azeotrope.head_training import HeadTraining
from azeotrope.tasks import build as build_task
from azeotrope.tasks import is_local as task_is_local
from azeotrope.traces import ground_truth, read_traces, write_traces
from workflows.display import Display
from workflows.settings import ExperimentConfig, StudentConfig
from workflows.stages import Cache, Stage


@dataclass(frozen=True)
class Request:
    """Traces that somebody needs: who answers what, and how."""

    model: str
    label: str
    split: str
    count: int
    sampling: Sampling
    defense: str = "none"
    decoding: tuple[dict[str, Any], ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class Planned:
    """A training that a stage needs."""

    stage: Stage
    job: dict[str, Any]
    label: str

    @property
    def task(self) -> trainer.Task:
        return trainer.Task(self.label, self.job, str(self.stage.partial))


class StoppedError(RuntimeError):
    """This stage was not started because the run is ending."""


class Steps:
    """Builds stages of one experiment; Ray starts with the first stage that is not in the cache."""

    def __init__(self, config: ExperimentConfig, display: Display) -> None:
        self.config = config
        self.cache = Cache(Path(config.cache))
        self.display = display
        self._fingerprints: dict[str, str] = {}
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Let no thread start another stage."""
        self._stopped.set()
        session.stop()

    # Traces ------------------------------------------------------------------------------

    def traces(self, requests: Sequence[Request]) -> list[Stage]:
        """Make all requested traces in one pass over the generation workers."""
        started = time.perf_counter()
        stages = [self._trace_stage(request) for request in requests]
        missing = {s.key: (r, s) for r, s in zip(requests, stages, strict=True) if not s.is_done}
        jobs = [job for request, stage in missing.values() for job in self._jobs(request, stage)]
        waiting = [job for job in jobs if not Path(job.output).is_file()]
        if waiting:
            names = sorted({request.label for request, _ in missing.values()})
            with self.display.task(f"generate: {', '.join(names)}", len(waiting)) as advance:
                self._ray()
                chain = [pool.Link(GenerationWorker)]
                texts = [job.model_dump_json() for job in waiting]
                pool.run_jobs(texts, chain, self.config.resources, on_done=advance)
        # Stages made in one pass share its time: their shards were made side by side.
        seconds = time.perf_counter() - started
        for _, stage in missing.values():
            with self.cache.claim([stage]) as left:
                for item in left:
                    # Reading refuses ids that occur twice, within a shard and over all of them.
                    read_traces(item.partial)
                    self.cache.finish(item, seconds)
        return stages

    def _trace_stage(self, request: Request) -> Stage:
        return self.cache.stage(
            "traces",
            model=self._fingerprint(request.model),
            label=request.label,
            task=self.config.task.dump(),
            split=request.split,
            count=request.count,
            sampling=request.sampling.dump(),
            defense=request.defense,
            decoding=list(request.decoding),
            seed=request.seed,
            # Rows of one shard are one batch, and a batch of another shape rounds otherwise.
            shard=self.config.shard,
        )

    def _jobs(self, request: Request, stage: Stage) -> list[GenerationJob]:
        shard = min(self.config.shard, max(1, -(-request.count // 2)))
        return [
            GenerationJob(
                model=models.resolve(request.model),
                label=request.label,
                task=self.config.task,
                split=request.split,
                start=start,
                count=min(shard, request.count - start),
                sampling=request.sampling,
                seed=request.seed,
                defense=request.defense,
                decoding=request.decoding,
                output=str(stage.partial / f"{start:07d}.parquet"),
            )
            for start in range(0, request.count, shard)
        ]

    def ground_truth(self, count: int) -> Stage:
        """The thief's own data: reference solutions of the same problems."""
        task_config = self.config.task

        def make(folder: Path) -> None:
            task = build_task(task_config)
            write_traces(
                folder / "0000000.parquet", ground_truth(task, task.problems("train", count))
            )

        stage = self.cache.stage("truth", task=task_config.dump(), count=count)
        return self.cache.build(stage, make)

    def rewritten(self, source: Stage, defense: Defense, label: str) -> Stage:
        """Traces after a text-stage defense; answers are checked again."""
        task_config, boundary = self.config.task, self.config.boundary

        def make(folder: Path) -> None:
            task = build_task(task_config)
            changed = []
            for trace in read_traces(source.path):
                text = defense.rewrite(trace.text, boundary)
                right = trace.correct if text == trace.text else task.check(text, trace.reference)
                changed.append(trace.with_text(text, right))
            write_traces(folder / "0000000.parquet", changed)

        stage = self.cache.stage(
            "text",
            source=source.key,
            defense=defense.config.dump(),
            boundary=boundary.dump(),
            label=label,
        )
        return self.cache.build(stage, make)

    # Heads -------------------------------------------------------------------------------

    def features(
        self,
        traces: Stage,
        teacher: str,
        proxies: tuple[str, ...],
        count: int,
        *,
        only_correct: bool,
    ) -> Stage:
        """Frozen-trunk hidden states of teacher and proxies on the teacher's own traces.

        Args:
            count: traces wanted; whole shards are taken until there are as many.
        """
        config = self.config
        files = sorted(traces.path.glob("*.parquet"))[: -(-count // config.shard)]
        stage = self.cache.stage(
            "features",
            traces=traces.key,
            teacher=self._fingerprint(teacher),
            proxies=[self._fingerprint(name) for name in proxies],
            boundary=config.boundary.dump(),
            max_length=config.max_length,
            only_correct=only_correct,
            files=[file.name for file in files],
        )

        def make(folder: Path) -> None:
            jobs = [
                FeatureJob(
                    traces=str(file),
                    folder=str(folder),
                    boundary=config.boundary,
                    max_length=config.max_length,
                    only_correct=only_correct,
                ).model_dump_json()
                for file in files
            ]
            chain = [pool.Link(TeacherActor, {"model": models.resolve(teacher)})]
            for index, name in enumerate(proxies):
                arguments = {"model": models.resolve(name), "teacher": models.resolve(teacher)}
                chain.append(pool.Link(ProxyActor, {**arguments, "index": index}))
            with self.display.task("features of teacher and proxies", len(jobs)) as advance:
                self._ray()
                pool.run_jobs(jobs, chain, config.resources, on_done=advance)

        return self.cache.build(stage, make)

    def head(
        self, features: Stage, teacher: str, defense: dict[str, Any], training: HeadTraining
    ) -> Stage:
        """A defended head, exported as a plain checkpoint in `teacher/`."""
        config = self.config
        described = {
            "teacher": self._fingerprint(teacher),
            "clean": self._fingerprint(config.teacher),
            "proxies": [self._fingerprint(name) for name in config.proxies],
            "defense": defense,
            "training": training.dump(),
            "features": features.key,
            "task": config.task.dump(),
            "max_new_tokens": config.sampling.max_new_tokens,
            "shard": config.shard,
        }
        stage = self.cache.stage("head", **described)
        job = HeadJob(
            teacher=models.resolve(teacher),
            clean=models.resolve(config.teacher),
            proxies=tuple(models.resolve(name) for name in config.proxies),
            defense=defense,
            training=training,
            features=str(features.path),
            task=config.task,
            max_new_tokens=config.sampling.max_new_tokens,
            shard=config.shard,
        )
        self._train("head", [Planned(stage, job.dump(), f"head: {defense['name']}")])
        return stage

    # Students ----------------------------------------------------------------------------

    def plan_student(
        self, student: StudentConfig, source: Stage, take: int, cleanup: str, seed: int, what: str
    ) -> Planned:
        """A student to be trained on the first `take` traces of a stage, and examined."""
        config = self.config
        job = StudentJob(
            model=models.resolve(student.model),
            name=student.name,
            lora=student.lora,
            attack=config.attack,
            cleanup=cleanup,
            traces=str(source.path),
            take=take,
            boundary=config.boundary,
            task=config.task,
            exam_problems=config.exam_problems,
            exam=config.greedy,
            seed=seed,
            save_weights=config.save_students,
        )
        places = {"model": self._fingerprint(student.model), "traces": source.key}
        stage = self.cache.stage("student", **{**job.dump(), **places})
        label = f"{student.name}, {what}, {take} traces, {cleanup}, seed {seed}"
        return Planned(stage, job.dump(), label)

    def students(self, planned: Sequence[Planned]) -> None:
        """Train students one after another in one Ray Train run."""
        self._train("student", planned)

    # -------------------------------------------------------------------------------------

    def _train(self, kind: trainer.Kind, planned: Sequence[Planned]) -> None:
        with self.cache.claim([item.stage for item in planned]) as missing:
            keys = {stage.key for stage in missing}
            waiting = [item for item in planned if item.stage.key in keys]
            if not waiting:
                return
            name = f"{kind}-{digest(sorted(keys))}"
            storage = self.cache.root / f".train-{name}"
            storage.mkdir(exist_ok=True)
            try:
                with self.display.watch(waiting[0].label, storage / trainer.PROGRESS):
                    self._ray()
                    tasks = [i.task for i in waiting]
                    trainer.train(
                        kind, tasks, name=name, storage=storage, resources=self.config.resources
                    )
            finally:
                # What is whole is kept, whatever became of the rest.
                for item in waiting:
                    if trainer.is_finished(kind, item.stage.partial):
                        described = json.loads(
                            (item.stage.partial / trainer.FINISHED[kind]).read_text()
                        )
                        self.cache.finish(item.stage, described["seconds"])
                shutil.rmtree(storage, ignore_errors=True)

    def width(self) -> int:
        """Students that train side by side on this cluster."""
        self._ray()
        return Slots.of(self.config.resources).students(self.config.resources)

    def _ray(self) -> None:
        if self._stopped.is_set():
            raise StoppedError("another stage failed")
        with self.display.starting_ray():
            session.start(self.config.resources, offline=self._is_local)

    @property
    def _is_local(self) -> bool:
        config = self.config
        models_are = all(Path(models.resolve(name)).is_dir() for name in config.models)
        return models_are and task_is_local(config.task)

    def _fingerprint(self, name: str) -> str:
        if name not in self._fingerprints:
            self._fingerprints[name] = models.fingerprint(name)
        return self._fingerprints[name]


def describe(stage: Stage, file: str) -> dict[str, Any]:
    """What a head or a student stage says about itself."""
    return json.loads((stage.path / file).read_text())
