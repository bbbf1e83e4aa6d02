"""Lessons: proxies learn from the undefended teacher before a defense uses them."""

from azeotrope.attacks.cleanups.base import NO_CLEANUP
from experiment.plan import TraceRequest, lesson_config, lesson_problems
from experiment.settings import ProxyLesson, StudentConfig
from experiment.steps import Steps
from experiment.steps.features import FeatureTexts
from experiment.steps.students import TeacherLogits, TrainingTexts


def taught_proxies(steps: Steps, lesson: ProxyLesson) -> tuple[str, ...]:
    """The checkpoints of the proxies after their lesson.

    Raises:
        TrainingError: if a training is at fault, or workers failed too often.
    """
    config = steps.config
    problems = lesson_problems(config, lesson)
    if lesson.texts == "teacher":
        request = TraceRequest(config.teacher, "teacher", problems, config.sampling)
        [texts] = steps.traces.generate([request])
    else:
        texts = steps.traces.ground_truth(problems)
    features = steps.features.extract(FeatureTexts(texts, lesson.traces), config.teacher)
    lesson_steps = Steps(steps.context.with_config(lesson_config(config)))
    planned = [
        lesson_steps.students.plan(
            StudentConfig(name=f"proxy {number}", model=name),
            TrainingTexts(texts, lesson.traces, NO_CLEANUP),
            0,
            "lesson",
            attack=lesson.attacks[number % len(lesson.attacks)],
            logits=TeacherLogits(config.teacher, features),
        )
        for number, name in enumerate(config.proxies)
    ]
    lesson_steps.students.train(planned)
    return tuple(str(training.stage.path / "student") for training in planned)
