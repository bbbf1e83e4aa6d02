"""Traces: who they are, what a file may hold, and how they are rewritten and collected."""

import errno
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from azeotrope import models, tasks
from azeotrope.collect import Origin, collect
from azeotrope.defenses import answers_only
from azeotrope.defenses.base import FinishedText, RewriteContext
from azeotrope.generation import Sampling
from azeotrope.tasks import PocketConfig, Problem
from azeotrope.tokens import Boundary, without_reasoning
from azeotrope.traces import (
    Trace,
    fitting,
    ground_truth,
    read_traces,
    row_seed,
    trace_id,
    write_traces,
)

PROBLEM = Problem("sums", "train", 3, "one and two?", "3", "one and two make 3\n#### 3")
BOUNDARY = Boundary()


def trace(identity: str = "a", **changes: object) -> Trace:
    base = Trace(
        id=identity,
        problem="sums/train/3",
        template="plain-1",
        sample=0,
        question="one and two?",
        reference="3",
        text="<think> 1 + 2 = 3. </think> #### 3",
        prompt_ids=(1, 2),
        completion_ids=(5, 6, 7),
        finished=True,
        correct=True,
        model="teacher",
        defense="none",
        decoding="greedy",
        seed=(1 << 62) + 1,
    )
    return replace(base, **changes)


def test_an_id_depends_on_every_part_and_on_nothing_else() -> None:
    ids = {
        trace_id(PROBLEM, "plain-1", 0),
        trace_id(replace(PROBLEM, dataset="others"), "plain-1", 0),
        trace_id(replace(PROBLEM, split="test"), "plain-1", 0),
        trace_id(replace(PROBLEM, row=4), "plain-1", 0),
        trace_id(PROBLEM, "plain-2", 0),
        trace_id(PROBLEM, "plain-1", 1),
    }
    assert len(ids) == 6
    reworded = replace(PROBLEM, question="?", answer="4", solution="#### 4")
    assert trace_id(reworded, "plain-1", 0) == trace_id(PROBLEM, "plain-1", 0)
    # Parts do not run into each other: row 1 of sample 11 is not row 11 of sample 1.
    assert trace_id(replace(PROBLEM, row=1), "t\n1", 1) != trace_id(
        replace(PROBLEM, row=1), "t", 11
    )


def test_seeds_differ_by_row_and_by_run() -> None:
    seeds = {row_seed(identity, seed) for identity in ("a", "b", "1:a") for seed in range(50)}
    assert len(seeds) == 150
    assert all(0 <= seed < 1 << 63 for seed in seeds)
    assert row_seed("a", 0) == row_seed("a", 0)


def test_a_file_gives_back_what_was_written(tmp_path: Path) -> None:
    written = [
        trace("a"),
        trace("b", prompt_ids=(), completion_ids=(), finished=False, correct=False),
        trace("c", text="with\n\nlines, ünïcode and 'quotes'", sample=7),
    ]
    write_traces(tmp_path / "one.parquet", written)
    assert read_traces(tmp_path / "one.parquet") == written
    write_traces(tmp_path / "two.parquet", [trace("d")])
    assert read_traces(tmp_path) == [*written, trace("d")]


def test_an_id_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"1 trace ids more than once, first a"):
        write_traces(tmp_path / "one.parquet", [trace("a"), trace("b"), trace("a")])
    assert list(tmp_path.iterdir()) == []
    write_traces(tmp_path / "one.parquet", [trace("a")])
    write_traces(tmp_path / "two.parquet", [trace("a")])
    with pytest.raises(ValueError, match=r"1 trace ids more than once, first a"):
        read_traces(tmp_path)


def test_a_file_of_something_else_says_what_it_lacks(tmp_path: Path) -> None:
    table = pa.table({"id": ["a"], "text": ["b"], "problem": ["c"]})
    pq.write_table(table, tmp_path / "other.parquet")
    with pytest.raises(ValueError, match=r"is not a trace file: it lacks template, sample, quest"):
        read_traces(tmp_path)
    for place in (tmp_path / "nowhere", tmp_path / "nowhere.parquet"):
        with pytest.raises(FileNotFoundError, match="expected Parquet files"):
            read_traces(place)


