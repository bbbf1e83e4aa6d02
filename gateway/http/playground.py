"""The page at `/` and its routes. The rules about its questions are in `showcase`."""

import asyncio
import base64
import contextlib
import dataclasses
import hashlib
import re
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from pydantic import ValidationError

from azeotrope.tasks import TaskConfig
from gateway.errors import ApiError
from gateway.http.requests import refusal
from gateway.http.showcase import CheckedAnswer, PageQuestion, Showcase
from gateway.http.transport import EVENT_STREAM, FAILURES, error_body, event, read_body
from gateway.loopback import is_loopback
from gateway.service import Gateway

PAGE = Path(__file__).with_name("page.html")
MOST_BYTES = 1024
"""The largest body of a question, which is a number and a word."""

_HEADERS = {
    "cache-control": "no-store",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
}
# A report contains its figures and its style, and none of it has to run. Its text includes traces,
# which a model wrote, so scripts in it must not run either.
_REPORT_POLICY = "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def add_page(
    app: FastAPI, gateway: Gateway, task: TaskConfig, *, demo: bool, report: Path | None
) -> None:
    """Add the page, the routes that it calls, and the report that it links to.

    Args:
        task: every visitor of the page sees its first test problems, without the answers.
        demo: show the undefended teacher beside the defended one, and require no key.
        report: an HTML file, read at each request. Every visitor of the page may read it.
    """
    page = PAGE.read_text(encoding="utf-8")
    policy = page_policy(page)
    showcase = Showcase(gateway, task, demo=demo)

    def check_visitor(request: Request) -> None:
        if demo:
            check_local(request)

    @app.get("/", include_in_schema=False)
    async def show(request: Request) -> Response:
        check_visitor(request)
        return HTMLResponse(page, headers={**_HEADERS, "content-security-policy": policy})

    @app.get("/playground/problems", include_in_schema=False)
    async def problems(request: Request) -> Response:
        check_visitor(request)
        listing = {**showcase.listing(), "report": report is not None and report.is_file()}
        return JSONResponse(listing, headers=_HEADERS)

    @app.post("/playground/ask", include_in_schema=False)
    async def ask(request: Request) -> Response:
        check_visitor(request)
        parts = await showcase.answer(await read_question(request), request)
        return StreamingResponse(_events(parts), media_type=EVENT_STREAM, headers=_HEADERS)

    @app.get("/report", include_in_schema=False)
    async def show_report(request: Request) -> Response:
        check_visitor(request)
        if report is None or not report.is_file():
            raise ApiError(404, "there is no report", code="not_found")
        html = await asyncio.to_thread(report.read_bytes)
        return HTMLResponse(html, headers={**_HEADERS, "content-security-policy": _REPORT_POLICY})


def page_policy(page: str) -> str:
    """The page's Content-Security-Policy, which allows its own style and script by their hashes."""

    def hashes(tag: str) -> str:
        parts = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = [hashlib.sha256(part.encode()).digest() for part in parts]
        return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'; require-trusted-types-for 'script'"
    )


def check_local(request: Request) -> None:
    """Refuse a demonstration to other machines, and to other sites in a browser on this machine.

    The second check is against DNS rebinding. Another site can point its own name at 127.0.0.1;
    the browser then counts it as the same origin as the page. The Host header still has that name.

    Raises:
        ApiError: 403.
    """
    client = request.client.host if request.client else ""
    if not (is_loopback(_host_name(request.headers.get("host", ""))) and is_loopback(client)):
        raise ApiError(
            403,
            "the demonstration is available on this machine only; open http://127.0.0.1 with the "
            "port of this server",
            kind="permission_error",
        )


async def read_question(request: Request) -> PageQuestion:
    """The body of a question.

    Raises:
        ApiError: 415 unless it is declared as JSON; 413 if it is too large; 422 for an unknown
            field; 400 for other errors.
    """
    # A browser sends bodies of other types to any site without asking. For JSON from another site
    # it first sends a preflight request, which this server does not answer.
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "content-type must be application/json", code="not_json")
    body = await read_body(request, MOST_BYTES)
    try:
        return PageQuestion.model_validate_json(body)
    except ValidationError as error:
        raise refusal(PageQuestion, error) from None


async def _events(parts: AsyncIterator[str | CheckedAnswer]) -> AsyncIterator[bytes]:
    """Server-sent events: `text` as it is written, then `verdict`, or `error` if that fails."""
    try:
        # Closing the parts stops the engine if the visitor goes away.
        async with contextlib.aclosing(parts):  # type: ignore[type-var]
            async for part in parts:
                if isinstance(part, CheckedAnswer):
                    yield event(dataclasses.asdict(part), "verdict")
                else:
                    yield event({"text": part}, "text")
    except FAILURES as error:
        yield event(error_body(error), "error")


def _host_name(header: str) -> str:
    """The name in a Host header, without the port; empty if the header is malformed."""
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return ""
