"""What is measured of a teacher's logits without training a student on them."""

import json
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
from experiment.results import Taught
from experiment.settings import ExperimentConfig
from experiment.stages import Stage
from experiment.steps import Steps

FILE = "probe.json"
BEGUN_METRIC = "accuracy where others began the answer"
TOP_K = 5
"""Log-probabilities that a generous API shows at a position."""
DECIMALS = 2
"""To which the gateway rounds them; it takes no logit bias beside them."""
SPARE = 16
"""Prompts beyond the rank that is looked for, so that the end of the subspace shows."""


@dataclass(frozen=True)
class Probed:
    """Rows for the tables, and sentences for the reader."""

    rows: list[ResultRow]
    notes: list[str]


def probe(config: ExperimentConfig, steps: Steps, clean: Taught, taught: list[Taught]) -> Probed:
    """Measure every teacher whose logits are those of a checkpoint."""
    wanted = config.probe
    if wanted is None:
        return Probed([], [])
    task = config.task.name
    found = Probed([], [])
    victims = [clean, *(item for item in taught if _is_checkpoint(item))]
    for victim in victims if wanted.information else ():
        checkpoint = victim.checkpoint or config.teacher
        stage = _information(config, steps, checkpoint, wanted.information)
        data = json.loads((stage.path / FILE).read_text())
        found.rows.append(_row(task, victim, "information", data, stage.seconds))
    for victim in victims if wanted.begun else ():
        checkpoint = victim.checkpoint or config.teacher
        stage = _begun(config, steps, checkpoint, wanted.begun)
        data = json.loads((stage.path / FILE).read_text())
        found.rows.append(_row(task, victim, BEGUN_METRIC, data, stage.seconds))
    for name in wanted.subspace:
        whose = victims if name == "teacher" else [None]
        for victim in whose:
            checkpoint = name if victim is None else victim.checkpoint or config.teacher
            stage = _subspace(config, steps, checkpoint)
            data = json.loads((stage.path / FILE).read_text())
            label = name if victim is None or victim is clean else f"{name} ({victim.label})"
            found.notes.append(_sentence(label, data))
            for when in ("open", "guarded"):
                metric = f"hidden size recovered, {when} API"
                shown = {"value": data[when]["value"], "n": data[when]["queries"]}
                row = _row(task, victim, metric, shown, stage.seconds)
                found.rows.append(row if victim else row.model_copy(update={"model": name}))
    return found


def _is_checkpoint(victim: Taught) -> bool:
    choice = victim.choice
    return victim.checkpoint is not None and choice is not None and choice.changes_weights_alone


def _information(config: ExperimentConfig, steps: Steps, checkpoint: str, texts: int) -> Stage:
    features = steps.features(steps.held_out(texts), config.teacher, (), texts, only_correct=False)

    def make(folder: Path) -> None:
        items = read_features(features.path / "teacher")
        loaded = models.load(checkpoint, device="cpu")
        head, rows = models.head_of(loaded.model), token_rows(loaded.tokenizer)
        found = conditional_mutual_information(
            torch.cat([item.hidden for item in items]),
            head.weight[:rows],
            torch.cat([item.targets for item in items]),
            torch.repeat_interleave(
                torch.arange(len(items)), torch.tensor([len(item.targets) for item in items])
            ),
            None if head.bias is None else head.bias[:rows],
        )
        data = {"value": found.value, "ci95": list(found.ci95), "n": found.positions}
        write_json(folder / FILE, data)

    with steps.display.task("information in the logits", 1):
        return steps.probe("information", checkpoint, make, features=features.key)


def _begun(config: ExperimentConfig, steps: Steps, checkpoint: str, texts: int) -> Stage:
    """A defense may keep a teacher useful in its own style alone; here the style is another's."""
    truth = steps.examined(texts)
    right = [trace for trace in read_traces(truth.path) if trace.correct]
    if not right:
        raise ConfigError(f"probe.begun: none of {texts} ground-truth texts is right; take more")

    def make(folder: Path) -> None:
        loaded, task = models.load(checkpoint), build_task(config.task)
        done = sum(finish(loaded, task, right, config.greedy, shard=config.shard))
        data = {"value": done / len(right), "ci95": list(wilson(done, len(right)))}
        write_json(folder / FILE, {**data, "n": len(right)})

    with steps.display.task("answers that others began", 1):
        greedy = config.greedy.dump()
        return steps.probe("begun", checkpoint, make, texts=truth.key, share=BEGUN, greedy=greedy)


def _subspace(config: ExperimentConfig, steps: Steps, checkpoint: str) -> Stage:
    def make(folder: Path) -> None:
        loaded = models.load(checkpoint)
        shape = loaded.model.config.get_text_config()
        tokens = sample_tokens(len(loaded.tokenizer))
        count = min(int(shape.hidden_size), len(tokens)) + SPARE
        prompts = random_prompts(len(loaded.tokenizer), count)
        found = {}
        for name, rules in _RULES.items():
            oracle = ModelOracle(loaded.model, **rules)
            result = recover_subspace(oracle, prompts, tokens)
            found[name] = {
                "value": float(result.hidden_size or 0),
                "label": result.label,
                "queries": result.queries,
                "refused": result.refused,
            }
        true = {"hidden_size": int(shape.hidden_size), "tokens": len(tokens)}
        write_json(folder / FILE, {**found, **true})

    with steps.display.task(f"hidden size through the API: {Path(checkpoint).name}", 1):
        return steps.probe("subspace", checkpoint, make)


_RULES: dict[str, dict[str, Any]] = {
    "open": {"top_k": TOP_K, "allow_bias": True},
    "guarded": {"top_k": TOP_K, "allow_bias": False, "decimals": DECIMALS},
}


def _row(
    task: str, victim: Taught | None, metric: str, data: dict[str, Any], seconds: float
) -> ResultRow:
    value = data["value"]
    return ResultRow(
        role="teacher" if victim else "suspect",
        model="teacher",
        defense=victim.label if victim else "none",
        strength=victim.strength if victim else None,
        decoding="none",
        task=task,
        metric=metric,
        value=value,
        n=data["n"],
        ci95=tuple(data.get("ci95", (value, value))),
        seconds=seconds,
    )


def _sentence(name: str, data: dict[str, Any]) -> str:
    opened, guarded = data["open"], data["guarded"]
    words = (
        f"Hidden size of {name}, through the top {TOP_K} logprobs and a logit bias: "
        f"{opened['label']} after {opened['queries']} queries (it is {data['hidden_size']}, seen "
        f"on {data['tokens']} tokens)."
    )
    why = f" ({guarded['refused']})" if guarded["refused"] else ""
    return f"{words} Behind the gateway's rules: {guarded['label']}{why}."
