"""The steps of an experiment, each a cached stage: traces, features, heads, students."""

import json
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors import pool, session, trainer
from actors.generator import GenerationJob, GenerationWorker
from actors.heads import HeadJob
from actors.proxy import ProxyActor
from actors.resources import Slots
from actors.scorer import ScoreActor
from actors.students import StudentJob
from actors.teacher import FeatureJob, TeacherActor
from azeotrope import models
from azeotrope.attacks.cleanups import base as cleanups
from azeotrope.attacks.cleanups.base import CleanupSpec
from azeotrope.config import ConfigError, digest
from azeotrope.defenses.base import Defense, FinishedText, RewriteContext, RewrittenText
from azeotrope.files import write_json
from azeotrope.generation import Sampling
from azeotrope.heads.search import HeadTraining
from azeotrope.tasks import build as build_task
from azeotrope.traces import Trace, ground_truth, read_traces, write_traces
from experiment.display import Display
from experiment.settings import LESSON_PROBLEMS, ExperimentConfig, ProxyLesson, StudentConfig
from experiment.stages import Cache, Stage


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
    skip: int = 0
    """Problems of the split that are left to others."""


@dataclass(frozen=True)
class Asked:
    """The teacher whose logits an attack sees, on texts whose hidden states are known."""

    teacher: str
    features: Stage
    snapshot: str | None = None


@dataclass(frozen=True)
class Planned:
    """A training that a stage needs."""

    stage: Stage
    job: dict[str, Any]
    label: str

    @property
    def task(self) -> trainer.TrainingTask:
        return trainer.TrainingTask(self.label, self.job, str(self.stage.partial))


