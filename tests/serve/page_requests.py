"""Requests to the page at `/` and its routes, for tests."""

import asyncio
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2
from fastapi import FastAPI

from azeotrope.tasks import PocketConfig, TaskConfig
from gateway.http.app import create_app
from gateway.http.playground import add_page
from gateway.service import Gateway

if TYPE_CHECKING:
    pass

TASK = PocketConfig()


def with_page(
    gateway: Gateway, *, task: TaskConfig = TASK, demo: bool = False, report: Path | None = None
) -> FastAPI:
    app = create_app(gateway)
    app.state.gateway = gateway
    add_page(app, gateway, task, demo=demo, report=report)
    return app


def send(
    app: FastAPI, method: str, path: str, *, client: str = "127.0.0.1", **more: Any
) -> httpx2.Response:
    """One request, without a server. The event loop runs until its bill is written."""

    async def go() -> httpx2.Response:
        transport = httpx2.ASGITransport(app, client=(client, 1234))
        async with httpx2.AsyncClient(
            transport=transport, base_url="http://127.0.0.1:8000"
        ) as http:
            response = await http.request(method, path, **more)
        await app.state.gateway.open.close()
        return response

    return asyncio.run(go())


def ask(app: FastAPI, side: str = "defended", problem: Any = 0, **more: Any) -> httpx2.Response:
    body = {"problem": problem, "side": side}
    return send(app, "POST", "/playground/ask", json=body, **more)


def events(response: httpx2.Response) -> list[tuple[str, dict[str, Any]]]:
    """The events of an answer of the page: their types and their data."""
    matches = re.findall(r"event: (\w+)\ndata: (.*)\n\n", response.text)
    return [(name, json.loads(data)) for name, data in matches]


def text_of(response: httpx2.Response) -> str:
    assert response.status_code == 200, response.text
    return "".join(data["text"] for name, data in events(response) if name == "text")


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}
