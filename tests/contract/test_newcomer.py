"""A defense, a clean-up, an attack and a task are one module and one YAML file each.

The examples of CONTRIBUTING.md are taken from its text and put into a copy of the tree, and nothing
else in the copy is changed.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from contributing import ROOT, examples

PACKAGES = ("azeotrope", "gateway", "actors", "experiment", "workflows")
USE = """
import torch
from azeotrope import models, tasks
from azeotrope.attacks import base as attacks
from azeotrope.attacks.cleanups import base as cleanups
from azeotrope.defenses import base as defenses
from azeotrope.tokens import Boundary
from azeotrope.traces import ground_truth
from experiment.settings import load

task = tasks.build(load("sums_demo", []).task)
assert task.problems("test", 1)[0].question == "2 + 5?"
assert task.check("so it is\\n#### 7", "7") and not task.check("#### 8", "7")

pocket = tasks.build(tasks.PocketConfig(slip=0))
texts = ground_truth(pocket, pocket.problems("train", 8))
chain = cleanups.resolve(load("short_demo", []).cleanups[0])
kept = chain.clean(texts, Boundary(), cleanups.AttackerAssets()).traces
assert 4 <= len(kept) < 8, len(kept)

student = models.load("pocket/small", device="cpu")
attack = attacks.resolve(load("answer_demo", []).attack)
samples = attack.examples(student, texts, pocket, Boundary())
loss = attack.loss(student, samples)
assert loss.count == sum(sum(sample.answer) for sample in samples)
assert torch.isfinite(loss.total)

defense = load("cut_demo", []).defenses[0].resolve()[0]
context = defenses.RewriteContext(Boundary())
(cut,) = defense.rewrite([defenses.FinishedText(texts[0].text)], context)
assert cut.status == "changed" and len(cut.text) < len(texts[0].text)
assert pocket.check(cut.text, texts[0].reference)
print("all four work")
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the product with the examples added."""
    folder = tmp_path_factory.mktemp("newcomer")
    for package in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, folder / package, ignore=ignored)
    assert len(examples()) == 8, sorted(examples())
    for name, text in examples().items():
        path = folder / name
        assert path.parent.is_dir(), f"{name} needs more than one new file"
        assert not path.exists(), f"{name} is in the tree already"
        path.write_text(text)
    return folder


def run(tree: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=tree,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.parametrize("name", ["cut_demo", "short_demo", "answer_demo", "sums_demo"])
def test_the_configuration_is_accepted(tree: Path, name: str) -> None:
    assert name in run(tree, "-m", "workflows", "validate", name)


def test_the_modules_do_what_they_say(tree: Path) -> None:
    assert "all four work" in run(tree, "-c", USE)
