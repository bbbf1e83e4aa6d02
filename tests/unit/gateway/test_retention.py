"""Old audit logs are removed when a gateway starts and every day after, by the current rules."""

import asyncio
import logging
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from azeotrope.config import ConfigError, build
from gateway.policy import Policy
from gateway.records import retention
from gateway.records.audit_log import AuditLog
from gateway.records.retention import keep_for


def old(folder: Path, days: int) -> Path:
    path = folder / f"audit-{datetime.now(UTC).date() - timedelta(days=days)}-7.jsonl"
    path.write_text("{}\n")
    return path


@pytest.fixture
def log(tmp_path: Path) -> Iterator[AuditLog]:
    with AuditLog(tmp_path) as log:
        yield log


@pytest.fixture(autouse=True)
def short_days(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "DAY_S", 0.01)


async def removed(path: Path) -> None:
    async with asyncio.timeout(5):
        while path.exists():
            await asyncio.sleep(0.01)


def test_files_are_removed_at_the_start_and_every_day(log: AuditLog, tmp_path: Path) -> None:
    ages = {days: old(tmp_path, days) for days in (0, 1, 5, 89, 91, 400)}
    rules = [Policy()]

    async def run() -> None:
        task = asyncio.create_task(keep_for(log, lambda: rules[0].audit.retention_days))
        await removed(ages[400])
        assert [days for days, path in ages.items() if path.exists()] == [0, 1, 5, 89]
        # New rules apply from the next day.
        rules[0] = build(Policy, {"audit": {"retention_days": 2}})
        await removed(ages[89])
        task.cancel()

    asyncio.run(run())
    assert [days for days, path in ages.items() if path.exists()] == [0, 1]
    log.write("k", "request")


def test_null_keeps_all_files(log: AuditLog, tmp_path: Path) -> None:
    path = old(tmp_path, 4000)
    called = asyncio.Event()

    def days() -> None:
        if called.is_set():
            raise asyncio.CancelledError
        called.set()

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(keep_for(log, days))
    assert path.exists()
    assert build(Policy, {"audit": {"retention_days": None}}).audit.retention_days is None
    with pytest.raises(ConfigError, match="retention_days"):
        build(Policy, {"audit": {"retention_days": 0}})


def test_a_file_that_cannot_be_removed_is_tried_again(
    log: AuditLog, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = old(tmp_path, 100)
    path.unlink()
    path.mkdir()

    async def run() -> None:
        task = asyncio.create_task(keep_for(log, lambda: 90))
        async with asyncio.timeout(5):
            while "cannot be removed" not in caplog.text:
                await asyncio.sleep(0.01)
        path.rmdir()
        path.write_text("")
        await removed(path)
        task.cancel()

    with caplog.at_level(logging.ERROR):
        asyncio.run(run())


def test_a_file_whose_name_is_no_day_remains(log: AuditLog, tmp_path: Path) -> None:
    path = tmp_path / "audit-2020-13-45-7.jsonl"
    path.write_text("")
    assert log.prune(1) == []
    assert path.exists()
