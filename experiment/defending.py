"""What teachers write in a run: the undefended one, and one per defense."""

from typing import Any

from azeotrope.defenses.base import Defense
from azeotrope.defenses.proxied import ProxiedDecoding
from experiment.lessons import taught_proxies
from experiment.plan import (
    HeadPass,
    TraceRequest,
    base_student_requests,
    head_passes,
    head_truth,
    preparation_request,
    teacher_requests,
)
from experiment.settings import DefenseChoice
from experiment.stages import Stage
from experiment.steps import Steps
from experiment.steps.features import FeatureTexts
from experiment.teachers import TeacherResult


def clean_teacher(steps: Steps) -> TeacherResult:
    """What the undefended teacher writes."""
    config = steps.config
    traces, greedy, sampled = steps.traces.generate(teacher_requests(config, config.teacher))
    return TeacherResult(None, traces, greedy, sampled)


def clean_models(steps: Steps) -> tuple[TeacherResult, dict[str, Stage]]:
    """What the undefended teacher writes, and the exams of the untrained students by name.

    All of it is made in one pass over the workers.
    """
    config = steps.config
    students = base_student_requests(config)
    requests = [*teacher_requests(config, config.teacher), *students]
    traces, greedy, sampled, *exams = steps.traces.generate(requests)
    names = [request.label for request in students]
    return TeacherResult(None, traces, greedy, sampled), dict(zip(names, exams, strict=True))


def defend(steps: Steps, choice: DefenseChoice, clean: TeacherResult) -> TeacherResult:
    """Apply one composition of defenses: heads first, then decoding, text last.

    Raises:
        TrainingError: if the training of a head is at fault, or workers failed too often.
        WorkerError: if a worker met bad data or a full disk.
    """
    config = steps.config
    teacher, heads = config.teacher, []
    for defense in choice.acting("weights"):
        heads += _train_heads(steps, choice, defense, teacher, clean)
        teacher = _checkpoint(heads[-1])
    decoding = tuple(_decoding(steps, choice, defense) for defense in choice.acting("decoding"))
    stages = [clean.traces, clean.greedy, clean.sampled]
    if heads or decoding:
        stages = steps.traces.generate(teacher_requests(config, teacher, choice.label, decoding))
    for defense in choice.acting("text"):
        stages = [steps.texts.rewrite(stage, defense, choice.label) for stage in stages]
    traces, greedy, sampled = stages
    return TeacherResult(choice, traces, greedy, sampled, tuple(heads), decoding)


def _decoding(steps: Steps, choice: DefenseChoice, defense: Defense) -> dict[str, Any]:
    """A decoding defense's settings, with the proxies that it needs."""
    if not isinstance(defense, ProxiedDecoding):
        return defense.config.dump()
    config = steps.config
    proxies = config.proxies
    if choice.lesson is not None:
        proxies = taught_proxies(steps, choice.lesson)
    request = preparation_request(config, choice, defense.config.preparation.traces)
    [traces] = steps.traces.generate([request])
    prepared = steps.proxies.prepare(defense, proxies, config.teacher, traces)
    boundary = defense.config.boundary or config.boundary
    return {
        **defense.config.dump(),
        "prepared": [str(stage.path) for stage in prepared],
        "boundary": boundary.dump(),
    }


def _train_heads(
    steps: Steps, choice: DefenseChoice, defense: Defense, teacher: str, clean: TeacherResult
) -> list[Stage]:
    """Train a head in passes: between them the defended teacher writes new traces."""
    config = steps.config
    proxies = config.proxies
    if choice.lesson is not None:
        proxies = taught_proxies(steps, choice.lesson)
    truth_features: list[Stage] = []
    truth = head_truth(config, choice)
    if truth is not None:
        texts = FeatureTexts(steps.traces.ground_truth(truth), truth.count)
        truth_features.append(steps.features.extract(texts, teacher, proxies, layer=defense.layer))
    heads: list[Stage] = []
    for head_pass in head_passes(config, choice):
        texts = FeatureTexts(
            _own_traces(steps, choice, head_pass, teacher, clean),
            head_pass.problems.count,
            choice.training.only_correct,
        )
        own_features = steps.features.extract(texts, teacher, proxies, layer=defense.layer)
        heads.append(
            steps.heads.train(
                [own_features, *truth_features],
                teacher,
                proxies,
                defense.config.dump(),
                head_pass.training,
                keeps_floor=head_pass.keeps_floor,
            )
        )
        teacher = _checkpoint(heads[-1])
    return heads


def _own_traces(
    steps: Steps, choice: DefenseChoice, head_pass: HeadPass, teacher: str, clean: TeacherResult
) -> Stage:
    """The teacher's own traces that a head is trained on in one pass."""
    is_undefended = head_pass.number == 0 and teacher == steps.config.teacher
    if is_undefended and head_pass.takes_clean_traces:
        traces = clean.traces
    else:
        request = TraceRequest(
            teacher,
            "teacher",
            head_pass.problems,
            head_pass.sampling,
            defense="none" if is_undefended else choice.label,
            seed=head_pass.number,
        )
        [traces] = steps.traces.generate([request])
    rarest = choice.training.rarest
    if is_undefended and rarest is not None:
        traces = steps.features.rarest(traces, teacher, rarest)
    return traces


def _checkpoint(head: Stage) -> str:
    return str(head.path / "teacher")
