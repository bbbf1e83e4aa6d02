"""Which teacher a run is served from, and which are refused because nobody checked them."""

import json
from pathlib import Path
from typing import Any

import pytest

from azeotrope import models
from azeotrope.config import ConfigError
from azeotrope.files import write_json
from experiment.points import POINTS, Point, find_point
from experiment.stages import RECORD

PASSED = {"largest_logit_difference": 1e-6, "tied": False, "trunk_tensors": 3, "prompts": 16}


def run_with(folder: Path, *points: Point) -> str:
    """The folder of a run that ended."""
    write_json(folder / "config.json", {"azeotrope": "0.1.0", "config": {}})
    write_json(folder / POINTS, [point.dump() for point in points])
    return str(folder)


def head_with(
    folder: Path, described: dict[str, Any], *, name: str = "head-0123456789abcdef"
) -> Path:
    """A stage with a checkpoint whose export is described so."""
    teacher = folder / name / "teacher"
    teacher.mkdir(parents=True)
    (teacher / "config.json").write_text('{"model_type": "llama"}')
    (teacher / "model.safetensors").write_bytes(b"weights")
    write_json(folder / name / "head.json", described)
    write_json(folder / name / RECORD, {"seconds": 1.0})
    return teacher


def finished(folder: Path, **changes: Any) -> Path:
    teacher = head_with(folder, {})
    described = {"export": PASSED, "fingerprint": models.fingerprint(str(teacher)), **changes}
    write_json(teacher.parent / "head.json", described)
    return teacher


# Which one -------------------------------------------------------------------------------------


def test_a_run_of_one_defense_is_served_with_all_that_belongs_to_it(tmp_path: Path) -> None:
    marked = {"name": "watermark", "strength": 2.0, "key": "secret"}
    cut = {"name": "answers_only"}
    point = Point(
        defense="doge+watermark",
        strength=0.5,
        checkpoint=str(finished(tmp_path)),
        decoding=(marked,),
        rewriting=(cut,),
        teacher=models.resolve("pocket/teacher"),
    )
    control = Point(defense="clipped", checkpoint=point.checkpoint, control=True)
    source = run_with(tmp_path / "run", control, point)
    assert find_point(source) == point
    assert find_point(source, "doge+watermark") == point
    # A control is served if somebody asks for it, and never by itself.
    assert find_point(source, "clipped") == control


def test_of_several_points_one_must_be_named(tmp_path: Path) -> None:
    teacher = models.resolve("pocket/teacher")
    names = [("doge", 2.5), ("cmi", 1.0), ("cmi", 4.0)]
    points = [Point(defense=name, strength=at, checkpoint=teacher) for name, at in names]
    source = run_with(tmp_path, *points)
    known = r"defense=NAME or defense='NAME \(STRENGTH\)' from doge \(2.5\), cmi \(1\), cmi \(4\)"
    for asked, said in (
        (None, "3 points that are no controls"),
        ("dogee", "0 points called 'dogee'"),
        ("cmi", "2 points called 'cmi'"),
    ):
        with pytest.raises(ConfigError, match=f"{said}; choose with {known}"):
            find_point(source, asked)
    assert find_point(source, "doge").strength == 2.5
    assert find_point(source, "cmi (4)").strength == 4.0


@pytest.mark.parametrize("controls", [0, 1])
def test_controls_alone_are_not_served(tmp_path: Path, controls: int) -> None:
    point = Point(defense="clipped", checkpoint=models.resolve("pocket/teacher"), control=True)
    known = "clipped" if controls else "nothing"
    with pytest.raises(ConfigError, match=f"0 points that are no controls.* from {known}"):
        find_point(run_with(tmp_path, *[point] * controls))


def test_a_run_that_did_not_end_is_no_checkpoint(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"azeotrope": "0.1.0", "config": {}})
    with pytest.raises(ConfigError, match=r"run without points.json.*run its pipeline again"):
        find_point(str(tmp_path))


@pytest.mark.parametrize("text", ["{", '[{"defense": "doge"}]', '[{"defence": "doge"}]', "7"])
def test_points_that_cannot_be_read_are_an_error_and_not_an_undefended_teacher(
    tmp_path: Path, text: str
) -> None:
    run_with(tmp_path)
    (tmp_path / POINTS).write_text(text)
    with pytest.raises(ConfigError, match=f"{POINTS} cannot be read"):
        find_point(str(tmp_path))


def test_a_pocket_model_and_a_folder_are_undefended(tmp_path: Path) -> None:
    pocket = find_point("pocket/teacher")
    assert pocket == Point(defense="none", checkpoint=models.resolve("pocket/teacher"))
    assert find_point(pocket.checkpoint) == pocket
    with pytest.raises(ConfigError, match="`defense` chooses among a run's points"):
        find_point("pocket/teacher", "doge")
    with pytest.raises(ConfigError, match=r"pocket/teacher.*or give the folder of a run"):
        find_point("pocket/tutor")
    with pytest.raises(ConfigError, match="or give the folder of a run"):
        find_point(str(tmp_path))


@pytest.mark.parametrize("name", ["runs/tpyo", "nobody/no-such-model", "a/b/c"])
def test_a_name_that_is_nowhere_on_this_machine_is_refused_at_once(name: str) -> None:
    with pytest.raises(ConfigError, match=f"no run and no checkpoint at {name}.*ask no hub"):
        find_point(name)


# What is refused -------------------------------------------------------------------------------


def test_a_head_that_passed_is_served_from_its_folder_too(tmp_path: Path) -> None:
    teacher = finished(tmp_path)
    assert find_point(str(teacher)).checkpoint == str(teacher)
    # A GPU's bfloat16 is held to its own resolution.
    low = finished(
        tmp_path / "low", export={**PASSED, "largest_logit_difference": 0.2, "float32": False}
    )
    assert find_point(str(low)).checkpoint == str(low)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"export": {**PASSED, "largest_logit_difference": 2e-4}}, r"did not pass.*0.0002 away"),
        ({"export": {**PASSED, "largest_logit_difference": float("nan")}}, "did not pass"),
        ({"export": {**PASSED, "tied": True}}, r"did not pass.*tied: True"),
        ({"export": None}, "no finished export check"),
        ({"undefended": True}, "has the undefended head"),
        ({"fingerprint": "0" * 16}, "changed after its export check"),
    ],
)
def test_a_head_that_did_not_pass_is_refused(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    teacher = finished(tmp_path)
    described = json.loads((teacher.parent / "head.json").read_text()) | changes
    (teacher.parent / "head.json").write_text(json.dumps(described))
    source = run_with(tmp_path / "run", Point(defense="doge", checkpoint=str(teacher)))
    for asked in (source, str(teacher)):
        with pytest.raises(ConfigError, match=said):
            find_point(asked)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_checkpoint_that_was_changed_afterwards_is_refused(tmp_path: Path, name: str) -> None:
    teacher = finished(tmp_path)
    with (teacher / name).open("a") as file:
        file.write(" ")
    with pytest.raises(ConfigError, match="changed after its export check"):
        find_point(str(teacher))


def test_training_that_did_not_end_is_refused(tmp_path: Path) -> None:
    partial = head_with(tmp_path, {}, name=".head-0123456789abcdef.partial")
    (partial.parent / "head.json").unlink()
    with pytest.raises(ConfigError, match="training that did not end"):
        find_point(str(partial))
    # Described, but killed before the stage was given its name.
    whole = head_with(tmp_path, {"export": PASSED}, name=".head-fedcba9876543210.partial")
    (whole.parent / RECORD).unlink()
    with pytest.raises(ConfigError, match="no finished export check"):
        find_point(str(whole))
