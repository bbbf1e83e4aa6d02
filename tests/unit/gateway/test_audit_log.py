"""The audit log: one private line per decision, no token, no text, and an error if it fails."""

import json
import multiprocessing
import os
import resource
import shutil
import stat
import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from store_kinds import Clock

from gateway.records.audit_log import AuditLog, AuditLogError, digest, redact

NOON = datetime(2026, 3, 4, 12, 0, 0, 250_000, UTC).timestamp()
DAY_S = 86_400.0
TOKEN = "az-" + "Ab3_-" * 8 + "xyz"


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def file(folder: Path, day: str, pid: int | None = None) -> Path:
    return folder / f"audit-{day}-{pid or os.getpid()}.jsonl"


def test_a_decision_is_one_line(tmp_path: Path) -> None:
    with AuditLog(tmp_path, clock=Clock(NOON)) as log:
        log.write("k1", "request", prompt_tokens=3, stream=True, code=None)
        log.write("k2", "extraction", reasons=["60 of 60\nask"], score=0.84)
    assert lines(file(tmp_path, "2026-03-04")) == [
        {
            "at": "2026-03-04T12:00:00.250+00:00",
            "key": "k1",
            "event": "request",
            "prompt_tokens": 3,
            "stream": True,
            "code": None,
        },
        {
            "at": "2026-03-04T12:00:00.250+00:00",
            "key": "k2",
            "event": "extraction",
            "reasons": ["60 of 60\nask"],
            "score": 0.84,
        },
    ]


def test_the_clock_of_the_machine_is_the_default(tmp_path: Path) -> None:
    before = datetime.now(UTC)
    with AuditLog(tmp_path) as log:
        log.write("k", "request")
    [path] = tmp_path.iterdir()
    at = datetime.fromisoformat(lines(path)[0]["at"])
    assert abs((at - before).total_seconds()) < 5


def test_files_become_private(tmp_path: Path) -> None:
    folder, clock = tmp_path / "new" / "logs", Clock(NOON - DAY_S)
    with AuditLog(folder, clock=clock) as log:
        old = file(folder, "2026-03-04")
        old.write_text('{"of": "an earlier process"}\n')
        old.chmod(0o644)
        clock.now = NOON
        log.write("k", "request")
    assert len(lines(old)) == 2
    for path in folder.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_each_day_has_its_file(tmp_path: Path) -> None:
    clock = Clock(NOON)
    with AuditLog(tmp_path, clock=clock) as log:
        log.write("k", "request")
        clock.now += DAY_S
        log.write("k", "request")
        log.write("k", "refused")
    assert len(lines(file(tmp_path, "2026-03-04"))) == 1
    assert len(lines(file(tmp_path, "2026-03-05"))) == 2


def _write_in_a_child(log: AuditLog) -> None:
    log.write("child", "request")


def test_a_fork_writes_to_its_own_file(tmp_path: Path) -> None:
    with AuditLog(tmp_path, clock=Clock(NOON)) as log:
        log.write("parent", "request")
        child = multiprocessing.get_context("fork").Process(target=_write_in_a_child, args=(log,))
        child.start()
        child.join(30)
        assert child.exitcode == 0
        log.write("parent", "request")
    assert child.pid is not None
    assert [line["key"] for line in lines(file(tmp_path, "2026-03-04"))] == ["parent"] * 2
    assert [line["key"] for line in lines(file(tmp_path, "2026-03-04", child.pid))] == ["child"]


