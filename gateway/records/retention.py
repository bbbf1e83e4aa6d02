"""How long decisions are kept: old files of the audit log are removed, again every day."""

import asyncio
import logging
from collections.abc import Callable

from gateway.records.audit_log import AuditLog

logger = logging.getLogger(__name__)
DAY_S = 86_400.0


async def keep_for(
    log: AuditLog, days: Callable[[], int | None], *, every_s: float = DAY_S
) -> None:
    """Remove what is older than so many days, now and once a day, until it is cancelled.

    A folder that cannot be cleared is logged and tried again the next day: it is no reason to
    stop serving, for decisions are still written down.

    Args:
        days: asked each time, because a policy may change; None keeps all.
    """
    while True:
        wanted = days()
        if wanted is not None:
            try:
                removed = await asyncio.to_thread(log.prune, wanted)
            except OSError as error:
                logger.error("old audit logs cannot be removed: %s", error)
            else:
                if removed:
                    logger.info("removed %d audit logs older than %d days", len(removed), wanted)
        await asyncio.sleep(every_s)
