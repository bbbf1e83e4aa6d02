"""How long decisions are kept: old files of the audit log are deleted once a day."""

import asyncio
import logging
from collections.abc import Callable

from gateway.records.audit_log import AuditLog

logger = logging.getLogger(__name__)
DAY_S = 86_400.0


async def keep_for(log: AuditLog, days: Callable[[], int | None]) -> None:
    """Delete the files that are older than so many days, now and once a day, until cancelled.

    If files cannot be deleted, the error is logged and the next day tries again. Serving goes on:
    decisions are still recorded, and only the deletion is late.

    Args:
        days: called each time, because a policy may change; None keeps all files.
    """
    while True:
        limit = days()
        if limit is not None:
            try:
                removed = await asyncio.to_thread(log.prune, limit)
            except OSError as error:
                logger.error("old audit logs cannot be removed: %s", error)
            else:
                if removed:
                    logger.info("removed %d audit logs older than %d days", len(removed), limit)
        await asyncio.sleep(DAY_S)
