"""The wheel works by itself: package data, entry point, jobs in worker processes.

The dependencies are those of this environment, lent through a path file; `azeotrope` and the other
packages come from the wheel alone, because the folder that runs the commands is outside the
repository. It is built from what git has, so a file that was never added is missing here too.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import typer

from azeotrope.report.page import read_document

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 600
SMALL = [
    "traces=120",
    "head_traces=60",
    "exam_problems=40",
    "teacher_problems=40",
    "defenses.0.training.refreshes=0",
    "defenses.0.training.fit.steps=10",
    "defenses.0.training.floor.rounds=2",
    "defenses.0.training.floor.problems=20",
    "attack.fit.steps=40",
]

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`azeotrope` of a fresh environment in which the wheel is installed."""
    folder = tmp_path_factory.mktemp("wheel")
    clone, venv = folder / "clone", folder / "venv"
    run("git", "clone", "-q", ROOT, clone, cwd=folder)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, clone]
    run(*build, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=folder)
    site = next((venv / "lib").glob("python*")) / "site-packages"
    # A path file does not run those of the folder it names, so the editable install stays out.
    (site / "lent.pth").write_text(f"{Path(typer.__file__).parents[1]}\n")
    install = [sys.executable, "-m", "pip", "-q", "--python", venv / "bin" / "python"]
    run(*install, "install", "--no-deps", "--force-reinstall", wheel, cwd=folder)
    return venv / "bin" / "azeotrope"


def test_help_and_doctor_start_outside_the_repository(program: Path, tmp_path: Path) -> None:
    assert "pipeline" in run(program, "--help", cwd=tmp_path)
    place = "import azeotrope, gateway, workflows; print(azeotrope.__file__, gateway.__file__)"
    printed = run(program.with_name("python"), "-c", place, cwd=tmp_path)
    assert printed.count(str(program.parents[1])) == 2, printed
    assert "azeotrope" in run(program, "doctor", cwd=tmp_path)


def test_a_small_pipeline_ends_with_a_report(program: Path, tmp_path: Path) -> None:
    run(program, "pipeline", "pocket_demo", *SMALL, cwd=tmp_path)
    folder = tmp_path / "runs" / "pocket_demo"
    _, rows = read_document(folder / "results.json")
    assert {row.defense for row in rows} == {"none", "doge", "answers_only"}
    assert (folder / "report.html").stat().st_size > 10_000
    assert list((folder / "figures").glob("*.png"))
