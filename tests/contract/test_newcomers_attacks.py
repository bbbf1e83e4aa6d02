"""A newcomer adds an attack and a clean-up with one module and one YAML file each.

The modules and configurations are those that CONTRIBUTING.md shows.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import test_attacks as contract
from contributing import added, examples

from actors import students
from actors.students import StudentJob
from azeotrope import models, tasks
from azeotrope.attacks import base as attacks
from azeotrope.attacks.cleanups import base as cleanups
from azeotrope.config import ConfigError
from azeotrope.generation import Sampling
from azeotrope.tokens import Boundary
from azeotrope.traces import ground_truth, write_traces
from experiment import settings
from experiment.cells import cells_of

TEXTS = 6
TASK = tasks.PocketConfig(slip=0)


def configuration(name: str, folder: Path) -> str:
    """An example's YAML file, written into a folder."""
    path = folder / f"{name}.yaml"
    path.write_text(examples()[f"workflows/configs/{name}.yaml"])
    return str(path)


def trained(folder: Path, **changes: Any) -> dict[str, Any]:
    """What a student reports that was trained in this process, in two steps."""
    task = tasks.build(TASK)
    write_traces(folder / "texts/0.parquet", ground_truth(task, task.problems("train", TEXTS)))
    job = StudentJob.model_validate(
        {
            "model": models.resolve("pocket/small"),
            "name": "small",
            "traces": str(folder / "texts"),
            "take": TEXTS,
            "boundary": Boundary(),
            "task": TASK,
            "exam_problems": 1,
            "exam": Sampling(temperature=0.0, max_new_tokens=4),
            "seed": 0,
            "save_weights": False,
            **changes,
        }
    )
    students.run(job.dump(), folder, folder / "state", rank=0, progress=lambda *_: None)
    return json.loads((folder / "student.json").read_text())


FIT = {"steps": 2, "batch_size": 2}


def test_an_attack_is_one_module_and_one_yaml_file(tmp_path: Path) -> None:
    path = configuration("answer_demo", tmp_path)
    with pytest.raises(ConfigError, match="unknown attack 'answer_sft'"):
        settings.load(path, [])
    with added("azeotrope.attacks", "answer_sft", tmp_path / "modules"):
        assert "answer_sft" in attacks.names()
        contract.test_an_attack_module_follows_the_contract("answer_sft")
        contract.test_an_attack_refuses_unknown_keys("answer_sft")
        config = settings.load(path, [])
        assert {cell.attack for cell in cells_of(config)} == {"answer_sft", "sft_only"}
        student = trained(tmp_path / "run", attack={**config.attack, "fit": FIT})
        assert (student["kept"], student["steps"]) == (TEXTS, 2)
        assert student["tokens"] > 0
    assert "answer_sft" not in attacks.names()


def test_a_clean_up_is_one_module_and_one_yaml_file(tmp_path: Path) -> None:
    path = configuration("short_demo", tmp_path)
    with pytest.raises(ConfigError, match="unknown clean-up 'short'"):
        settings.load(path, [])
    with added("azeotrope.attacks.cleanups", "short", tmp_path / "modules"):
        assert "short" in cleanups.names()
        contract.test_a_clean_up_module_follows_the_contract("short")
        traces = ground_truth(tasks.build(TASK), tasks.build(TASK).problems("train", TEXTS))
        contract.test_a_clean_up_changes_texts_but_not_which_traces_they_are("short", traces)
        config = settings.load(path, [])
        assert config.cleanup_labels == ("short", "correct_only+short")
        assert {"short", "correct_only+short"} < {cell.cleanup for cell in cells_of(config)}
        for number, (spec, kept) in enumerate(zip(config.cleanups, (4, 3), strict=True)):
            student = trained(
                tmp_path / f"run {number}", attack={"name": "text_sft", "fit": FIT}, cleanup=spec
            )
            assert student["kept"] == kept
            assert student["cost"].keys() == {"queries", "tokens", "seconds"}
            assert student["cost"]["queries"] == 0
    assert "short" not in cleanups.names()
