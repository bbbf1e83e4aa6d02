"""The cache: named by its inputs, whole or absent, built once, and continued after a kill."""

import json
import threading
import time
from pathlib import Path

import pytest

from experiment import stages
from experiment.stages import RECORD, VERSIONS, Cache, Stage

INPUTS = {"model": "m", "count": 3, "sampling": {"temperature": 1.0, "top_p": 1.0}}


def test_the_same_inputs_are_the_same_stage(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    one = cache.stage("traces", **INPUTS)
    other = Cache(tmp_path).stage("traces", **dict(reversed(INPUTS.items())))
    assert one == other
    assert one.path.name == f"traces-{one.key}"
    # A name may itself be an input.
    assert cache.stage("traces", name="a") != cache.stage("traces", name="b")


@pytest.mark.parametrize(
    "changed",
    [
        {"model": "n"},
        {"count": 4},
        {"count": "3"},
        {"sampling": {"temperature": 1.0, "top_p": 0.9}},
        {"sampling": {"temperature": 1.0}},
        {"more": None},
    ],
)
def test_any_change_is_another_stage(changed: dict, tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    assert cache.stage("traces", **{**INPUTS, **changed}).key != cache.stage("traces", **INPUTS).key


def test_the_kind_and_its_version_count_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(tmp_path)
    keys = {cache.stage(name, **INPUTS).key for name in VERSIONS}
    assert len(keys) == len(VERSIONS)
    monkeypatch.setitem(stages.VERSIONS, "traces", VERSIONS["traces"] + 1)
    assert cache.stage("traces", **INPUTS).key not in keys


def test_a_stage_is_built_once_and_says_what_it_is(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "new" / "cache")
    stage = cache.stage("text", **INPUTS)
    built: list[Path] = []

    def make(folder: Path) -> None:
        built.append(folder)
        (folder / "result").write_text("42")

    assert not stage.is_done
    for _ in range(3):
        assert cache.build(stage, make) == stage
    assert len(built) == 1
    assert (stage.path / "result").read_text() == "42"
    record = json.loads((stage.path / RECORD).read_text())
    assert record["inputs"] == {"stage": "text", "version": VERSIONS["text"], **INPUTS}
    assert stage.seconds >= 0
    assert not stage.partial.exists()


def test_a_build_that_dies_is_not_a_stage_and_is_continued(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    stage = cache.stage("head", **INPUTS)

    def dies(folder: Path) -> None:
        (folder / "half").write_text("kept")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.build(stage, dies)
    assert not stage.is_done
    assert not stage.path.exists()
    assert stage.partial.is_dir()

    def goes_on(folder: Path) -> None:
        assert folder == stage.partial
        (folder / "whole").write_text((folder / "half").read_text() + " and finished")

    cache.build(stage, goes_on)
    assert stage.is_done
    assert (stage.path / "whole").read_text() == "kept and finished"


def test_two_threads_build_a_stage_once(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    stage = cache.stage("student", **INPUTS)
    entered: list[str] = []
    seen: list[str] = []
    inside = threading.Event()

    def make(folder: Path) -> None:
        entered.append(threading.current_thread().name)
        inside.set()
        time.sleep(0.2)
        (folder / "result").write_text("42")

    def work() -> None:
        # A cache of its own, as another process would have.
        found = Cache(tmp_path).build(stage, make)
        seen.append((found.path / "result").read_text())

    first, second = threading.Thread(target=work), threading.Thread(target=work)
    first.start()
    assert inside.wait(5)
    second.start()
    for thread in (first, second):
        thread.join(10)
    assert len(entered) == 1
    assert seen == ["42", "42"]


def test_locks_are_taken_in_one_order_and_only_for_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(tmp_path)
    wanted = [cache.stage("student", seed=seed) for seed in range(4)]
    done = cache.build(wanted[2], lambda folder: None)
    taken: list[str] = []
    honest = stages.FileLock

    def watched(path: Path):
        taken.append(Path(path).name)
        return honest(path)

    monkeypatch.setattr(stages, "FileLock", watched)

    def claimed(items: list[Stage]) -> tuple[list[str], set[str]]:
        taken.clear()
        with cache.claim(items) as missing:
            return list(taken), {stage.key for stage in missing}

    forward, backward = claimed(wanted), claimed(wanted[::-1])
    assert forward == backward
    assert forward[0] == sorted(forward[0])
    assert forward[1] == {stage.key for stage in wanted} - {done.key}
    assert len(forward[0]) == 3


def test_of_several_claimed_stages_each_is_finished_by_itself(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    wanted = [cache.stage("student", seed=seed) for seed in range(3)]

    def fails_at_the_second() -> None:
        with cache.claim(wanted) as missing:
            assert missing == wanted
            cache.finish(missing[0], 1.0)
            raise RuntimeError("the second one failed")

    with pytest.raises(RuntimeError, match="the second"):
        fails_at_the_second()
    assert [stage.is_done for stage in wanted] == [True, False, False]
    with cache.claim(wanted) as missing:
        assert missing == wanted[1:]
