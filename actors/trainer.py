"""Ray Train runs: one worker loop around `fit`, for heads and for students.

The caller puts a hash of the whole configuration into a run's name. Ray Train resumes a run by its
name, so the same name with another configuration would resume the wrong run.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from actors import heads, students
from actors.resources import Resources
from actors.threads import use_one_thread_on_cpu
from azeotrope.files import write_text

Kind = Literal["head", "student"]
FAILURE = "failure.txt"
PROGRESS = "progress"
FINISHED = {"head": "head.json", "student": "student.json"}
STATE = "state"


class TrainingError(RuntimeError):
    """Training failed because of its data or its loss, so that another attempt would fail too."""


@dataclass(frozen=True)
class TrainingTask:
    """One training: its job as plain data, and the folder for its results."""

    label: str
    job: dict[str, Any]
    folder: str


def train(
    kind: Kind, tasks: Sequence[TrainingTask], *, name: str, storage: Path, resources: Resources
) -> None:
    """Run trainings one after another in one group of workers; results are in their folders.

    Starting workers takes longer than training a tiny student, so one run takes a queue of them.
    The state of the current training is in its folder, on storage that all workers can read. If a
    worker is killed, the next attempt skips what is finished and resumes from the last saved step.

    Args:
        name: of the run; it must change whenever the tasks do.
        storage: where Ray Train keeps its own records, and where progress is written.

    Raises:
        TrainingError: if a task has bad data or a bad loss, or workers failed more often than they
            may be restarted.
        ray.train.ControllerError: if Ray Train itself failed.
    """
    for task in tasks:
        Path(task.folder).mkdir(parents=True, exist_ok=True)
        (Path(task.folder) / FAILURE).unlink(missing_ok=True)
    workers = resources.workers_per_head if kind == "head" else resources.workers_per_student
    per_worker = {"CPU": resources.cpus} | ({"GPU": resources.gpus} if resources.gpus else {})
    trainer = TorchTrainer(
        _loop,
        train_loop_config={
            "kind": kind,
            "tasks": [asdict(task) for task in tasks],
            "progress": str(storage / PROGRESS),
        },
        scaling_config=ScalingConfig(
            num_workers=workers, use_gpu=resources.gpus > 0, resources_per_worker=per_worker
        ),
        run_config=RunConfig(
            name=name,
            storage_path=str(storage),
            # Requests that the cluster can never satisfy were refused before this point. If the
            # controller cannot place its workers even so, it must not retry for ever.
            failure_config=FailureConfig(
                max_failures=resources.restarts, controller_failure_limit=resources.restarts
            ),
        ),
    )
    try:
        trainer.fit()
    except ray.train.WorkerGroupError as error:
        # The workers' own errors, a full disk for example, say more than that they failed.
        reasons = {str(reason) for reason in error.worker_failures.values()}
        raise TrainingError(
            f"training failed {resources.restarts + 1} times: {'; '.join(sorted(reasons))}"
        ) from error
    for task in tasks:
        failure = Path(task.folder) / FAILURE
        if failure.is_file():
            raise TrainingError(f"{task.label}: {failure.read_text()}")


def is_finished(kind: Kind, folder: Path) -> bool:
    """Whether a task has written its description, which is always its last file."""
    return (folder / FINISHED[kind]).is_file()


def _loop(config: dict[str, Any]) -> None:
    kind: Kind = config["kind"]
    rank = ray.train.get_context().get_world_rank()
    use_one_thread_on_cpu()
    tasks = [TrainingTask(**fields) for fields in config["tasks"]]
    work = heads.run if kind == "head" else students.run
    for number, task in enumerate(tasks):
        folder = Path(task.folder)
        if is_finished(kind, folder):
            continue
        report = _Reporter(Path(config["progress"]), rank, number, len(tasks), task.label)
        try:
            work(task.job, folder, folder / STATE, rank=rank, progress=report)
        except (ValueError, ArithmeticError) as error:
            # Data and seeds are fixed, so another attempt would fail in the same way.
            if rank == 0:
                (folder / FAILURE).write_text(str(error))
            return
        if rank == 0:
            shutil.rmtree(folder / STATE, ignore_errors=True)
        ray.train.report({"finished": number + 1})


@dataclass(frozen=True)
class _Reporter:
    """Writes the state of the progress bar, from the first rank only."""

    path: Path
    rank: int
    number: int
    count: int
    label: str

    def __call__(self, done: int, total: int) -> None:
        if self.rank == 0:
            share = (self.number + done / total) / self.count
            write_text(self.path, json.dumps([share, f"{self.label} {done}/{total}"]))