_LESSON = {
    "save_students": True,
    "exam_split": "validation",
    "exam_problems": LESSON_PROBLEMS,
}


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
            **({"skip": request.skip} if request.skip else {}),
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
                start=request.skip + start,
                count=min(shard, request.count - start),
                sampling=request.sampling,
                seed=request.seed,
                defense=request.defense,
                decoding=request.decoding,
                output=str(stage.partial / f"{start:07d}.parquet"),
            )
            for start in range(0, request.count, shard)
        ]

    def ground_truth(self, count: int, skip: int = 0) -> Stage:
        """Reference solutions of problems: what a thief has without any teacher."""
        return self._truth("train", count, skip)

    def held_out(self, count: int) -> Stage:
        """Reference solutions that nobody learned from."""
        return self._truth("validation", count, 0)

    def examined(self, count: int) -> Stage:
        """Reference solutions of the problems that exams are about."""
        return self._truth(self.config.exam_split, count, 0)

    def _truth(self, split: str, count: int, skip: int) -> Stage:
        task_config = self.config.task

        def make(folder: Path) -> None:
            task = build_task(task_config)
            problems = task.problems(split, count, skip=skip)
            write_traces(folder / "0000000.parquet", ground_truth(task, problems))

        where = {} if (split, skip) == ("train", 0) else {"split": split, "skip": skip}
        stage = self.cache.stage("truth", task=task_config.dump(), count=count, **where)
        return self.cache.build(stage, make)

    def rarest(self, source: Stage, teacher: str, share: float) -> Stage:
        """The share of a teacher's right traces that the proxies find least likely."""
        config = self.config
        stage = self.cache.stage(
            "rarest",
            traces=source.key,
            proxies=[self._fingerprint(name) for name in config.proxies],
            share=share,
        )

        def make(folder: Path) -> None:
            jobs = self._feature_jobs(source, folder / "scores", only_correct=True)
            arguments = {
                "proxies": tuple(models.resolve(name) for name in config.proxies),
                "teacher": models.resolve(teacher),
            }
            with self.display.task("how likely the proxies find each trace", len(jobs)) as advance:
                self._ray()
                chain = [pool.Link(ScoreActor, arguments)]
                pool.run_jobs(jobs, chain, config.resources, on_done=advance)
            scores: dict[str, float] = {}
            for file in sorted((folder / "scores").glob("*.json")):
                scores.update(json.loads(file.read_text()))
            chosen = set(sorted(scores, key=lambda name: scores[name])[: int(share * len(scores))])
            kept = [trace for trace in read_traces(source.path) if trace.id in chosen]
            if not kept:
                raise ConfigError(
                    f"training.rarest {share:g} leaves none of {len(scores)} right traces; raise "
                    "it, or take more head_traces"
                )
            for start in range(0, len(kept), config.shard):
                write_traces(folder / f"{start:07d}.parquet", kept[start : start + config.shard])

        return self.cache.build(stage, make)

    def rewritten(self, source: Stage, defense: Defense, label: str) -> Stage:
        """Traces after a defense of stage `text`; changed answers are checked again.

        `text.json` in the stage counts how many texts have each status, and why texts fell back.
        """
        task_config, boundary = self.config.task, self.config.boundary

        def make(folder: Path) -> None:
            task = build_task(task_config)
            context = RewriteContext(boundary, has_answer=task.check)
            traces = read_traces(source.path)
            rewritten: list[Trace] = []
            outcomes: list[RewrittenText] = []
            with self.display.task(f"rewriting: {label}", len(traces)) as advance:
                for start in range(0, len(traces), self.config.shard):
                    batch = traces[start : start + self.config.shard]
                    texts = [FinishedText(t.text, t.question, t.reference) for t in batch]
                    results = defense.rewrite(texts, context)
                    for trace, result in zip(batch, results, strict=True):
                        same = result.text == trace.text
                        correct = (
                            trace.correct if same else task.check(result.text, trace.reference)
                        )
                        rewritten.append(trace.with_text(result.text, correct))
                    outcomes += results
                    advance(len(batch))
            defense.close()
            write_traces(folder / "0000000.parquet", rewritten)
            write_json(folder / "text.json", _counted(outcomes))

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
        layer: str | None = None,
    ) -> Stage:
        """Frozen-trunk hidden states of teacher and proxies on traces or other texts.

        Args:
            count: traces wanted; whole shards are taken until there are as many.
            layer: proxies store what enters this layer.
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
            layer=layer,
        )

        def make(folder: Path) -> None:
            jobs = self._feature_jobs(
                traces, folder, only_correct=only_correct, layer=layer, files=len(files)
            )
            chain = [pool.Link(TeacherActor, {"model": models.resolve(teacher)})]
            for index, name in enumerate(proxies):
                arguments = {"model": models.resolve(name), "teacher": models.resolve(teacher)}
                chain.append(pool.Link(ProxyActor, {**arguments, "index": index}))
            who = "teacher and proxies" if proxies else "teacher"
            with self.display.task(f"features of {who}", len(jobs)) as advance:
                self._ray()
                pool.run_jobs(jobs, chain, config.resources, on_done=advance)

        return self.cache.build(stage, make)

    def _feature_jobs(
        self,
        traces: Stage,
        folder: Path,
        *,
        only_correct: bool,
        layer: str | None = None,
        files: int | None = None,
    ) -> list[str]:
        config = self.config
        return [
            FeatureJob(
                traces=str(file),
                folder=str(folder),
                boundary=config.boundary,
                max_length=config.max_length,
                only_correct=only_correct,
                task=config.task,
                layer=layer,
            ).model_dump_json()
            for file in sorted(traces.path.glob("*.parquet"))[:files]
        ]

    def head(
        self,
        features: Sequence[Stage],
        teacher: str,
        proxies: tuple[str, ...],
        defense: dict[str, Any],
        training: HeadTraining,
        *,
        keeps_floor: bool = True,
    ) -> Stage:
        """A defended head, exported as a plain checkpoint in `teacher/`."""
        config = self.config
        job = HeadJob(
            teacher=models.resolve(teacher),
            clean=models.resolve(config.teacher),
            proxies=tuple(models.resolve(name) for name in proxies),
            defense=defense,
            training=training,
            features=tuple(str(stage.path) for stage in features),
            task=config.task,
            max_new_tokens=config.sampling.max_new_tokens,
            shard=config.shard,
            keeps_floor=keeps_floor,
        )
        described = {
            **job.dump(),
            "teacher": self._fingerprint(teacher),
            "clean": self._fingerprint(config.teacher),
            "proxies": [self._fingerprint(name) for name in proxies],
            "features": [stage.key for stage in features],
        }
        stage = self.cache.stage("head", **described)
        self._train("head", [Planned(stage, job.dump(), f"head: {defense['name']}")])
        return stage

    # Students ----------------------------------------------------------------------------

    def plan_student(
        self,
        student: StudentConfig,
        source: Stage,
        take: int,
        cleanup: CleanupSpec,
        seed: int,
        what: str,
        *,
        attack: dict[str, Any] | None = None,
        asked: Asked | None = None,
    ) -> Planned:
        """A student to be trained on the first `take` traces of a stage, and examined.

        Args:
            attack: the experiment's main one unless given.
            asked: the teacher's side of an attack on logits.
        """
        config = self.config
        job = StudentJob(
            model=models.resolve(student.model),
            name=student.name,
            lora=student.lora,
            attack=attack or config.attack,
            cleanup=cleanup,
            traces=str(source.path),
            take=take,
            boundary=config.boundary,
            task=config.task,
            exam_problems=config.exam_problems,
            exam_split=config.exam_split,
            exam=config.greedy,
            seed=seed,
            save_weights=config.save_students,
            teacher=asked and models.resolve(asked.teacher),
            features=asked and str(asked.features.path),
            snapshot=asked and asked.snapshot and models.resolve(asked.snapshot),
        )
        places = {"model": self._fingerprint(student.model), "traces": source.key}
        if asked is not None:
            places["teacher"] = self._fingerprint(asked.teacher)
            places["features"] = asked.features.key
            if asked.snapshot is not None:
                places["snapshot"] = self._fingerprint(asked.snapshot)
        stage = self.cache.stage("student", **{**job.dump(), **places})
        cleaned = cleanups.resolve(cleanup).label
        label = f"{student.name}, {what}, {take} traces, {cleaned}, seed {seed}"
        return Planned(stage, job.dump(), label)

    def taught_proxies(self, lesson: ProxyLesson, skip: int) -> tuple[str, ...]:
        """The proxies after their lesson: checkpoints of students of the undefended teacher.

        Args:
            skip: problems that are the thief's.
        """
        config = self.config
        texts = self.ground_truth(lesson.traces, skip)
        features = self.features(texts, config.teacher, (), lesson.traces, only_correct=False)
        asked = Asked(config.teacher, features)
        taught = Steps(config.model_copy(update=_LESSON), self.display)
        planned = [
            taught.plan_student(
                StudentConfig(name=f"proxy {number}", model=name),
                texts,
                lesson.traces,
                "none",
                0,
                "lesson",
                attack=lesson.attacks[number % len(lesson.attacks)],
                asked=asked,
            )
            for number, name in enumerate(config.proxies)
        ]
        self.students(planned)
        return tuple(str(item.stage.path / "student") for item in planned)

    def students(self, planned: Sequence[Planned]) -> None:
        """Train students one after another in one Ray Train run."""
        self._train("student", planned)

    def probe(
        self, what: str, checkpoint: str, make: Callable[[Path], None], **inputs: Any
    ) -> Stage:
        """A measurement of one checkpoint that runs here, in this process."""
        stage = self.cache.stage(
            "probe",
            what=what,
            model=self._fingerprint(checkpoint),
            task=self.config.task.dump(),
            **inputs,
        )
        return self.cache.build(stage, make)

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
        return models_are and config.task.is_local

    def _fingerprint(self, name: str) -> str:
        if name not in self._fingerprints:
            self._fingerprints[name] = models.fingerprint(name)
        return self._fingerprints[name]


def _counted(outcomes: Sequence[RewrittenText]) -> dict[str, Any]:
    """Number of texts per status, and of those that fell back per reason."""
    return {
        "statuses": Counter(outcome.status for outcome in outcomes),
        "fell_back": Counter(o.reason for o in outcomes if o.status == "fell_back"),
    }


def describe(stage: Stage, file: str) -> dict[str, Any]:
    """What a head or a student stage says about itself."""
    return json.loads((stage.path / file).read_text())
