"""Bodies of requests in, server-sent events out, for all routes of the gateway."""

import json
from typing import Any

from fastapi import Request

from gateway.accounts.database import StoreError
from gateway.errors import ApiError
from gateway.records.audit_log import AuditLogError
from gateway.refusals import store_failed

EVENT_STREAM = "text/event-stream"
LAST_EVENT = b"data: [DONE]\n\n"
"""The line by which OpenAI's protocol ends a stream; it is not JSON."""
FAILURES = (ApiError, StoreError, AuditLogError)
"""What can fail after the status line was sent, and is then reported by an event."""


async def read_body(request: Request, most_bytes: int) -> bytes:
    """The body of a request.

    The length is checked while the body arrives. The header `content-length` is the client's own
    claim, and chunked bodies have none.

    Raises:
        ApiError: 413 if it has more than `most_bytes` bytes.
    """
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > most_bytes:
            raise ApiError(413, f"the body has more than {most_bytes} bytes", code="too_large")
    return bytes(body)


def event(data: dict[str, Any], name: str | None = None) -> bytes:
    """One server-sent event.

    Args:
        name: the type of the event. OpenAI's protocol has none; the playground's has.
    """
    # Line breaks of the data are escaped by JSON, so one `data:` line holds all of it.
    line = json.dumps(data, ensure_ascii=False, allow_nan=False)
    kind = f"event: {name}\n" if name else ""
    return f"{kind}data: {line}\n\n".encode()


def error_body(error: ApiError | StoreError | AuditLogError) -> dict[str, Any]:
    """The JSON that reports one of `FAILURES` to a client."""
    refusal = error if isinstance(error, ApiError) else store_failed(error)
    return refusal.body()
