"""A living replica reports its open requests, also after the ledger failed for a moment."""

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest

from gateway.accounts import open_requests
from gateway.accounts.database import StoreError
from gateway.accounts.ledger import Reservation
from gateway.accounts.open_requests import OpenRequests
from gateway.accounts.quotas import Limits, Standing
from gateway.accounts.sqlite_ledger import LEDGER_FILE, SqliteLedger

WIDE = Limits(1000, 1_000_000, 10_000_000, 1000)


class FailingLedger(SqliteLedger):
    """Fails at the first reports, and remembers the others."""

    def __init__(self, path: Path, failures: int) -> None:
        super().__init__(path)
        self.failures, self.reports = failures, []

    def progress(self, owner: str, written: Any, *, lease_s: float) -> None:
        if self.failures:
            self.failures -= 1
            raise StoreError("the disk is busy")
        super().progress(owner, written, lease_s=lease_s)
        self.reports.append(dict(written))


def test_reports_continue_after_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(open_requests, "HEARTBEAT_S", 0.01)
    ledger = FailingLedger(tmp_path / LEDGER_FILE, failures=2)

    async def run() -> None:
        opened = OpenRequests(ledger)
        answer = await opened.reserve(Reservation("k", "r", 1, 9, 1), WIDE)
        assert isinstance(answer, Standing)
        opened.add("r", 3)
        async with asyncio.timeout(5):
            while not ledger.reports:
                await asyncio.sleep(0.01)
        assert opened.settle("r") == 3
        await opened.close()

    with caplog.at_level(logging.WARNING):
        asyncio.run(run())
    assert ledger.reports[0] == {"r": 3}
    assert caplog.text.count("the disk is busy") == 2
    (row,) = ledger.usage()
    assert (row.completion_tokens, row.open_requests) == (3, 0)


class LockedLedger(SqliteLedger):
    """Cannot be written for a while: another process holds it."""

    def __init__(self, path: Path, refusals: int) -> None:
        super().__init__(path)
        self.refusals = refusals

    def settle(self, request: str, tokens: int) -> None:
        if self.refusals:
            self.refusals -= 1
            raise StoreError("database is locked")
        super().settle(request, tokens)


def test_a_bill_is_tried_until_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_requests, "HEARTBEAT_S", 0.01)
    monkeypatch.setattr(open_requests, "RETRY_S", 0.01)
    ledger = LockedLedger(tmp_path / LEDGER_FILE, refusals=5)

    async def run() -> None:
        opened = OpenRequests(ledger)
        answer = await opened.reserve(Reservation("k", "r", 1, 9, 1), WIDE)
        assert isinstance(answer, Standing)
        opened.add("r", 7)
        assert opened.settle("r") == 7
        await opened.close()

    asyncio.run(run())
    (row,) = ledger.usage()
    assert (row.completion_tokens, row.open_requests) == (7, 0)
