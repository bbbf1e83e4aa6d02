"""What a run asks its models to write and its task to provide, from the configuration alone.

The steps of a run are made from this plan, and `preflight` checks the same plan before anything
starts.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from actors.heads import CHECKED_PROMPTS
from azeotrope.defenses.proxied import ProxiedDecoding
from azeotrope.generation import Sampling
from azeotrope.heads.search import HeadTraining
from experiment.settings import DefenseChoice, ExperimentConfig, ProxyLesson

LESSON_PROBLEMS = 50
"""Problems of the exam of a taught proxy. It is no result, so that a few are enough."""


@dataclass(frozen=True)
class ProblemRange:
    """Consecutive problems of one split of the task."""

    split: str
    count: int
    skip: int = 0
    """Problems at the start of the split that are left out."""

    @property
    def end(self) -> int:
        """How many problems the split must have."""
        return self.skip + self.count


@dataclass(frozen=True)
class TraceRequest:
    """Completions that a stage needs: which model answers which problems, and how."""

    model: str
    label: str
    """The model's role, as traces name it."""
    problems: ProblemRange
    sampling: Sampling
    defense: str = "none"
    decoding: tuple[dict[str, Any], ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class HeadPass:
    """One pass of head training: which traces of the teacher it uses, and its utility floor."""

    number: int
    problems: ProblemRange
    sampling: Sampling
    training: HeadTraining
    """With the floor that this pass is held to, or none."""
    keeps_floor: bool
    """Whether the head that the pass starts from is known to hold the floor."""
    takes_clean_traces: bool
    """Whether traces of the undefended teacher that exist anyway are enough."""


def attacked_problems(config: ExperimentConfig) -> ProblemRange:
    """The training problems on which the attacker collects traces, at the largest budget."""
    return ProblemRange("train", config.most_traces)


def teacher_exam(config: ExperimentConfig) -> ProblemRange:
    return ProblemRange(config.exam_split, config.teacher_problems)


def student_exam(config: ExperimentConfig) -> ProblemRange:
    return ProblemRange(config.exam_split, config.exam_problems)


def teacher_requests(
    config: ExperimentConfig,
    model: str,
    defense: str = "none",
    decoding: tuple[dict[str, Any], ...] = (),
) -> list[TraceRequest]:
    """The traces of one teacher, and its exam with greedy and with random decoding."""
    return [
        TraceRequest(model, "teacher", problems, sampling, defense, decoding)
        for problems, sampling in (
            (attacked_problems(config), config.sampling),
            (teacher_exam(config), config.greedy),
            (teacher_exam(config), config.sampling),
        )
    ]


def base_student_requests(config: ExperimentConfig) -> list[TraceRequest]:
    """The exam of every student before its training."""
    return [
        TraceRequest(student.model, student.name, student_exam(config), config.greedy)
        for student in config.students
    ]


def head_passes(config: ExperimentConfig, choice: DefenseChoice) -> list[HeadPass]:
    """The passes in which each head of a defense is trained, in their order."""
    training, floor = choice.training, choice.training.floor
    without_floor = training.model_copy(update={"floor": None})
    skip = config.most_traces if training.apart else 0
    passes = []
    for number in range(training.refreshes + 1):
        count = config.head_traces or config.traces
        sampling = config.sampling
        if number:
            count = training.refresh_traces or count
            temperature = training.refresh_temperature or sampling.temperature
            sampling = sampling.model_copy(update={"temperature": temperature})
        passes.append(
            HeadPass(
                number,
                ProblemRange("train", count, skip),
                sampling,
                without_floor if floor is None or number < floor.from_pass else training,
                keeps_floor=floor is None or number == 0 or number > floor.from_pass,
                takes_clean_traces=number == 0
                and count <= config.most_traces
                and not training.apart,
            )
        )
    return passes


def head_truth(config: ExperimentConfig, choice: DefenseChoice) -> ProblemRange | None:
    """The problems whose ground truth a head is trained on; None if it is trained on none."""
    training = choice.training
    skip = config.most_traces if training.apart else 0
    return ProblemRange("train", training.truth, skip) if training.truth else None


def lesson_problems(config: ExperimentConfig, lesson: ProxyLesson) -> ProblemRange:
    """What proxies are taught on: never the problems that the attacker uses."""
    return ProblemRange("train", lesson.traces, config.most_traces)


def preparation_request(
    config: ExperimentConfig, choice: DefenseChoice, traces: int
) -> TraceRequest:
    """Clean traces on which proxies are prepared: problems of neither attacker nor lesson."""
    skip = config.most_traces + (choice.lesson.traces if choice.lesson else 0)
    problems = ProblemRange("train", traces, skip)
    return TraceRequest(config.teacher, "teacher", problems, config.sampling)


def lesson_config(config: ExperimentConfig) -> ExperimentConfig:
    """The experiment for the training of proxies: checkpoints are saved, exams are short."""
    return config.model_copy(
        update={
            "save_students": True,
            "exam_split": "validation",
            "exam_problems": LESSON_PROBLEMS,
        }
    )


def information_problems(config: ExperimentConfig) -> ProblemRange | None:
    """The problems whose ground truth the estimate of I(X; Z | Y) uses; None skips it."""
    texts = config.probe.information if config.probe else 0
    return ProblemRange("validation", texts) if texts else None


def begun_problems(config: ExperimentConfig) -> ProblemRange | None:
    """The exam problems whose solutions are begun for the teacher; None skips the measurement."""
    texts = config.probe.begun if config.probe else 0
    return ProblemRange(config.exam_split, texts) if texts else None


def all_attacks(config: ExperimentConfig) -> Iterator[dict[str, Any]]:
    """The settings of every attack: on teachers, and in the lessons of proxies."""
    yield from (config.attack, *config.attacks)
    for choice in config.defenses:
        if choice.lesson is not None:
            yield from choice.lesson.attacks


def problem_ranges(config: ExperimentConfig) -> Iterator[ProblemRange]:
    """Everything that a run asks the task for; ranges may overlap."""
    requests = teacher_requests(config, config.teacher) + base_student_requests(config)
    yield from (request.problems for request in requests)
    for choice in config.defenses:
        yield from _defense_ranges(config, choice)
    for measured in (information_problems(config), begun_problems(config)):
        if measured is not None:
            yield measured


def _defense_ranges(config: ExperimentConfig, choice: DefenseChoice) -> Iterator[ProblemRange]:
    if any(part.needs_proxies for part in choice.resolve()) and choice.lesson is not None:
        yield lesson_problems(config, choice.lesson)
        yield student_exam(lesson_config(config))
    for part in choice.acting("decoding"):
        if isinstance(part, ProxiedDecoding):
            yield preparation_request(config, choice, part.config.preparation.traces).problems
    if not choice.acting("weights"):
        return
    yield from (head_pass.problems for head_pass in head_passes(config, choice))
    yield ProblemRange("validation", CHECKED_PROMPTS)
    truth, floor = head_truth(config, choice), choice.training.floor
    if truth is not None:
        yield truth
    if floor is not None:
        yield ProblemRange("validation", floor.problems)


def begun_ranges(config: ExperimentConfig) -> Iterator[tuple[str, ProblemRange]]:
    """Where answers are begun with ground truth: the name of the setting, and the problems."""
    for choice in config.defenses:
        floor = choice.training.floor
        if floor is not None and floor.begun and choice.acting("weights"):
            yield "floor.begun", ProblemRange("validation", floor.problems)
    measured = begun_problems(config)
    if measured is not None:
        yield "probe.begun", measured
