"""The shipped experiment on logits, very small: every stage runs; a second run computes nothing."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PATIENCE_S = 600
"""Limit for a run that hangs; this test does not measure speed."""
FIT = "{steps: 3, batch_size: 8, log_every: 1}"
SMALL = [
    "traces=40",
    "head_traces=40",
    "seeds=[0]",
    "exam_problems=20",
    "teacher_problems=20",
    "cleanups=[]",
    f"attack.fit={FIT}",
    f"attacks=[{{name: forward_kl, fit: {FIT}}}, "
    f"{{name: forward_kl, variant: pairs=8, pairs: 8, on_clean: false, fit: {FIT}}}]",
    "probe={information: 30, subspace: [pocket/small]}",
    *(f"defenses.{number}.training.fit={FIT}" for number in (0, 1)),
    *(f"defenses.{number}.training.truth=16" for number in (0, 1)),
    *(f"defenses.{number}.training.rarest=0.5" for number in (0, 1)),
    "defenses.0.training.refreshes=1",
    "defenses.0.training.refresh_traces=20",
    "defenses.0.training.held_out=4",
    # No round can be refused, so the strength that is reported is the one that was asked for.
    "defenses.0.training.floor={from_pass: 1, rounds: 1, problems: 10, greedy: 0.01, "
    "sampled: 0.01}",
    "defenses.0.lesson={traces: 16, attacks: [{name: forward_kl, fit: {steps: 2, batch_size: 4}}, "
    "{name: reverse_kl, fit: {steps: 2, batch_size: 4}}]}",
]


def run(folder: Path) -> tuple[dict[str, Any], str]:
    done = subprocess.run(
        [sys.executable, "-m", "workflows", "pipeline", "pocket_logits", *SMALL],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    # Ray's core announces the log level that it was told to use.
    assert "RAY_BACKEND_LOG_LEVEL" not in done.stdout + done.stderr
    return json.loads((folder / "runs/pocket_logits/results.json").read_text()), done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logits")


@pytest.fixture(scope="module")
def first(folder: Path) -> tuple[dict[str, Any], str]:
    return run(folder)


def described(folder: Path, kind: str, file: str) -> list[dict[str, Any]]:
    """What every stage of a kind says about itself, with the inputs that decided it."""
    found = []
    for path in sorted((folder / "runs/cache").glob(f"{kind}-*")):
        inputs = json.loads((path / "stage.json").read_text())["inputs"]
        found.append({**json.loads((path / file).read_text()), "inputs": inputs})
    return found


def test_the_rows_are_the_promised_ones(first: tuple[dict[str, Any], str]) -> None:
    rows = first[0]["rows"]
    columns = ("role", "model", "defense", "attack", "variant", "decoding")
    accuracy = [tuple(row[key] for key in columns) for row in rows if row["metric"] == "accuracy"]
    assert len(set(accuracy)) == len(accuracy)
    teachers = {
        ("teacher", "teacher", defense, "none", "none", decoding)
        for defense in ("none", "cmi", "style_only")
        for decoding in ("greedy", "sampled@1")
    }
    students = {
        ("student", "small", defense, attack, variant, "greedy")
        for defense, attack, variant in (
            ("none", "none", "none"),
            ("none", "sft_only", "none"),
            ("none", "text_sft", "none"),
            ("none", "forward_kl", "none"),
            ("cmi", "text_sft", "none"),
            ("cmi", "forward_kl", "none"),
            ("cmi", "forward_kl", "pairs=8"),
            # Only to compare with: no variants.
            ("style_only", "text_sft", "none"),
            ("style_only", "forward_kl", "none"),
        )
    }
    assert set(accuracy) == teachers | students
    strengths = {row["defense"]: row["strength"] for row in rows if row["role"] == "student"}
    assert strengths == {"none": 0.0, "cmi": 0.1, "style_only": 1e-9}
    information = {row["defense"]: row for row in rows if row["metric"] == "information"}
    assert information.keys() == {"none", "cmi", "style_only"}
    assert all(row["value"] > 0 and row["n"] > 100 for row in information.values())
    sizes = {row["metric"]: row["value"] for row in rows if row["role"] == "suspect"}
    assert sizes == {
        "hidden size recovered, open API": 96,
        "hidden size recovered, guarded API": 0,
    }


def test_the_reader_is_told_and_shown(first: tuple[dict[str, Any], str], folder: Path) -> None:
    place = folder / "runs/pocket_logits"
    (note,) = first[0]["run"]["notes"]
    assert note.startswith("Hidden size of pocket/small, through the top 5 logprobs")
    plots = {plot["name"]: plot for plot in json.loads((place / "plots.json").read_text())}
    assert set(plots) == {
        "divergences",
        "head_terms_1_cmi",
        "head_terms_2_style_only",
        "inversion",
        "information",
    }
    terms = {line["label"]: line for line in plots["head_terms_1_cmi"]["lines"]}
    # Two passes of three steps.
    assert terms["loss"]["x"] == [1, 2, 3, 4, 5, 6]
    assert terms["cosine"]["y"][0] == pytest.approx(1.0, abs=1e-4)
    page = (place / "report.html").read_text()
    for name, plot in plots.items():
        assert (place / "figures" / f"{name}.png").stat().st_size > 5000
        assert plot["title"] in page
    assert note.split(":")[0] in page


def test_each_stage_was_given_what_belongs_to_it(
    first: tuple[dict[str, Any], str], folder: Path
) -> None:
    heads = described(folder, "head", "head.json")
    assert sorted(len(head["rounds"]) for head in heads) == [0, 0, 1]
    (searched,) = [head for head in heads if head["rounds"]]
    assert searched["rounds"][0]["accepted"]
    assert searched["rounds"][0]["score"] <= 1
    assert not searched["inputs"]["keeps_floor"]
    # Of a style's control the proxies are as they come; the others have had their lesson.
    proxies = {tuple(head["inputs"]["proxies"]) for head in heads}
    assert len(proxies) == 2
    students = described(folder, "student", "student.json")
    assert len(students) == 8 + 2
    asked = [item for item in students if item["inputs"]["teacher"]]
    assert len(asked) == 4 + 2
    assert [item["inputs"]["attack"]["name"] for item in students].count("reverse_kl") == 1
    (undone,) = [item for item in asked if item["inputs"]["snapshot"]]
    assert undone["inputs"]["attack"]["variant"] == "pairs=8"
    # Half of the right traces are left, of some forty.
    (chosen,) = (folder / "runs/cache").glob("rarest-*")
    scores: dict[str, float] = {}
    for file in (chosen / "scores").glob("*.json"):
        scores |= json.loads(file.read_text())
    from azeotrope.traces import read_traces

    kept = {trace.id for trace in read_traces(chosen)}
    assert kept == set(sorted(scores, key=scores.__getitem__)[: len(scores) // 2])
    assert 10 <= len(kept) <= 20


def test_a_second_run_is_served_from_the_cache(
    first: tuple[dict[str, Any], str], folder: Path
) -> None:
    before = sorted(path.name for path in (folder / "runs/cache").iterdir())
    document, said = run(folder)
    assert document == first[0]
    assert "starting Ray" in first[1]
    assert "starting Ray" not in said
    assert sorted(path.name for path in (folder / "runs/cache").iterdir()) == before
