"""Ray Train runs: one worker loop around `fit`, for heads and for students.

A run's name carries the hash of its whole configuration, because in Ray Train a name is a lineage:
the same name resumes from its last checkpoint, after a worker's death and after the driver's.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal

import ray.train
import torch
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from actors import heads, students
from actors.resources import Resources

Kind = Literal["head", "student"]
FAILURE = "failure.txt"
PROGRESS = "progress"


class TrainingError(RuntimeError):
    """A training run ended with an error of its own making: bad data, or a loss gone wrong."""


def train(
    kind: Kind, job: dict[str, Any], *, name: str, folder: Path, resources: Resources
) -> None:
    """Run one training to its end; results are in `folder` afterwards.

    Args:
        job: a `HeadJob` or `StudentJob` as plain data.
        name: the lineage; must change whenever the job does.
        folder: where the workers write, on storage all of them see.

    Raises:
        TrainingError: if the job itself is at fault (no retry helps).
        ray.train.TrainingFailedError: if workers died more often than allowed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    failure = folder / FAILURE
    failure.unlink(missing_ok=True)
    workers = resources.workers_per_head if kind == "head" else resources.workers_per_student
    asked = {"CPU": resources.cpus} | ({"GPU": resources.gpus} if resources.gpus else {})
    TorchTrainer(
        _loop,
        train_loop_config={"kind": kind, "job": job, "folder": str(folder)},
        scaling_config=ScalingConfig(
            num_workers=workers, use_gpu=resources.gpus > 0, resources_per_worker=asked
        ),
        run_config=RunConfig(
            name=name,
            storage_path=str(folder / "train"),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            # A request that can never start is refused before this point; a controller that
            # still cannot place its workers must not retry for ever.
            failure_config=FailureConfig(
                max_failures=resources.restarts, controller_failure_limit=resources.restarts
            ),
        ),
    ).fit()
    if failure.is_file():
        raise TrainingError(failure.read_text())
    shutil.rmtree(folder / "train", ignore_errors=True)
    (folder / PROGRESS).unlink(missing_ok=True)


def _loop(config: dict[str, Any]) -> None:
    folder = Path(config["folder"])
    context = ray.train.get_context()
    rank = context.get_world_rank()
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    state = Path(tempfile.mkdtemp(prefix="azeotrope-"))
    try:
        last = ray.train.get_checkpoint()
        if last is not None:
            with last.as_directory() as saved:
                shutil.copytree(saved, state, dirs_exist_ok=True)

        def save(step: int) -> None:
            # Every rank must report equally often; the first one's files are the checkpoint.
            checkpoint = Checkpoint.from_directory(state) if rank == 0 else None
            ray.train.report({"step": step}, checkpoint=checkpoint)

        def progress(done: int, total: int) -> None:
            if rank == 0:
                temporary = folder / f".{PROGRESS}.tmp"
                temporary.write_text(json.dumps([done, total]))
                os.replace(temporary, folder / PROGRESS)

        work = heads.run if config["kind"] == "head" else students.run
        work(config["job"], folder, state, rank=rank, save=save, progress=progress)
    except (ValueError, ArithmeticError) as error:
        # Deterministic: another attempt would fail in the same way.
        if rank == 0:
            (folder / FAILURE).write_text(str(error))
    finally:
        shutil.rmtree(state, ignore_errors=True)