def test_lines_of_several_threads_do_not_mix(tmp_path: Path) -> None:
    with AuditLog(tmp_path, clock=Clock(NOON)) as log:

        def write(name: int) -> None:
            for number in range(50):
                log.write(f"k{name}", "request", number=number)

        threads = [threading.Thread(target=write, args=(name,)) for name in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    records = lines(file(tmp_path, "2026-03-04"))
    for name in range(4):
        assert [line["number"] for line in records if line["key"] == f"k{name}"] == list(range(50))


def test_no_token_gets_in(tmp_path: Path) -> None:
    with AuditLog(tmp_path, clock=Clock(NOON)) as log:
        log.write(
            TOKEN, TOKEN, reasons=[f"the key {TOKEN}, or {TOKEN[:9]}"], code=TOKEN,
            **{TOKEN: 1},
        )  # fmt: skip
    text = file(tmp_path, "2026-03-04").read_text()
    assert "Ab3" not in text
    [line] = lines(file(tmp_path, "2026-03-04"))
    assert line["reasons"] == ["the key az-[redacted], or az-[redacted]"]
    assert line["key"] == line["code"] == "az-[redacted]"


@given(st.text(max_size=30), st.text(max_size=30))
def test_redaction_leaves_no_part_of_a_token(before: str, after: str) -> None:
    redacted = redact(f"{before} {TOKEN} {after}")
    assert TOKEN[3:] not in redacted
    assert redact(redacted) == redacted


def test_no_text_gets_in(tmp_path: Path) -> None:
    prompt = "Please, what is my disease called?"
    with AuditLog(tmp_path, clock=Clock(NOON)) as log:
        log.write(prompt, "request", code=prompt, param="messages[0].content")
        log.write("k", "request", reasons=["x" * 1000])
    first, second = lines(file(tmp_path, "2026-03-04"))
    assert first["key"] == first["code"] == digest(prompt)
    assert digest(prompt).startswith("blake2b:")
    assert first["param"] == "messages[0].content"
    assert second["reasons"] == ["x" * 300]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_are_finite(tmp_path: Path, value: float) -> None:
    with (
        AuditLog(tmp_path, clock=Clock(NOON)) as log,
        pytest.raises(ValueError, match="number must be a finite"),
    ):
        log.write("k", "request", number=value)


def test_a_reserved_name_is_refused(tmp_path: Path) -> None:
    with (
        AuditLog(tmp_path, clock=Clock(NOON)) as log,
        pytest.raises(ValueError, match="key cannot be the name"),
    ):
        log.write("k", "request", key="other")


def test_a_log_that_cannot_be_opened_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AuditLogError, match="cannot be written"):
        AuditLog(tmp_path / "file")
    today = datetime.now(UTC).date().isoformat()
    file(tmp_path, today).mkdir()
    with pytest.raises(AuditLogError, match="Is a directory"):
        AuditLog(tmp_path)


def test_a_symbolic_link_is_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("")
    folder = tmp_path / "logs"
    folder.mkdir()
    clock = Clock(NOON - DAY_S)
    with AuditLog(folder, clock=clock) as log:
        file(folder, "2026-03-04").symlink_to(target)
        clock.now = NOON
        with pytest.raises(AuditLogError, match="cannot be written"):
            log.write("k", "request")
    assert target.read_text() == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full device here")
def test_a_full_disk_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AuditLog, "_is_at", lambda *_: True)
    with AuditLog(tmp_path, clock=Clock(NOON)) as log:
        log.write("k", "request")
        full = os.open("/dev/full", os.O_WRONLY)
        assert log._descriptor is not None
        os.dup2(full, log._descriptor)
        os.close(full)
        with pytest.raises(AuditLogError, match="No space left"):
            log.write("k", "request")


def test_a_file_that_was_moved_away_is_created_again(tmp_path: Path) -> None:
    with AuditLog(tmp_path, clock=Clock(NOON)) as log:
        log.write("k", "request")
        (path,) = tmp_path.glob("audit-2026-03-04-*")
        path.rename(tmp_path / "old.jsonl")
        log.write("k", "refused")
        assert '"refused"' in path.read_text()
        assert '"refused"' not in (tmp_path / "old.jsonl").read_text()
        log.check()
        shutil.rmtree(tmp_path)
        with pytest.raises(AuditLogError, match="cannot be written"):
            log.check()


def _write_to_a_limit(log: AuditLog, limit: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        log.write("k", "request")
    except AuditLogError as error:
        os._exit(7 if "only 10 of" in str(error) else 1)


def test_a_partial_line_is_an_error(tmp_path: Path) -> None:
    with AuditLog(tmp_path, clock=Clock(NOON)) as log:
        fork = multiprocessing.get_context("fork")
        child = fork.Process(target=_write_to_a_limit, args=(log, 10))
        child.start()
        child.join(30)
        assert child.exitcode == 7


def test_a_closed_log_refuses_to_write(tmp_path: Path) -> None:
    log = AuditLog(tmp_path)
    log.close()
    log.close()
    with pytest.raises(ValueError, match="closed"):
        log.write("k", "request")


def test_only_old_files_of_the_log_are_removed(tmp_path: Path) -> None:
    old, edge, new = (file(tmp_path, f"2026-03-0{day}", 7) for day in (1, 2, 3))
    foreign = tmp_path / "audit-2020-01-01.jsonl"
    for path in (old, edge, new, foreign):
        path.write_text("")
    with AuditLog(tmp_path, clock=Clock(NOON)) as log:
        log.write("k", "request")
        assert log.prune(2) == [old]
        assert edge.exists()
        assert new.exists()
        assert foreign.exists()
        log.write("k", "request")
        with pytest.raises(ValueError, match="at least 1 day, got 0"):
            log.prune(0)
    today = [path for path in tmp_path.iterdir() if path.name.endswith(f"-{os.getpid()}.jsonl")]
    assert sum(len(lines(path)) for path in today) == 2
