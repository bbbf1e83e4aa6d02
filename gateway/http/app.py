"""The gateway's HTTP side: a few routes, and an error in OpenAI's shape for everything else."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from azeotrope import __version__
from gateway.accounts.database import StoreError
from gateway.admitted import Admitted
from gateway.answers.pieces import AnswerPiece, join
from gateway.errors import ApiError
from gateway.http.requests import ApiRequest, ChatRequest, CompletionRequest
from gateway.http.schema import describe, describe_operation
from gateway.http.transport import (
    EVENT_STREAM,
    FAILURES,
    LAST_EVENT,
    error_body,
    event,
    read_body,
)
from gateway.records.audit_log import AuditLogError
from gateway.records.retention import keep_for
from gateway.refusals import store_failed
from gateway.service import Gateway

CLIENT_CLOSED_REQUEST = 499
"""nginx's status for a client that went away. It reaches nobody but the access log."""


def create_app(gateway: Gateway) -> FastAPI:
    """The gateway as an ASGI application, without interactive documentation and without CORS."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        retention = asyncio.create_task(
            keep_for(gateway.log, lambda: gateway.policy.audit.retention_days)
        )
        yield
        retention.cancel()
        await gateway.close()

    app = FastAPI(
        title="Azeotrope",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        # A redirect is not an error, and its address would repeat the Host header of the request.
        redirect_slashes=False,
        lifespan=lifespan,
    )
    _handle_errors(app)
    _add_completions(app, gateway)
    _add_models(app, gateway)
    _add_operations(app, gateway)
    describe(app)
    return app


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body(), error.status, headers=error.headers)

    @app.exception_handler(HTTPException)
    async def unknown_route(request: Request, error: HTTPException) -> JSONResponse:
        route = f"{request.method} {request.url.path}"[:200]
        refusal = ApiError(error.status_code, f"{route}: {error.detail}", code="not_found")
        return JSONResponse(refusal.body(), refusal.status, headers=error.headers)

    @app.exception_handler(StoreError)
    @app.exception_handler(AuditLogError)
    async def store_unavailable(_: Request, error: Exception) -> JSONResponse:
        # Fail closed: without keys, quotas and the log no request is answered.
        refusal = store_failed(error)
        return JSONResponse(refusal.body(), refusal.status, headers=refusal.headers)

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> JSONResponse:
        # Starlette logs the traceback. It may hold prompts or weights' paths, so clients get none.
        failed = ApiError(500, "the gateway failed; the request was not answered", kind="api_error")
        return JSONResponse(failed.body(), failed.status)


def _add_completions(app: FastAPI, gateway: Gateway) -> None:
    async def answer(request: Request, kind: type[ApiRequest]) -> Response:
        address = request.client.host if request.client else ""
        admitted = await gateway.admit(
            kind, request.headers, lambda most_bytes: read_body(request, most_bytes), address
        )
        pieces = gateway.answer(admitted)
        if not admitted.stream:
            return await _unless_disconnected(request, _whole(admitted, pieces))
        # The status line leaves with the first event. Waiting for the first token here means that
        # an engine which fails before it is still reported by a status.
        first = await anext(pieces)
        return StreamingResponse(
            _events(admitted, first, pieces),
            media_type=EVENT_STREAM,
            headers={**admitted.headers, "cache-control": "no-store"},
        )

    @app.post("/v1/chat/completions", openapi_extra=describe_operation(ChatRequest))
    async def chat(request: Request) -> Response:
        """Continue a conversation."""
        return await answer(request, ChatRequest)

    @app.post("/v1/completions", openapi_extra=describe_operation(CompletionRequest))
    async def completions(request: Request) -> Response:
        """Continue a text."""
        return await answer(request, CompletionRequest)


async def _unless_disconnected(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """The result of the work, which is cancelled if the client disconnects first.

    Uvicorn does not cancel a handler whose client went away, so without this the engine would
    write the whole answer and the key would be billed for it. The body must have been read before,
    because its messages come from the same channel as the disconnect.
    """

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = answer, watch = asyncio.create_task(work), asyncio.create_task(disconnected())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return await answer if answer.done() else Response(status_code=CLIENT_CLOSED_REQUEST)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(answer, watch, return_exceptions=True)


async def _whole(
    admitted: Admitted, pieces: AsyncGenerator[tuple[int, AnswerPiece]]
) -> JSONResponse:
    parts: list[list[AnswerPiece]] = [[] for _ in admitted.plan.requests]
    async for number, piece in pieces:
        parts[number].append(piece)
    answers = [join(part) for part in parts]
    tokens = sum(answer.engine_tokens for answer in answers)
    cost = admitted.shown_usage(tokens)
    return JSONResponse(admitted.format.whole(answers, cost), headers=dict(admitted.headers))


async def _events(
    admitted: Admitted,
    first: tuple[int, AnswerPiece],
    pieces: AsyncGenerator[tuple[int, AnswerPiece]],
) -> AsyncIterator[bytes]:
    """Server-sent events. An error after the first one is an event too, and ends the stream."""
    started: set[int] = set()

    def chunk(number: int, piece: AnswerPiece) -> bytes:
        # In OpenAI's protocol only the first event of each choice names the role.
        is_first = number not in started
        started.add(number)
        return event(admitted.format.part(number, piece, first=is_first))

    tokens = first[1].engine_tokens
    try:
        # Closing the pieces stops the engine if the client goes away in the middle of the stream.
        async with contextlib.aclosing(pieces):
            yield chunk(*first)
            async for number, piece in pieces:
                tokens += piece.engine_tokens
                # An empty piece says that a hidden token was written. An event for it would show
                # how fast and how long the hidden reasoning is.
                if piece.text or piece.tokens or piece.finish:
                    yield chunk(number, piece)
    except FAILURES as error:
        # OpenAI's clients raise when an event has `error`. No usage and no `[DONE]` follow it.
        yield event(error_body(error))
        return
    if admitted.wants_usage:
        yield event(admitted.format.totals(admitted.shown_usage(tokens)))
    yield LAST_EVENT


def _add_models(app: FastAPI, gateway: Gateway) -> None:
    def described(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": 0, "owned_by": "azeotrope"}

    secured = {"security": [{"key": []}]}

    @app.get("/v1/models", openapi_extra=secured)
    async def models(request: Request) -> JSONResponse:
        """The models that this key may request."""
        key = await gateway.authenticate(request.headers)
        names = gateway.models(key)
        return JSONResponse({"object": "list", "data": [described(name) for name in names]})

    @app.get("/v1/models/{name:path}", openapi_extra=secured)
    async def model(request: Request, name: str) -> JSONResponse:
        """One model."""
        key = await gateway.authenticate(request.headers)
        if name not in gateway.models(key):
            raise ApiError(404, f"no model {name[:80]!r} for this key", code="model_not_found")
        return JSONResponse(described(name))


def _add_operations(app: FastAPI, gateway: Gateway) -> None:
    @app.get("/healthz")
    async def alive() -> JSONResponse:
        """Whether this process runs; if not, restart it."""
        return JSONResponse({"status": "alive"})

    @app.get("/readyz", openapi_extra={"responses": {"503": {"description": "not ready"}}})
    async def ready() -> JSONResponse:
        """Whether this process can answer requests; if not, send it none."""
        ok = await gateway.is_ready()
        return JSONResponse({"status": "ready" if ok else "not ready"}, 200 if ok else 503)

    @app.get("/metrics", openapi_extra={"security": [{"key": []}]})
    async def metrics(request: Request) -> Response:
        """Metrics for Prometheus, for keys with the scope `metrics`."""
        await gateway.authenticate(request.headers, "metrics")
        page, kind = gateway.metrics.page()
        return Response(page, media_type=kind)
