"""A stage is published only if it holds every file and every row that was asked for."""

from pathlib import Path

import pytest

from actors import pool
from actors.generator import GenerationJob, GenerationWorker
from azeotrope.traces import read_traces, write_traces
from experiment import settings
from experiment.display import Display
from experiment.plan import ProblemRange, TraceRequest
from experiment.steps import Steps
from experiment.steps.complete import IncompleteStageError


@pytest.fixture
def steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Steps:
    """Steps whose workers run in this process."""

    def run_here(jobs, chain, resources, *, on_done=None) -> None:
        for text in jobs:
            run(text)

    def run(text: str) -> None:
        GenerationWorker()({"job": [text]})

    monkeypatch.setattr(pool, "run_jobs", run_here)
    config = settings.load("pocket_demo", [f"cache={tmp_path / 'cache'}", "shard=4"])
    made = Steps.of(config, Display())
    monkeypatch.setattr(made.context, "start_ray", lambda: None)
    return made


def request(steps: Steps) -> TraceRequest:
    sampling = steps.config.greedy.model_copy(update={"max_new_tokens": 4})
    return TraceRequest("pocket/teacher", "teacher", ProblemRange("test", 12), sampling)


def test_all_shards_make_a_stage(steps: Steps) -> None:
    [stage] = steps.traces.generate([request(steps)])
    assert stage.is_done
    assert len(read_traces(stage.path)) == 12


def test_a_worker_that_writes_elsewhere_publishes_nothing(
    steps: Steps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a node with a disk of its own, whose worker reports that it is done."""

    def lose_some(jobs, chain, resources, *, on_done=None) -> None:
        for number, text in enumerate(jobs):
            if number != 1:
                GenerationWorker()({"job": [text]})

    monkeypatch.setattr(pool, "run_jobs", lose_some)
    [stage] = [steps.traces.stage_of(request(steps))]
    with pytest.raises(IncompleteStageError, match=r"lacks 1 of 3 files .* nothing was published"):
        steps.traces.generate([request(steps)])
    assert not stage.is_done


def test_a_short_shard_publishes_nothing(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(jobs, chain, resources, *, on_done=None) -> None:
        for text in jobs:
            GenerationWorker()({"job": [text]})
            path = Path(GenerationJob.model_validate_json(text).output)
            write_traces(path, read_traces(path)[:-1])

    monkeypatch.setattr(pool, "run_jobs", cut)
    with pytest.raises(IncompleteStageError, match="has 3 rows where 4 were asked for"):
        steps.traces.generate([request(steps)])
    assert not steps.traces.stage_of(request(steps)).is_done
