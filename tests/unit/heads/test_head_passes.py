"""Passes of head training: their inputs, their floor and what they export."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from actors import heads as head_actor
from actors.heads import HeadJob
from azeotrope import models, tasks
from azeotrope.files import write_json
from azeotrope.heads.export import head_from, put_head
from azeotrope.heads.features import compute, write_features
from azeotrope.heads.search import HeadTraining
from azeotrope.heads.surrogate import first_block
from azeotrope.tokens import Boundary, encode
from azeotrope.traces import ground_truth
from experiment import defending
from experiment.plan import ProblemRange, TraceRequest, lesson_problems
from experiment.results import _notes
from experiment.settings import DefenseChoice, ExperimentConfig, ProxyLesson
from experiment.stages import Stage
from experiment.steps.features import FeatureTexts
from experiment.teachers import TeacherResult

# What a pass requests


def stage(name: str) -> Stage:
    return Stage(name, name, Path("/cache") / name, {})


class Recorder:
    """Takes the place of all steps: notes every requested stage, and makes none."""

    def __init__(self, config: ExperimentConfig) -> None:
        self.config = config
        self.traces = self.features = self.heads = self
        self.requests: list[TraceRequest] = []
        self.feature_stages: list[tuple[str, int, tuple[str, ...], bool, str | None]] = []
        self.trained: list[dict[str, Any]] = []
        self.truths: list[ProblemRange] = []
        self.rare: list[tuple[str, float]] = []
        self.lessons: list[ProblemRange] = []

    def generate(self, requests: Sequence[TraceRequest]) -> list[Stage]:
        self.requests += requests
        return [stage(f"traces-{request.model}-{request.seed}") for request in requests]

    def ground_truth(self, problems: ProblemRange) -> Stage:
        self.truths.append(problems)
        return stage("truth")

    def rarest(self, source: Stage, teacher: str, share: float) -> Stage:
        self.rare.append((source.name, share))
        return stage("rarest")

    def taught_proxies(self, lesson: ProxyLesson) -> tuple[str, ...]:
        self.lessons.append(lesson_problems(self.config, lesson))
        return ("taught",)

    def extract(
        self,
        texts: FeatureTexts,
        teacher: str,
        proxies: tuple[str, ...] = (),
        *,
        layer: str | None = None,
    ) -> Stage:
        name = texts.stage.name
        self.feature_stages.append((name, texts.count, proxies, texts.only_correct, layer))
        return stage(f"features-{name}")

    def train(
        self,
        features: Sequence[Stage],
        teacher: str,
        proxies: tuple[str, ...],
        defense: dict[str, Any],
        training: HeadTraining,
        *,
        keeps_floor: bool = True,
    ) -> Stage:
        number = len(self.trained)
        self.trained.append(
            {
                "features": [stage.name for stage in features],
                "teacher": teacher,
                "proxies": proxies,
                "defense": defense["name"],
                "floor": training.floor is not None,
                "keeps_floor": keeps_floor,
            }
        )
        return stage(f"head-{number}")


CLEAN = TeacherResult(None, stage("clean"), stage("greedy"), stage("sampled"))


def passes(parts: list[dict[str, Any]], lesson: bool = False, **training: Any) -> Recorder:
    choice = DefenseChoice(
        parts=tuple(parts),
        training=HeadTraining.model_validate(training),
        lesson=ProxyLesson(attacks=({"name": "forward_kl"},), traces=30) if lesson else None,
    )
    config = ExperimentConfig(
        name="passes", defenses=(choice,), traces=100, head_traces=80, budgets=(200,)
    )
    steps = Recorder(config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(defending, "taught_proxies", Recorder.taught_proxies)
        teacher = defending.defend(steps, choice, CLEAN)  # type: ignore[arg-type]
    assert [head.name for head in teacher.heads] == [f"head-{i}" for i in range(len(steps.trained))]
    return steps


CMI = {"name": "cmi", "layer": "last"}


@pytest.mark.parametrize(
    ("from_pass", "refreshes", "floors", "exposed"),
    [
        (0, 0, [True], []),
        (0, 2, [True, True, True], []),
        (1, 2, [False, True, True], [1]),
        (2, 2, [False, False, True], [2]),
        (1, 3, [False, True, True, True], [1]),
    ],
)
def test_passes_are_held_to_the_floor_from_the_one_that_is_named(
    from_pass: int, refreshes: int, floors: list[bool], exposed: list[int]
) -> None:
    floor = {"from_pass": from_pass}
    steps = passes([CMI], refreshes=refreshes, truth=50, floor=floor)
    assert [item["floor"] for item in steps.trained] == floors
    # The first pass with a floor begins with a head that was not held to one.
    risky = [i for i, item in enumerate(steps.trained) if item["floor"] and not item["keeps_floor"]]
    assert risky == exposed


def test_without_a_floor_no_pass_has_one() -> None:
    steps = passes([CMI], refreshes=2, truth=50, floor=None)
    assert [item["floor"] for item in steps.trained] == [False] * 3
    assert all(item["keeps_floor"] for item in steps.trained)


def test_each_pass_trains_on_what_the_last_teacher_writes() -> None:
    steps = passes(
        [CMI], refreshes=2, truth=50, rarest=0.5, refresh_traces=40, refresh_temperature=0.3
    )
    config = ExperimentConfig(name="passes")
    teachers = [item["teacher"] for item in steps.trained]
    assert teachers == [config.teacher, "/cache/head-0/teacher", "/cache/head-1/teacher"]
    # Clean traces, of which the rarest are taken, and the ground truth beside them.
    assert steps.rare == [("clean", 0.5)]
    assert steps.truths == [ProblemRange("train", 50)]
    own = ["rarest", "traces-/cache/head-0/teacher-1", "traces-/cache/head-1/teacher-2"]
    assert [item["features"] for item in steps.trained] == [
        [f"features-{name}", "features-truth"] for name in own
    ]
    # Ground truth comes first; all of it counts, and of own texts only those that are right.
    assert steps.feature_stages == [
        ("truth", 50, config.proxies, False, "last"),
        (own[0], 80, config.proxies, True, "last"),
        (own[1], 40, config.proxies, True, "last"),
        (own[2], 40, config.proxies, True, "last"),
    ]
    written = [request for request in steps.requests if request.seed]
    assert [
        (r.model, r.problems.count, r.sampling.temperature, r.problems.skip) for r in written
    ] == [
        ("/cache/head-0/teacher", 40, 0.3, 0),
        ("/cache/head-1/teacher", 40, 0.3, 0),
    ]


def test_apart_leaves_the_attackers_problems_alone() -> None:
    steps = passes([CMI], lesson=True, refreshes=1, truth=50, apart=True)
    # The largest of the attacker's budgets is 200 problems.
    assert steps.truths == [ProblemRange("train", 50, skip=200)]
    assert [problems.skip for problems in steps.lessons] == [200]
    drawn = [
        request
        for request in steps.requests
        if request.problems.split == "train" and request.model != "/cache/head-1/teacher"
    ]
    assert [(r.problems.count, r.problems.skip, r.seed) for r in drawn] == [
        (80, 200, 0),
        (80, 200, 1),
    ]
    assert all(item["proxies"] == ("taught",) for item in steps.trained)
    assert all(proxies == ("taught",) for _, _, proxies, _, _ in steps.feature_stages)


def test_a_lesson_is_never_about_the_attackers_problems() -> None:
    assert passes([CMI], lesson=True, truth=50).lessons == [ProblemRange("train", 30, skip=200)]


def test_of_a_composition_the_second_defense_begins_where_the_first_ended() -> None:
    steps = passes([{"name": "doge"}, CMI], refreshes=0, truth=50)
    assert [item["defense"] for item in steps.trained] == ["doge", "cmi"]
    assert steps.trained[1]["teacher"] == "/cache/head-0/teacher"
    assert [layer for *_, layer in steps.feature_stages] == [None, None, "last", "last"]
    # What the second is trained on is what the first one's teacher writes.
    assert steps.trained[1]["features"][0] == "features-traces-/cache/head-0/teacher-0"


# What a pass exports


PROMPTS = 6


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher with noise on its head: what an unconstrained pass may leave behind."""
    folder = tmp_path_factory.mktemp("spoiled")
    loaded = models.load("pocket/teacher", device="cpu")
    head = head_from(loaded)
    noise = torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        head.weight.add_(0.01 * noise)
    put_head(loaded, head)
    models.save(loaded, folder)
    return folder


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trunk's states on a few texts of the ground truth, and what enters the proxy's layer."""
    folder = tmp_path_factory.mktemp("features")
    task = tasks.build(tasks.PocketConfig())
    teacher = models.load("pocket/teacher", device="cpu")
    proxy = models.load("pocket/proxy-a", device="cpu")
    texts = [
        encode(
            teacher.tokenizer, task.messages(trace.question), trace.text,
            boundary=Boundary(), max_length=160, id=trace.id,
        )
        for trace in ground_truth(task, task.problems("train", PROMPTS))
    ]  # fmt: skip
    write_features(folder / "teacher/0.parquet", compute(teacher.model, texts, own=False))
    entering = compute(proxy.model, texts, before_block=first_block(proxy.model, "last"), own=False)
    write_features(folder / "proxy-0/0.parquet", entering)
    return folder


def train_pass(
    teacher: Path,
    features: Path,
    folder: Path,
    *,
    keeps_floor: bool,
    rate: float,
    begun: float | None = None,
) -> dict[str, Any]:
    """One pass with one round, as a worker trains it; what `head.json` says of it."""
    job = HeadJob(
        teacher=str(teacher),
        clean=models.resolve("pocket/teacher"),
        proxies=(models.resolve("pocket/proxy-a"),),
        defense={
            "name": "cmi", "layer": "last", "rank": 4, "utility_on": "truth", "strength": 0.2,
        },
        training=HeadTraining.model_validate(
            {
                "fit": {"steps": 2, "batch_size": 2, "learning_rate": rate, "log_every": 1},
                "floor": {
                    "problems": 8, "rounds": 1, "greedy": 0.5, "sampled": 0.5, "begun": begun,
                },
            }
        ),
        features=(str(features),),
        task=tasks.PocketConfig(),
        max_new_tokens=60,
        keeps_floor=keeps_floor,
    )  # fmt: skip
    progress: list[tuple[int, int]] = []
    head_actor.run(
        job.dump(), folder, folder / "state", rank=0, progress=lambda *step: progress.append(step)
    )
    assert progress == [(0, 2), (1, 2), (2, 2)]
    return json.loads((folder / "head.json").read_text())


def exported(folder: Path) -> torch.Tensor:
    return models.head_of(models.load(str(folder), device="cpu").model).weight.detach()


RUINOUS, GENTLE = 5.0, 1e-6


@pytest.mark.parametrize("keeps_floor", [True, False])
def test_if_no_round_holds_it_exports_what_is_known_to_hold(
    keeps_floor: bool, spoiled: Path, features: Path, tmp_path: Path
) -> None:
    about = train_pass(spoiled, features, tmp_path, keeps_floor=keeps_floor, rate=RUINOUS)
    assert [item["accepted"] for item in about["rounds"]] == [False]
    assert about["strength"] == 0.0
    assert about["undefended"] is not keeps_floor
    start = exported(spoiled) if keeps_floor else exported(Path(models.resolve("pocket/teacher")))
    torch.testing.assert_close(exported(tmp_path / "teacher"), start)
    exported_head = "the one it had" if keeps_floor else "that of the undefended teacher"
    assert _notes("cmi", [about]) == [
        f"cmi: none of 1 rounds kept the utility floor, so the head that this pass exported is "
        f"{exported_head}."
    ]


def test_a_round_that_holds_is_exported_even_from_a_head_that_did_not(
    spoiled: Path, features: Path, tmp_path: Path
) -> None:
    about = train_pass(spoiled, features, tmp_path, keeps_floor=False, rate=GENTLE)
    assert [item["accepted"] for item in about["rounds"]] == [True]
    assert (about["strength"], about["undefended"]) == (0.2, False)
    torch.testing.assert_close(
        exported(tmp_path / "teacher"), exported(spoiled), rtol=1e-3, atol=1e-3
    )
    assert about["parts"][0].keys() == {"cross-entropy", "cosine"}
    assert len(about["parts"]) == len(about["log"]) == 2
    assert about["rounds"][0]["score"] < 1
    assert about["export"]["vllm_difference"] is None or about["export"]["vllm_difference"] < 1e-3
    assert _notes("cmi", [about]) == []


def test_answers_that_others_began_are_measured_where_the_floor_asks(
    spoiled: Path, features: Path, tmp_path: Path
) -> None:
    about = train_pass(spoiled, features, tmp_path, keeps_floor=False, rate=GENTLE, begun=0.9)
    assert about["clean"]["begun"] >= 0.9
    (only,) = about["rounds"]
    assert only["accepted"] is (only["utility"]["begun"] >= 0.9 * about["clean"]["begun"])
    ruined = train_pass(
        spoiled, features, tmp_path / "ruined", keeps_floor=False, rate=RUINOUS, begun=0.9
    )
    assert ruined["rounds"][0]["utility"]["begun"] < about["clean"]["begun"]


# What the report says


@pytest.mark.parametrize(
    ("heads", "strength"),
    [
        ([(0.5, False)], 0.5),
        # A pass that found nothing better leaves the head of the one before.
        ([(0.5, False), (0.0, False)], 0.5),
        ([(0.5, False), (0.25, False)], 0.5),
        # The undefended head was taken again: what came before is gone.
        ([(0.5, False), (0.0, True)], 0.0),
        ([(0.5, False), (0.0, True), (0.25, False)], 0.25),
        ([(0.5, False), (0.0, True), (0.0, False)], 0.0),
    ],
)
def test_the_strength_in_force_is_that_of_the_head_that_was_exported_last(
    heads: list[tuple[float, bool]], strength: float, tmp_path: Path
) -> None:
    stages = []
    for number, (pass_strength, undefended) in enumerate(heads):
        made = Stage("head", str(number), tmp_path / str(number), {})
        write_json(made.path / "head.json", {"strength": pass_strength, "undefended": undefended})
        stages.append(made)
    choice = DefenseChoice(parts=(CMI,))
    assert (
        TeacherResult(choice, stage("t"), stage("g"), stage("s"), tuple(stages)).strength
        == strength
    )
    assert TeacherResult(choice, stage("t"), stage("g"), stage("s")).strength == 0.1
    assert CLEAN.strength == 0.0
