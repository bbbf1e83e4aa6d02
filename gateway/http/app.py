"""The gateway's HTTP side: a few routes, and a refusal in OpenAI's shape for everything else."""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException

from azeotrope import __version__
from gateway.accounts.database import StoreError
from gateway.admitted import Admitted
from gateway.errors import ApiError
from gateway.http.requests import ChatRequest, CompletionRequest, Sampled
from gateway.http.responses import Said, usage
from gateway.records.audit_log import AuditLogError
from gateway.records.retention import keep_for
from gateway.refusals import store_failed
from gateway.service import Gateway

_REFERENCE = "#/components/schemas/{model}"
_BEARER = {"key": {"type": "http", "scheme": "bearer"}}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def create_app(gateway: Gateway) -> FastAPI:
    """The gateway as an ASGI application. Interactive documentation and CORS are left out."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        days = asyncio.create_task(
            keep_for(gateway.log, lambda: gateway.policy.audit.retention_days)
        )
        yield
        days.cancel()
        await gateway.close()

    app = FastAPI(
        title="Azeotrope",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        # A redirect is no refusal, and its address would repeat the Host header that was sent.
        redirect_slashes=False,
        lifespan=lifespan,
    )
    _handle_errors(app)
    _completions(app, gateway)
    _models(app, gateway)
    _operations(app, gateway)
    _describe(app)
    return app


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body(), error.status, headers=error.headers)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> JSONResponse:
        place = f"{request.method} {request.url.path}"[:200]
        known = ApiError(error.status_code, f"{place}: {error.detail}", code="not_found")
        return JSONResponse(known.body(), known.status, headers=error.headers)

    @app.exception_handler(StoreError)
    @app.exception_handler(AuditLogError)
    async def closed(_: Request, error: Exception) -> JSONResponse:
        shut = store_failed(error)
        return JSONResponse(shut.body(), shut.status, headers=shut.headers)

    @app.exception_handler(Exception)
    async def broken(_: Request, error: Exception) -> JSONResponse:
        # Starlette logs the traceback; none of it goes outside.
        failed = ApiError(500, "the gateway failed; the request was not answered", kind="api_error")
        return JSONResponse(failed.body(), failed.status)


def _completions(app: FastAPI, gateway: Gateway) -> None:
    async def answer(request: Request, kind: type[Sampled]) -> Response:
        address = request.client.host if request.client else ""
        admitted = await gateway.admit(kind, request.headers, _reader(request), address)
        pieces = gateway.answer(admitted)
        if not admitted.stream:
            return await _unless_left(request, _whole(gateway, admitted, pieces))
        # What fails before the first token is still an ordinary error with a status.
        first = await anext(pieces)
        return StreamingResponse(
            _events(gateway, admitted, first, pieces),
            media_type="text/event-stream",
            headers={**admitted.headers, "cache-control": "no-store"},
        )

    def operation(kind: type[Sampled]) -> dict[str, Any]:
        schema = {"$ref": _REFERENCE.format(model=kind.__name__)}
        return {
            "security": [{"key": []}],
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": schema}},
            },
            "responses": {
                "200": {"description": "the answer, or its events if `stream` is true"},
                **{
                    status: {
                        "description": text,
                        "content": {"application/json": {"schema": _ERROR}},
                    }
                    for status, text in _REFUSALS.items()
                },
            },
        }

    @app.post("/v1/chat/completions", openapi_extra=operation(ChatRequest))
    async def chat(request: Request) -> Response:
        """Continue a conversation."""
        return await answer(request, ChatRequest)

    @app.post("/v1/completions", openapi_extra=operation(CompletionRequest))
    async def completions(request: Request) -> Response:
        """Continue a text."""
        return await answer(request, CompletionRequest)


_REFUSALS = {
    "400": "a value is not allowed",
    "401": "no valid key",
    "403": "the key may not do this",
    "404": "no such model",
    "408": "the body did not arrive in time",
    "413": "the body is too large",
    "422": "a field is unknown",
    "429": "a quota is used up",
    "503": "too busy, or the engine failed; see Retry-After",
}


async def _unless_left(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """What the work makes, unless the client goes away first: then it is stopped.

    Nobody reads the answer then. The body must have been read before.
    """

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = answer, watch = asyncio.create_task(work), asyncio.create_task(left())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return await answer if answer.done() else Response(status_code=499)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(answer, watch, return_exceptions=True)


async def _whole(
    gateway: Gateway, admitted: Admitted, pieces: AsyncGenerator[tuple[int, Said]]
) -> JSONResponse:
    parts: list[list[Said]] = [[] for _ in admitted.plan.requests]
    tokens = 0
    async for number, said in pieces:
        parts[number].append(said)
        tokens = gateway.written(admitted)
    joined = [
        Said(
            "".join(piece.text for piece in part),
            tuple(token for piece in part for token in piece.tokens),
            part[-1].finish,
            tuple(offset for piece in part for offset in piece.offsets),
        )
        for part in parts
    ]
    cost = usage(admitted.plan.prompt_tokens, tokens)
    return JSONResponse(admitted.format.whole(joined, cost), headers=dict(admitted.headers))


async def _events(
    gateway: Gateway,
    admitted: Admitted,
    first: tuple[int, Said],
    pieces: AsyncGenerator[tuple[int, Said]],
) -> AsyncIterator[bytes]:
    """Server-sent events; an error after the first one is an event too, and ends the stream."""
    begun: set[int] = set()

    def event(number: int, said: Said) -> bytes:
        new = number not in begun
        begun.add(number)
        return _event(admitted.format.part(number, said, first=new))

    try:
        async with contextlib.aclosing(pieces):
            yield event(*first)
            tokens = gateway.written(admitted)
            async for number, said in pieces:
                tokens = gateway.written(admitted)
                if said.text or said.tokens or said.finish:
                    yield event(number, said)
    except ApiError as error:
        yield _event(error.body())
        return
    except (StoreError, AuditLogError) as error:
        yield _event(store_failed(error).body())
        return
    if admitted.wants_usage:
        yield _event(admitted.format.totals(usage(admitted.plan.prompt_tokens, tokens)))
    yield b"data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(data, ensure_ascii=False, allow_nan=False)}\n\n".encode()


def _reader(request: Request) -> Callable[[int], Awaitable[bytes]]:
    async def read(most: int) -> bytes:
        found = bytearray()
        async for part in request.stream():
            found += part
            if len(found) > most:
                raise ApiError(413, f"the body has more than {most} bytes", code="too_large")
        return bytes(found)

    return read


def _models(app: FastAPI, gateway: Gateway) -> None:
    def described(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": 0, "owned_by": "azeotrope"}

    secured = {"security": [{"key": []}]}

    @app.get("/v1/models", openapi_extra=secured)
    async def models(request: Request) -> JSONResponse:
        """The models that the key can ask for."""
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


def _operations(app: FastAPI, gateway: Gateway) -> None:
    @app.get("/healthz")
    async def alive() -> JSONResponse:
        """Whether this process runs; restart it if not."""
        return JSONResponse({"status": "alive"})

    @app.get("/readyz", openapi_extra={"responses": {"503": {"description": "not yet"}}})
    async def ready() -> JSONResponse:
        """Whether a request can be answered; send none here if not."""
        ok = await gateway.is_ready()
        return JSONResponse({"status": "ready" if ok else "not ready"}, 200 if ok else 503)

    @app.get("/metrics", openapi_extra={"security": [{"key": []}]})
    async def metrics(request: Request) -> Response:
        """Numbers for Prometheus, for keys with the scope `metrics`."""
        await gateway.authenticate(request.headers, "metrics")
        page, kind = gateway.metrics.page()
        return Response(page, media_type=kind)


def _describe(app: FastAPI) -> None:
    """Add the bodies to the OpenAPI document: they are read by hand, for errors in one shape."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
            kinds = [(kind, "validation") for kind in (ChatRequest, CompletionRequest)]
            _, bodies = models_json_schema(kinds, ref_template=_REFERENCE)  # type: ignore[arg-type]
            components = schema.setdefault("components", {})
            components.setdefault("schemas", {}).update(bodies["$defs"])
            components["securitySchemes"] = _BEARER
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]
