"""Measurements of a teacher's logits that train no student."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from azeotrope import models
from azeotrope.collect import BEGUN, finish
from azeotrope.config import ConfigError
from azeotrope.files import write_json
from azeotrope.heads.features import read_features
from azeotrope.logits.information import conditional_mutual_information
from azeotrope.logits.oracle import ModelOracle
from azeotrope.logits.recovery import random_prompts, sample_tokens
from azeotrope.logits.subspace import recover_subspace
from azeotrope.logits.vocabulary import token_rows
from azeotrope.report.intervals import wilson
from azeotrope.report.rows import ResultRow
from azeotrope.tasks import build as build_task
from azeotrope.traces import read_traces
from experiment.plan import ProblemRange, begun_problems, information_problems
from experiment.stages import Stage, describe
from experiment.steps import Steps
from experiment.steps.features import FeatureTexts
from experiment.teachers import TeacherResult

FILE = "probe.json"
BEGUN_METRIC = "accuracy where others began the answer"
TOP_K = 5
"""Log-probabilities per position that a generous API shows."""
DECIMALS = 2
"""Decimals to which the gateway rounds log-probabilities; it accepts no logit bias beside them."""
SPARE_PROMPTS = 16
"""Prompts beyond the rank that is looked for, so that the end of the subspace can be seen."""
_APIS: dict[str, dict[str, Any]] = {
    "open": {"top_k": TOP_K, "allow_bias": True},
    "guarded": {"top_k": TOP_K, "allow_bias": False, "decimals": DECIMALS},
}


@dataclass(frozen=True)
class ProbeResults:
    """Rows for the tables, and sentences for the reader."""

    rows: list[ResultRow]
    notes: list[str]


def probe(steps: Steps, clean: TeacherResult, teachers: list[TeacherResult]) -> ProbeResults:
    """Measure the clean teacher and every defended one whose checkpoint computes its logits.

    Raises:
        ConfigError: if no ground truth is right, so that no answer can be begun.
    """
    results = ProbeResults([], [])
    config = steps.config
    if config.probe is None:
        return results
    measured = [clean, *(teacher for teacher in teachers if teacher.serves_own_logits)]
    informative, begun = information_problems(config), begun_problems(config)
    if informative is not None:
        for teacher in measured:
            stage = _information(steps, teacher.checkpoint or config.teacher, informative)
            results.rows.append(_teacher_row(steps, teacher, "information", stage))
    if begun is not None:
        for teacher in measured:
            stage = _begun(steps, teacher.checkpoint or config.teacher, begun)
            results.rows.append(_teacher_row(steps, teacher, BEGUN_METRIC, stage))
    for name in config.probe.subspace:
        for teacher in measured if name == "teacher" else [None]:
            _add_subspace(steps, results, name, teacher)
    return results


def _information(steps: Steps, checkpoint: str, problems: ProblemRange) -> Stage:
    """An estimate of I(X; Z | Y) in nats per token; see `azeotrope.logits.information`."""
    texts = FeatureTexts(steps.traces.ground_truth(problems), problems.count)
    features = steps.features.extract(texts, steps.config.teacher)

    def make(folder: Path) -> None:
        texts = read_features(features.path / "teacher")
        loaded = models.load(checkpoint, device="cpu")
        head, rows = models.head_of(loaded.model), token_rows(loaded.tokenizer)
        lengths = torch.tensor([len(text.targets) for text in texts])
        estimate = conditional_mutual_information(
            torch.cat([text.hidden for text in texts]),
            head.weight[:rows],
            torch.cat([text.targets for text in texts]),
            torch.repeat_interleave(torch.arange(len(texts)), lengths),
            None if head.bias is None else head.bias[:rows],
        )
        measured = {"value": estimate.value, "ci95": list(estimate.ci95), "n": estimate.positions}
        write_json(folder / FILE, measured)

    with steps.context.display.task("information in the logits", 1):
        return _measurement(steps, "information", checkpoint, make, features=features.key)


def _begun(steps: Steps, checkpoint: str, problems: ProblemRange) -> Stage:
    """Accuracy on answers that begin with a part of the ground truth.

    A defense may keep a teacher useful in its own style alone; these beginnings have another one.
    """
    config = steps.config
    truth = steps.traces.ground_truth(problems)
    right = [trace for trace in read_traces(truth.path) if trace.correct]
    if not right:
        raise ConfigError(
            f"probe.begun: none of {problems.count} ground-truth texts is right; take more"
        )

    def make(folder: Path) -> None:
        loaded, task = models.load(checkpoint), build_task(config.task)
        solved = sum(finish(loaded, task, right, config.greedy, shard=config.shard))
        accuracy = {"value": solved / len(right), "ci95": list(wilson(solved, len(right)))}
        write_json(folder / FILE, {**accuracy, "n": len(right)})

    inputs = {"texts": truth.key, "share": BEGUN, "greedy": config.greedy.dump()}
    with steps.context.display.task("answers that others began", 1):
        return _measurement(steps, "begun", checkpoint, make, **inputs)


def _subspace(steps: Steps, checkpoint: str) -> Stage:
    """The hidden size that an attacker recovers through an open and through a guarded API."""

    def make(folder: Path) -> None:
        loaded = models.load(checkpoint)
        hidden_size = int(loaded.model.config.get_text_config().hidden_size)
        tokens = sample_tokens(len(loaded.tokenizer))
        count = min(hidden_size, len(tokens)) + SPARE_PROMPTS
        prompts = random_prompts(len(loaded.tokenizer), count)
        sizes: dict[str, Any] = {"hidden_size": hidden_size, "tokens": len(tokens)}
        for api, rules in _APIS.items():
            oracle = ModelOracle(loaded.model, **rules)
            result = recover_subspace(oracle, prompts, tokens)
            sizes[api] = {
                "value": float(result.hidden_size or 0),
                "label": result.label,
                "queries": result.queries,
                "refused": result.refused,
            }
        write_json(folder / FILE, sizes)

    with steps.context.display.task(f"hidden size through the API: {Path(checkpoint).name}", 1):
        return _measurement(steps, "subspace", checkpoint, make)


def _measurement(
    steps: Steps, quantity: str, checkpoint: str, make: Callable[[Path], None], **inputs: Any
) -> Stage:
    """The stage of one measurement, which runs in this process."""
    context = steps.context
    stage = context.cache.stage(
        "probe",
        what=quantity,
        model=context.fingerprint(checkpoint),
        task=steps.config.task.described(),
        **inputs,
    )
    return context.cache.build(stage, make)


def _teacher_row(steps: Steps, teacher: TeacherResult, metric: str, stage: Stage) -> ResultRow:
    return _row(steps, _columns(teacher), metric, describe(stage, FILE), stage.seconds)


def _columns(teacher: TeacherResult) -> dict[str, Any]:
    return {
        "role": "teacher",
        "model": "teacher",
        "defense": teacher.label,
        "strength": teacher.strength,
    }


def _add_subspace(
    steps: Steps, results: ProbeResults, name: str, teacher: TeacherResult | None
) -> None:
    """Add the rows and the sentence of one model's hidden size.

    Args:
        name: a model, or `teacher`.
        teacher: the teacher that is measured; None measures the model as it is.
    """
    if teacher is None:
        checkpoint, label = name, name
        columns = {"role": "suspect", "model": name, "defense": "none", "strength": None}
    else:
        checkpoint = teacher.checkpoint or steps.config.teacher
        label = name if teacher.choice is None else f"{name} ({teacher.label})"
        columns = _columns(teacher)
    stage = _subspace(steps, checkpoint)
    sizes = describe(stage, FILE)
    results.notes.append(_sentence(label, sizes))
    for api in _APIS:
        measured = {"value": sizes[api]["value"], "n": sizes[api]["queries"]}
        metric = f"hidden size recovered, {api} API"
        results.rows.append(_row(steps, columns, metric, measured, stage.seconds))


def _row(
    steps: Steps, columns: dict[str, Any], metric: str, measured: dict[str, Any], seconds: float
) -> ResultRow:
    value = measured["value"]
    return ResultRow(
        **columns,
        decoding="none",
        task=steps.config.task.name,
        metric=metric,
        value=value,
        n=measured["n"],
        ci95=tuple(measured.get("ci95", (value, value))),
        seconds=seconds,
    )


def _sentence(name: str, sizes: dict[str, Any]) -> str:
    opened, guarded = sizes["open"], sizes["guarded"]
    words = (
        f"Hidden size of {name}, through the top {TOP_K} logprobs and a logit bias: "
        f"{opened['label']} after {opened['queries']} queries (it is {sizes['hidden_size']}, seen "
        f"on {sizes['tokens']} tokens)."
    )
    why = f" ({guarded['refused']})" if guarded["refused"] else ""
    return f"{words} Behind the gateway's rules: {guarded['label']}{why}."
