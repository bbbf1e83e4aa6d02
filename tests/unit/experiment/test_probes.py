"""What a run measures of its teachers' logits: on the right texts, of the right head, once."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch

from actors.teacher import FeatureJob, TeacherActor
from azeotrope import models, tasks
from azeotrope.collect import collect, finish
from azeotrope.files import write_json
from azeotrope.generation import Sampling
from azeotrope.heads.export import head_from, put_head
from azeotrope.heads.features import compute
from azeotrope.logits.information import conditional_mutual_information
from azeotrope.tokens import Boundary, encode
from azeotrope.traces import ground_truth
from experiment.display import Display
from experiment.probes import probe
from experiment.settings import DefenseChoice, ExperimentConfig, ProbeConfig
from experiment.stages import Cache, Stage
from experiment.steps import Steps
from experiment.steps.features import FeatureSteps, FeatureTexts
from experiment.teachers import TeacherResult

TEXTS = 40


class LocalFeatures(FeatureSteps):
    """Computes features in this process; the actor is the one that Ray runs."""

    computed = 0

    def extract(
        self,
        texts: FeatureTexts,
        teacher: str,
        proxies: tuple[str, ...] = (),
        *,
        layer: str | None = None,
    ) -> Stage:
        config, cache = self._context.config, self._context.cache
        assert (proxies, texts.only_correct, layer) == ((), False, None)
        assert teacher == config.teacher, "the trunk is the undefended teacher's"
        stage = cache.stage("features", traces=texts.stage.key, teacher=teacher)

        def make(folder: Path) -> None:
            LocalFeatures.computed += 1
            (file,) = texts.stage.path.glob("*.parquet")
            job = FeatureJob(traces=str(file), folder=str(folder), task=config.task)
            TeacherActor(teacher)({"job": [job.model_dump_json()]})  # type: ignore[dict-item]

        return cache.build(stage, make)


def defended(label: str, folder: Path, scale: float, *more: dict[str, object]) -> TeacherResult:
    """A teacher whose logits are the clean ones times a factor."""
    loaded = models.load("pocket/teacher", device="cpu")
    head = head_from(loaded)
    with torch.no_grad():
        head.weight.mul_(scale)
    put_head(loaded, head)
    stage = Cache(folder).stage("head", label=label)
    models.save(loaded, stage.path / "teacher")
    write_json(stage.path / "head.json", {"strength": 0.25})
    choice = DefenseChoice(name=label, parts=({"name": "cmi"}, *more))
    return TeacherResult(choice, stage, stage, stage, (stage,))


def clean(folder: Path) -> TeacherResult:
    stage = Cache(folder).stage("traces")
    return TeacherResult(None, stage, stage, stage)


def steps_with(
    folder: Path, settings: ProbeConfig | None, split: Literal["test", "validation"] = "test"
) -> Steps:
    config = ExperimentConfig(name="probed", cache=str(folder), probe=settings, exam_split=split)
    steps = Steps.of(config, Display())
    steps.features = LocalFeatures(steps.context)
    return steps


def estimated(scale: float) -> tuple[float, int]:
    """The estimate, from the models themselves."""
    loaded = models.load("pocket/teacher", device="cpu")
    task = tasks.build(tasks.PocketConfig())
    examples = [
        encode(
            loaded.tokenizer, task.messages(trace.question), trace.text,
            boundary=Boundary(), max_length=256,
        )
        for trace in ground_truth(task, task.problems("validation", TEXTS))
    ]  # fmt: skip
    items = compute(loaded.model, examples)
    estimate = conditional_mutual_information(
        torch.cat([item.hidden for item in items]),
        scale * models.head_of(loaded.model).weight.detach(),
        torch.cat([item.targets for item in items]),
        torch.cat([torch.full((len(i.targets),), n) for n, i in enumerate(items)]),
    )
    return estimate.value, estimate.positions


def test_information_is_estimated_for_every_head_on_texts_held_out(tmp_path: Path) -> None:
    flat, half = defended("flat", tmp_path, 0.0), defended("half", tmp_path, 0.5)
    steps = steps_with(tmp_path, ProbeConfig(information=TEXTS))
    results = probe(steps, clean(tmp_path), [flat, half])
    assert results.notes == []
    assert [(row.defense, row.strength) for row in results.rows] == [
        ("none", 0.0),
        ("flat", 0.25),
        ("half", 0.25),
    ]
    for row, scale in zip(results.rows, (1.0, 0.0, 0.5), strict=True):
        value, positions = estimated(scale)
        assert row.value == pytest.approx(value, rel=1e-3, abs=1e-6)
        assert (row.role, row.model, row.metric) == ("teacher", "teacher", "information")
        assert (row.task, row.decoding, row.n) == ("pocket", "none", positions)
        assert row.ci95[0] <= row.value <= row.ci95[1]
    # Logits that are all alike say nothing of the text before.
    values = {row.defense: row.value for row in results.rows}
    assert values["flat"] == pytest.approx(0.0, abs=1e-6)
    assert values["none"] > 0.05
    # The trunk was run once for all three heads, and nothing runs again.
    assert LocalFeatures.computed == 1
    again = steps_with(tmp_path, ProbeConfig(information=TEXTS))
    assert probe(again, clean(tmp_path), [flat, half]) == results
    assert LocalFeatures.computed == 1


def test_the_hidden_size_is_found_where_the_api_is_open(tmp_path: Path) -> None:
    teacher = defended("cmi", tmp_path, 0.5)
    steps = steps_with(tmp_path, ProbeConfig(information=0, subspace=("pocket/small", "teacher")))
    results = probe(steps, clean(tmp_path), [teacher])
    size = models.load("pocket/small", device="cpu").model.config.hidden_size
    rows = {(row.model, row.defense, row.metric): row for row in results.rows}
    assert len(rows) == len(results.rows) == 6
    opened, guarded = (f"hidden size recovered, {when} API" for when in ("open", "guarded"))
    assert rows[("pocket/small", "none", opened)].value == size
    assert rows[("pocket/small", "none", opened)].role == "suspect"
    assert rows[("pocket/small", "none", opened)].strength is None
    assert rows[("pocket/small", "none", guarded)].value == 0
    # With fewer tokens than hidden states there is only a lower bound, for the defended head too.
    for name in ("none", "cmi"):
        assert rows[("teacher", name, opened)].value == 128
        assert rows[("teacher", name, opened)].role == "teacher"
        assert rows[("teacher", name, guarded)].value == 0
    assert all(row.n > 0 for row in results.rows)
    assert [note.split(",")[0] for note in results.notes] == [
        "Hidden size of pocket/small",
        "Hidden size of teacher",
        "Hidden size of teacher (cmi)",
    ]
    assert f"logit bias: {size} after" in results.notes[0]
    assert "logit bias: >= 128 after" in results.notes[1]
    assert "Behind the gateway's rules: nothing (" in results.notes[0]
    queries = json.loads(next(tmp_path.glob("probe-*/probe.json")).read_text())["open"]["queries"]
    assert queries > 1000


def test_only_teachers_that_are_a_checkpoint_are_measured(tmp_path: Path) -> None:
    rewritten = defended("both", tmp_path, 0.5, {"name": "answers_only"})
    choice = DefenseChoice(parts=({"name": "answers_only"},))
    stage = Cache(tmp_path).stage("text")
    text = TeacherResult(choice, stage, stage, stage)
    steps = steps_with(tmp_path, ProbeConfig(information=0, subspace=("teacher",)))
    results = probe(steps, clean(tmp_path), [rewritten, text])
    assert {row.defense for row in results.rows} == {"none"}


@pytest.mark.parametrize("split", ["test", "validation"])
def test_answers_that_others_began_are_finished_by_every_teacher(
    split: Literal["test", "validation"], tmp_path: Path
) -> None:
    flat = defended("flat", tmp_path, 0.0)
    steps = steps_with(tmp_path, ProbeConfig(information=0, begun=TEXTS), split)
    results = probe(steps, clean(tmp_path), [flat])
    task = tasks.build(tasks.PocketConfig())
    right = [t for t in ground_truth(task, task.problems(split, TEXTS)) if t.correct]
    assert 5 < len(right) < TEXTS, "slips are no fair beginning"
    assert [(row.defense, row.n) for row in results.rows] == [
        ("none", len(right)),
        ("flat", len(right)),
    ]
    assert {row.metric for row in results.rows} == {"accuracy where others began the answer"}
    # The teacher goes on from a beginning as from its own; a head that says nothing does not.
    assert results.rows[0].value >= 0.9
    assert results.rows[1].value == 0
    for row in results.rows:
        assert row.ci95[0] <= row.value <= row.ci95[1]


def test_of_a_text_that_nobody_began_the_model_writes_everything() -> None:
    loaded, task = models.load("pocket/small", device="cpu"), tasks.build(tasks.PocketConfig())
    problems = task.problems("validation", 30)
    sampling = Sampling(temperature=1.0, max_new_tokens=48)
    texts = [replace(t, correct=True) for t in ground_truth(task, problems)]
    alone = finish(loaded, task, texts, sampling, share=0.0)
    assert alone == [t.correct for t in collect(loaded, task, problems, sampling)]
    # Nearly all of a right solution is a help to a student that knows little.
    right = [t for t in ground_truth(task, problems) if t.correct]
    helped = finish(loaded, task, right, sampling, share=0.9)
    assert sum(helped) / len(right) > 0.1 + sum(alone) / len(alone)
    with pytest.raises(ValueError, match=r"share must be in \[0, 1\), got 1.0"):
        finish(loaded, task, right, sampling, share=1.0)


def test_without_a_probe_nothing_is_measured(tmp_path: Path) -> None:
    steps = steps_with(tmp_path, None)
    results = probe(steps, clean(tmp_path), [])
    assert (results.rows, results.notes) == ([], [])
    assert list(tmp_path.iterdir()) == []
