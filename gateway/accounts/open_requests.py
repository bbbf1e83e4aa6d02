"""Requests under way in one replica, and their bill: what they wrote is never lost."""

import asyncio
import logging
import secrets
from collections.abc import Coroutine
from typing import Any

from gateway.accounts.database import StoreError
from gateway.accounts.ledger import Ledger
from gateway.accounts.quotas import Limits, Refusal, Standing

logger = logging.getLogger(__name__)
HEARTBEAT_S = 1.0
LEASE_S = 10.0
"""A replica that has not been heard of for so long is dead, and others settle its requests."""


class OpenRequests:
    """Reserves, counts and settles. While anything is open the ledger hears of it each second."""

    def __init__(self, ledger: Ledger) -> None:
        self.owner = f"gateway-{secrets.token_hex(6)}"
        self._ledger = ledger
        self._written: dict[str, int] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._beating: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        return len(self._written)

    async def reserve(
        self, key: str, request: str, *, prompt: int, completion: int, slots: int, limits: Limits
    ) -> Standing | Refusal:
        """Open a request, unless its account (`key`) has not so much left."""
        found = await asyncio.to_thread(
            self._ledger.reserve,
            key,
            request,
            prompt=prompt,
            completion=completion,
            slots=slots,
            limits=limits,
            owner=self.owner,
            lease_s=LEASE_S,
        )
        if isinstance(found, Standing):
            self._written[request] = 0
            if self._beating is None or self._beating.done():
                self._beating = self._spawn(self._beat())
        return found

    def add(self, request: str, tokens: int) -> None:
        """Count tokens that were written for an open request."""
        if request in self._written:
            self._written[request] += tokens

    def written(self, request: str) -> int:
        return self._written.get(request, 0)

    def settle(self, request: str) -> int | None:
        """Close a request; gives its completion tokens, or None if it was closed before.

        Whoever waits for the answer may be cancelled at this moment; the bill is written anyway.
        """
        tokens = self._written.pop(request, None)
        if tokens is not None:
            self._spawn(asyncio.to_thread(self._ledger.settle, request, tokens))
        return tokens

    async def close(self) -> None:
        """Wait for bills that are being written."""
        if self._beating is not None:
            self._beating.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=LEASE_S)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            if not self._written:
                return
            written = dict(self._written)
            try:
                await asyncio.to_thread(self._ledger.progress, self.owner, written, lease_s=LEASE_S)
            except StoreError as error:
                # The lease is longer than a beat: the next one may be in time still.
                logger.warning("the ledger did not hear of open requests: %s", error)

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            # The lease runs out, and whoever comes next settles at what was last heard.
            logger.error("the ledger could not be written", exc_info=task.exception())
