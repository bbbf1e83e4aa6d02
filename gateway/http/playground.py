"""The page at `/` and its routes. What can be asked there, and by whom, is in `showcase`."""

import asyncio
import base64
import contextlib
import dataclasses
import hashlib
import ipaddress
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from pydantic import ValidationError

from azeotrope.config import explain, path_text
from azeotrope.tasks import TaskConfig
from gateway.accounts.database import StoreError
from gateway.errors import ApiError
from gateway.http.showcase import Ask, Showcase, Verdict
from gateway.records.audit_log import AuditLogError
from gateway.refusals import store_failed
from gateway.service import Gateway

PAGE = Path(__file__).with_name("page.html")
MOST_BYTES = 1024
"""Of a question, which is a number and a word."""

_HEADERS = {
    "cache-control": "no-store",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
}
# A report has its figures and its style in itself, and nothing in it has to run.
_REPORT_POLICY = "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def add_page(
    app: FastAPI, gateway: Gateway, task: TaskConfig, *, demo: bool, report: Path | None
) -> None:
    """Add the page, what it asks for, and the report it links to.

    Args:
        task: its first test problems are shown to whoever opens the page, without their answers.
        demo: show the undefended teacher beside the defended one, and ask for no key.
        report: an HTML file, read at each request; whoever opens the page may read it.
    """
    page = PAGE.read_text(encoding="utf-8")
    policy = page_policy(page)
    showcase = Showcase(gateway, task, demo=demo)

    def admit(request: Request) -> None:
        if demo:
            check_local(request)

    @app.get("/", include_in_schema=False)
    async def show(request: Request) -> Response:
        admit(request)
        return HTMLResponse(page, headers={**_HEADERS, "content-security-policy": policy})

    @app.get("/playground/problems", include_in_schema=False)
    async def problems(request: Request) -> Response:
        admit(request)
        found = {**showcase.listing(), "report": report is not None and report.is_file()}
        return JSONResponse(found, headers=_HEADERS)

    @app.post("/playground/ask", include_in_schema=False)
    async def ask(request: Request) -> Response:
        admit(request)
        told = await showcase.answer(await read_ask(request), request)
        return StreamingResponse(_events(told), media_type="text/event-stream", headers=_HEADERS)

    @app.get("/report", include_in_schema=False)
    async def show_report(request: Request) -> Response:
        admit(request)
        if report is None or not report.is_file():
            raise ApiError(404, "there is no report here", code="not_found")
        found = await asyncio.to_thread(report.read_bytes)
        return HTMLResponse(found, headers={**_HEADERS, "content-security-policy": _REPORT_POLICY})


def page_policy(page: str) -> str:
    """The page's Content-Security-Policy: its own style and script by their hashes, no others."""

    def hashes(tag: str) -> str:
        parts = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        sums = [hashlib.sha256(part.encode()).digest() for part in parts]
        return " ".join(f"'sha256-{base64.b64encode(item).decode()}'" for item in sums)

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'; require-trusted-types-for 'script'"
    )


def check_local(request: Request) -> None:
    """Refuse a demonstration to other machines, and to other sites in this one's browser.

    A site may point its own name at this machine, and is then of one origin with the page; its
    name is what gives it away.

    Raises:
        ApiError: 403.
    """
    client = request.client.host if request.client else ""
    if not (_is_loopback(_name(request.headers.get("host", ""))) and _is_loopback(client)):
        raise ApiError(
            403,
            "the demonstration is for this machine alone; open http://127.0.0.1 and the port",
            kind="permission_error",
        )


async def read_ask(request: Request) -> Ask:
    """The body of a question.

    Raises:
        ApiError: 415 unless it is declared as JSON, for which a browser first asks here before it
            sends what another site wants; 413 if it is too large; 422 for an unknown field; 400
            for the rest.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "content-type must be application/json", code="not_json")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MOST_BYTES:
            raise ApiError(413, f"the body has more than {MOST_BYTES} bytes", code="too_large")
    try:
        return Ask.model_validate_json(bytes(body))
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False, include_input=False)
        reasons = explain(error, Ask, whole="body", show_values=False)
    unknown = [item for item in problems if item["type"] == "extra_forbidden"]
    path = path_text((unknown or problems)[0]["loc"])[:200]
    message = f"{reasons[:1000]}; a question has problem and side"
    raise ApiError(422 if unknown else 400, message, param=path or None)


async def _events(told: AsyncIterator[str | Verdict]) -> AsyncIterator[bytes]:
    """Server-sent events: `text` as it is written, then `verdict`, or `error` where it ends."""
    try:
        # Whoever goes away while it is written stops the engine too.
        async with contextlib.aclosing(told):  # type: ignore[type-var]
            async for item in told:
                if isinstance(item, Verdict):
                    yield _event("verdict", dataclasses.asdict(item))
                else:
                    yield _event("text", {"text": item})
    except ApiError as error:
        yield _event("error", error.body())
    except (StoreError, AuditLogError) as error:
        yield _event("error", store_failed(error).body())


def _event(name: str, data: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data, allow_nan=False)}\n\n".encode()


def _name(host: str) -> str:
    """Of a Host header, without the port; empty if it is none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
