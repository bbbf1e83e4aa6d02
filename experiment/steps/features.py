"""Hidden states of frozen trunks on texts, and the texts that proxies find least likely."""

import json
from dataclasses import dataclass
from pathlib import Path

from actors import pool
from actors.proxy import ProxyActor
from actors.scorer import ScoreActor
from actors.teacher import FeatureJob, TeacherActor
from azeotrope import models
from azeotrope.config import ConfigError
from azeotrope.traces import read_traces, write_traces
from experiment.stages import Stage
from experiment.steps.complete import check_complete
from experiment.steps.context import StepContext


@dataclass(frozen=True)
class FeatureTexts:
    """The traces, or other texts, whose features are wanted."""

    stage: Stage
    count: int
    """Whole shards are taken until there are this many."""
    only_correct: bool = False


class FeatureSteps:
    """Runs texts through the frozen trunks of teacher and proxies."""

    def __init__(self, context: StepContext) -> None:
        self._context = context

    def extract(
        self,
        texts: FeatureTexts,
        teacher: str,
        proxies: tuple[str, ...] = (),
        *,
        layer: str | None = None,
    ) -> Stage:
        """Hidden states of the teacher and of the proxies.

        Args:
            layer: proxies store what enters this layer; None stores their last hidden states.

        Raises:
            WorkerError: if a worker met bad data or a full disk.
        """
        context = self._context
        config = context.config
        files = _trace_files(texts.stage)[: -(-texts.count // config.shard)]
        stage = context.cache.stage(
            "features",
            traces=texts.stage.key,
            teacher=context.fingerprint(teacher),
            proxies=[context.fingerprint(name) for name in proxies],
            boundary=config.boundary.dump(),
            max_length=config.max_length,
            only_correct=texts.only_correct,
            files=[file.name for file in files],
            layer=layer,
        )

        def make(folder: Path) -> None:
            jobs = self._jobs(files, folder, only_correct=texts.only_correct, layer=layer)
            chain = [pool.Link(TeacherActor, {"model": models.resolve(teacher)})]
            for index, name in enumerate(proxies):
                arguments = {"model": models.resolve(name), "teacher": models.resolve(teacher)}
                chain.append(pool.Link(ProxyActor, {**arguments, "index": index}))
            owners = "teacher and proxies" if proxies else "teacher"
            self._run(jobs, chain, f"features of {owners}")
            places = ["teacher", *(f"proxy-{index}" for index in range(len(proxies)))]
            expected = {folder / place / file.name: None for place in places for file in files}
            check_complete(stage, expected)

        return context.cache.build(stage, make)

    def rarest(self, source: Stage, teacher: str, share: float) -> Stage:
        """The share of a teacher's right traces that the proxies find least likely.

        Raises:
            ConfigError: if no trace is left.
            WorkerError: if a worker met bad data or a full disk.
        """
        context = self._context
        config = context.config
        stage = context.cache.stage(
            "rarest",
            traces=source.key,
            proxies=[context.fingerprint(name) for name in config.proxies],
            share=share,
        )

        def make(folder: Path) -> None:
            jobs = self._jobs(_trace_files(source), folder / "scores", only_correct=True)
            arguments = {
                "proxies": tuple(models.resolve(name) for name in config.proxies),
                "teacher": models.resolve(teacher),
            }
            chain = [pool.Link(ScoreActor, arguments)]
            self._run(jobs, chain, "how likely the proxies find each trace")
            files = [folder / "scores" / f"{file.stem}.json" for file in _trace_files(source)]
            check_complete(stage, dict.fromkeys(files))
            scores: dict[str, float] = {}
            for file in sorted((folder / "scores").glob("*.json")):
                scores.update(json.loads(file.read_text()))
            ranked = sorted(scores, key=lambda trace_id: scores[trace_id])
            rare_ids = set(ranked[: int(share * len(ranked))])
            rare = [trace for trace in read_traces(source.path) if trace.id in rare_ids]
            if not rare:
                raise ConfigError(
                    f"training.rarest {share:g} leaves none of {len(scores)} right traces; raise "
                    "it, or take more head_traces"
                )
            for start in range(0, len(rare), config.shard):
                write_traces(folder / f"{start:07d}.parquet", rare[start : start + config.shard])

        return context.cache.build(stage, make)

    def _jobs(
        self, files: list[Path], folder: Path, *, only_correct: bool, layer: str | None = None
    ) -> list[str]:
        config = self._context.config
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
            for file in files
        ]

    def _run(self, jobs: list[str], chain: list[pool.Link], label: str) -> None:
        context = self._context
        with context.display.task(label, len(jobs)) as advance:
            context.start_ray()
            pool.run_jobs(jobs, chain, context.config.resources, on_done=advance)


def _trace_files(stage: Stage) -> list[Path]:
    return sorted(stage.path.glob("*.parquet"))
