"""Kill a generation worker, a training worker and the driver with SIGKILL: nothing may change."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml

from azeotrope.traces import read_traces

PATIENCE_S = 240
CONFIG = {
    "name": "killed",
    "teacher": "pocket/teacher",
    "proxies": ["pocket/proxy-a"],
    "students": [{"name": "small", "model": "pocket/small"}],
    "traces": 60,
    "exam_problems": 40,
    "teacher_problems": 40,
    "defenses": [
        {
            "parts": [{"name": "doge", "strength": 0.05}],
            "training": {
                "refreshes": 0,
                "fit": {"steps": 6, "batch_size": 8},
                "floor": {"problems": 20, "rounds": 2},
            },
        }
    ],
    "attack": {"name": "text_sft", "fit": {"steps": 60, "checkpoint_every": 5}},
    "cleanups": [],
}


def start(folder: Path) -> subprocess.Popen[bytes]:
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "killed.yaml"
    config.write_text(yaml.safe_dump(CONFIG))
    with (folder / "log.txt").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "workflows", "pipeline", str(config)],
            cwd=folder,
            stdout=log,
            stderr=log,
        )


def finish(run: subprocess.Popen[bytes], folder: Path) -> list[dict[str, object]]:
    code = run.wait(timeout=PATIENCE_S)
    assert code == 0, (folder / "log.txt").read_text()[-3000:]
    rows = json.loads((folder / "runs/killed/results.json").read_text())["rows"]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def wait_for(seen: Callable[[], bool], run: subprocess.Popen[bytes], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not seen():
        assert run.poll() is None, f"the run ended before {what} was seen"
        assert time.monotonic() < deadline, f"{what} was not seen in {PATIENCE_S} s"
        time.sleep(0.05)


def kill_worker(run: subprocess.Popen[bytes], title: str) -> bool:
    """SIGKILL the first process below the driver whose title has these words."""
    for process in psutil.Process(run.pid).children(recursive=True):
        try:
            if title in " ".join(process.cmdline()):
                process.send_signal(signal.SIGKILL)
                return True
        except psutil.NoSuchProcess:
            continue
    return False


def training_state(folder: Path, kind: str) -> bool:
    return any((folder / "runs/cache").glob(f".{kind}-*.partial/state/state.safetensors"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    return finish(start(folder), folder)


def test_kills_change_no_result(undisturbed: list[dict[str, object]], tmp_path: Path) -> None:
    run = start(tmp_path)
    wait_for(lambda: kill_worker(run, "GenerationWorker"), run, "a generation worker")
    wait_for(lambda: training_state(tmp_path, "student"), run, "a student in training")
    wait_for(lambda: kill_worker(run, "RayTrainWorker"), run, "a training worker")
    finished = len(list((tmp_path / "runs/cache").glob(".student-*.partial/student.json")))
    wait_for(
        lambda: (
            training_state(tmp_path, "student")
            and len(list((tmp_path / "runs/cache").glob("*student-*/student.json"))) >= finished
        ),
        run,
        "training going on",
    )
    time.sleep(3)
    run.send_signal(signal.SIGKILL)
    run.wait()

    assert finish(start(tmp_path), tmp_path) == undisturbed
    for stage in (tmp_path / "runs/cache").glob("traces-*"):
        identities = [trace.id for trace in read_traces(stage)]
        assert len(set(identities)) == len(identities) > 0


def test_a_second_run_is_served_from_the_cache(
    undisturbed: list[dict[str, object]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = next(Path(tmp_path_factory.getbasetemp()).glob("undisturbed*"))
    before = sorted(path.name for path in (folder / "runs/cache").iterdir())
    assert finish(start(folder), folder) == undisturbed
    assert "starting Ray" not in (folder / "log.txt").read_text().split("report:")[-2]
    assert sorted(path.name for path in (folder / "runs/cache").iterdir()) == before


def test_the_rows_are_the_promised_ones(undisturbed: list[dict[str, object]]) -> None:
    accuracy = {
        (row["role"], row["defense"], row["attack"], row["decoding"])
        for row in undisturbed
        if row["metric"] == "accuracy"
    }
    assert accuracy == {
        ("teacher", "none", "none", "greedy"),
        ("teacher", "none", "none", "sampled@1"),
        ("teacher", "doge", "none", "greedy"),
        ("teacher", "doge", "none", "sampled@1"),
        ("student", "none", "none", "greedy"),
        ("student", "none", "sft_only", "greedy"),
        ("student", "none", "text_sft", "greedy"),
        ("student", "doge", "text_sft", "greedy"),
    }