def test_a_full_disk_leaves_finished_files_and_no_half_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_traces(tmp_path / "one.parquet", [trace("a")])

    def full(table: pa.Table, where: Path, **options: object) -> None:
        Path(where).write_bytes(b"PAR1 and not much more")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pq, "write_table", full)
        for name in ("one.parquet", "two.parquet"):
            with pytest.raises(OSError, match=r"No space left on device\); finished files") as e:
                write_traces(tmp_path / name, [trace("b")])
            assert e.value.errno == errno.ENOSPC
            assert name in str(e.value)
    assert [path.name for path in tmp_path.iterdir()] == ["one.parquet"]
    assert read_traces(tmp_path) == [trace("a")]


def test_ground_truth_is_the_reference_solution_and_may_be_wrong() -> None:
    task = tasks.build(PocketConfig(slip=0.25))
    given = task.problems("train", 80)
    found = ground_truth(task, given)
    assert [item.text for item in found] == [problem.solution for problem in given]
    assert [item.id for item in found] == [trace_id(p, task.template, 0) for p in given]
    assert {item.model for item in found} == {"ground_truth"}
    assert [item.correct for item in found] == [
        item.text.endswith(f"#### {item.reference}") for item in found
    ]
    # Cheap labels have slips in them, and a slip can cancel out, so some but not all are wrong.
    assert 20 < sum(item.correct for item in found) < 75
    perfect = tasks.build(PocketConfig(slip=0.0))
    assert all(item.correct for item in ground_truth(perfect, perfect.problems("train", 80)))


def test_hiding_the_reasoning_keeps_the_answer_checkable() -> None:
    task = tasks.build(PocketConfig(slip=0.25))
    defense = answers_only.build(answers_only.Config())
    traces = ground_truth(task, task.problems("train", 40))
    texts = [FinishedText(trace.text) for trace in traces]
    results = defense.rewrite(texts, RewriteContext(BOUNDARY))
    assert {result.status for result in results} == {"changed"}
    for item, result in zip(traces, results, strict=True):
        hidden = result.text
        assert "<think>" not in hidden
        assert len(hidden.split()) == 2
        assert task.check(hidden, item.reference) == item.correct


@pytest.fixture(scope="module")
def teacher() -> models.Loaded:
    return models.load("pocket/teacher", device="cpu")


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
def test_traces_are_the_same_however_the_problems_are_dealt(
    teacher: models.Loaded, temperature: float
) -> None:
    task = tasks.build(PocketConfig())
    problems = list(task.problems("train", 8))
    sampling = Sampling(temperature=temperature)

    def answers(part: list[Problem], shard: int | None = None, **origin: int) -> list[Trace]:
        return collect(teacher, task, part, sampling, origin=Origin(**origin), shard=shard)

    whole = answers(problems)
    assert answers(problems[:4]) + answers(problems[4:]) == whole
    assert answers(problems, shard=3) == whole
    odd, even = answers(problems[1::2]), answers(problems[::2])
    assert sorted(odd + even, key=lambda item: item.id) == sorted(whole, key=lambda item: item.id)
    assert answers(problems[::-1])[::-1] == whole
    assert [trace.problem for trace in whole] == [problem.id for problem in problems]
    assert all(task.check(trace.text, trace.reference) == trace.correct for trace in whole)
    texts = [trace.text for trace in whole]
    for changed in (answers(problems, seed=1), answers(problems, sample=1)):
        assert ([trace.text for trace in changed] == texts) == (temperature == 0)


def test_traces_that_cannot_be_learned_from_are_counted_and_left_out() -> None:
    task = tasks.build(PocketConfig())
    tokenizer = models.load_tokenizer("pocket/teacher")
    truth = ground_truth(task, task.problems("train", 6))
    cut = [truth[0].with_text("", False), truth[1].with_text("  \n", False)]
    long = truth[2].with_text("so 2 . " * 60, False)
    kept, dropped = fitting([*cut, long, *truth], tokenizer, task, Boundary(), 128)
    assert kept == truth
    assert dropped == (2, 1)
    kept, dropped = fitting(
        [*cut, long, *truth], tokenizer, task, Boundary(), 128, drops_long=False
    )
    assert kept == [long, *truth]
    assert dropped == (2, 0)


def test_a_completion_cut_in_its_reasoning_is_empty_without_it() -> None:
    """One such completion must not end a run under answers_only."""
    task = tasks.build(PocketConfig())
    truth = ground_truth(task, task.problems("train", 2))
    cut = replace(truth[0], text="<think> at first 2 . then", finished=False, correct=False)
    shown = [cut.with_text(without_reasoning(cut.text, Boundary()), False), truth[1]]
    kept, dropped = fitting(shown, models.load_tokenizer("pocket/teacher"), task, Boundary(), 128)
    assert kept == [truth[1]]
    assert dropped.empty == 1
