"""The comparison of a run: every defense is built, and every student is trained."""

import os
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, as_completed, wait

from azeotrope.attacks import base as attacks
from azeotrope.attacks.logits.attack import LogitAttack
from experiment.cells import SFT_ONLY, Cell, baseline_cells, defended_cells
from experiment.defending import defend
from experiment.plan import attacked_problems
from experiment.stages import Stage
from experiment.steps import Steps
from experiment.steps.features import FeatureTexts
from experiment.steps.students import TeacherLogits, TrainingTexts
from experiment.steps.trainings import PlannedTraining
from experiment.teachers import TeacherResult

MOST_STUDENTS = 9
"""Students per Ray Train run at most: few enough that no slot idles at the end."""
FEWEST_STUDENTS = 2
"""Students per Ray Train run at least: starting a run costs as much as training one student."""


class Comparison:
    """Defends the teacher and trains all students, several at the same time.

    A student starts as soon as the traces that it learns from exist.
    """

    def __init__(self, steps: Steps, clean: TeacherResult) -> None:
        self._steps = steps
        self._clean = clean
        self._truth = steps.traces.ground_truth(attacked_problems(steps.config))
        self._width = _parallel_trainings(steps)
        self._planned: dict[Cell, PlannedTraining] = {}
        self._trainings: list[Future[None]] = []

    def run(self) -> tuple[list[TeacherResult], dict[Cell, Stage]]:
        """The defended teachers, in the order of the settings, and the stage of every student.

        Raises:
            TrainingError: if a training is at fault, or workers failed too often.
            WorkerError: if a worker met bad data or a full disk.
        """
        steps, config = self._steps, self._steps.config
        # Each thread waits for Ray most of its time.
        with ThreadPoolExecutor(max_workers=self._width) as threads:
            try:
                # Defenses come first, because most students wait for what they write.
                defenses = [
                    threads.submit(defend, steps, choice, self._clean) for choice in config.defenses
                ]
                self._submit(threads, baseline_cells(config), self._clean)
                for future in as_completed(defenses):
                    teacher = future.result()
                    assert teacher.choice is not None
                    cells = defended_cells(config, teacher.choice, teacher.strength)
                    self._submit(threads, cells, teacher)
                for training in wait(self._trainings, return_when=FIRST_EXCEPTION).done:
                    training.result()
            except BaseException:
                # Finished stages stay in the cache; the others would be started for nothing.
                threads.shutdown(wait=False, cancel_futures=True)
                steps.context.stop()
                raise
        teachers = [future.result() for future in defenses]
        return teachers, {cell: training.stage for cell, training in self._planned.items()}

    def _submit(
        self, threads: ThreadPoolExecutor, cells: Sequence[Cell], teacher: TeacherResult
    ) -> None:
        """Queue the students of one teacher, several per Ray Train run."""
        if not cells:
            return
        planned = [self._plan(cell, teacher) for cell in cells]
        self._planned.update(zip(cells, planned, strict=True))
        per_slot = -(-len(planned) // self._width)
        size = min(MOST_STUDENTS, max(FEWEST_STUDENTS, per_slot))
        for start in range(0, len(planned), size):
            batch = planned[start : start + size]
            self._trainings.append(threads.submit(self._steps.students.train, batch))

    def _plan(self, cell: Cell, teacher: TeacherResult) -> PlannedTraining:
        """The training of one student on what its attacker gets from the teacher."""
        steps, config = self._steps, self._steps.config
        attack = attacks.resolve(dict(config.attack_called(cell.attack, cell.variant)))
        if cell.attack == SFT_ONLY or not isinstance(attack, LogitAttack):
            learns_truth = cell.attack == SFT_ONLY
            texts = TrainingTexts(
                self._truth if learns_truth else teacher.traces,
                cell.traces,
                config.cleanup_called(cell.cleanup),
            )
            label = cell.attack if learns_truth else f"{cell.defense} {cell.attack}"
            return steps.students.plan(
                cell.student, texts, cell.seed, label, attack=attack.config.dump()
            )
        contexts = self._truth if attack.config.contexts == "truth" else teacher.traces
        # Defenses of the weights change the head alone, so that the undefended trunk's hidden
        # states serve every teacher.
        features = steps.features.extract(
            FeatureTexts(contexts, config.most_traces), config.teacher
        )
        return steps.students.plan(
            cell.student,
            TrainingTexts(contexts, cell.traces),
            cell.seed,
            f"{cell.defense} {cell.attack} {cell.variant}",
            attack=attack.config.dump(),
            logits=TeacherLogits(
                teacher.checkpoint or config.teacher,
                features,
                snapshot=config.teacher if attack.config.pairs else None,
            ),
        )


def _parallel_trainings(steps: Steps) -> int:
    """How many trainings run at the same time.

    On this machine alone it follows from the settings; only a cluster has to be asked, and Ray is
    not started for that if everything is in the cache.
    """
    resources = steps.config.resources
    is_local = resources.num_cpus is None and not os.environ.get("RAY_ADDRESS")
    if is_local and not resources.gpus:
        cpus = os.cpu_count() or 1
        return max(1, int(cpus // (resources.cpus * resources.workers_per_student)))
    return steps.context.parallel_students()
