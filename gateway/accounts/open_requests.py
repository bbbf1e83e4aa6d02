"""The open requests of one replica: their quota is reserved, and what they wrote is billed."""

import asyncio
import logging
import secrets
from collections.abc import Coroutine
from typing import Any

from gateway.accounts.database import StoreError
from gateway.accounts.ledger import Ledger, Reservation
from gateway.accounts.quotas import Limits, Refusal, Standing

logger = logging.getLogger(__name__)
HEARTBEAT_S = 1.0
RETRY_S, MOST_RETRY_S = 0.1, 2.0
"""The first and the longest pause before a bill is tried again."""
LEASE_S = 10.0
"""A replica that is silent for so long counts as dead, and others settle its requests. Ten
heartbeats, so that a few slow or failed ones end nothing."""


class OpenRequests:
    """Reserves, counts and settles; reports to the ledger every second while a request is open."""

    def __init__(self, ledger: Ledger) -> None:
        self.owner = f"gateway-{secrets.token_hex(6)}"
        self._ledger = ledger
        self._written: dict[str, int] = {}
        self._billing: dict[str, int] = {}
        """Closed requests whose bill is not written yet."""
        # The event loop holds only weak references to its tasks. Without this set a bill could be
        # garbage-collected before it is written.
        self._tasks: set[asyncio.Task[Any]] = set()
        self._heartbeat: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        return len(self._written)

    async def reserve(self, reservation: Reservation, limits: Limits) -> Standing | Refusal:
        """Open a request, unless a limit of its account does not allow it."""
        answer = await asyncio.to_thread(
            self._ledger.reserve, reservation, limits, owner=self.owner, lease_s=LEASE_S
        )
        if isinstance(answer, Standing):
            self._written[reservation.request] = 0
            if self._heartbeat is None or self._heartbeat.done():
                self._heartbeat = self._spawn(self._report())
        return answer

    def add(self, request: str, tokens: int) -> None:
        """Count tokens that were written for an open request."""
        if request in self._written:
            self._written[request] += tokens

    def settle(self, request: str) -> int | None:
        """Close a request; returns its completion tokens, or None if it was closed before.

        This does not wait for the ledger: the client may have disconnected and the caller may be
        cancelled at its next `await`, but the bill must be written.
        """
        tokens = self._written.pop(request, None)
        if tokens is not None:
            self._billing[request] = tokens
            self._spawn(self._bill(request, tokens))
        return tokens

    async def _bill(self, request: str, tokens: int) -> None:
        """Write a bill, however long the store is locked or away.

        Reports go on meanwhile, so that the lease does not run out, and so that another process
        would settle at the right number if this one died.
        """
        delay = RETRY_S
        while True:
            try:
                await asyncio.to_thread(self._ledger.settle, request, tokens)
            except StoreError as error:
                logger.warning("a bill is not written yet, and is tried again: %s", error)
                await asyncio.sleep(delay)
                delay = min(2 * delay, MOST_RETRY_S)
            else:
                self._billing.pop(request, None)
                return

    async def close(self) -> None:
        """Wait for bills that are being written."""
        if self._heartbeat is not None:
            self._heartbeat.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=LEASE_S)

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            if not self._written and not self._billing:
                return
            # A copy: the event loop goes on counting while the thread writes.
            written = {**self._billing, **self._written}
            try:
                await asyncio.to_thread(self._ledger.progress, self.owner, written, lease_s=LEASE_S)
            except StoreError as error:
                # The lease is longer than a heartbeat, so the next report may still be in time.
                logger.warning("the ledger did not receive a report of open requests: %s", error)

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            # The lease will run out, and another process settles at the last report.
            logger.error("the ledger could not be written", exc_info=task.exception())
