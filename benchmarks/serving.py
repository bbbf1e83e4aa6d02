"""What the gateway costs: the endpoint against its bare engine, defended against undefended.

    python -m benchmarks.serving

They take turns, and share the processors with their clients: ratios say more than figures.
"""

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
import uvicorn
from rich.console import Console
from rich.table import Table
from starlette.applications import Starlette
from starlette.responses import StreamingResponse
from starlette.routing import Route

from azeotrope import models
from azeotrope.batching import TransformersEngine
from azeotrope.gateway.engine import EngineRequest
from azeotrope.tasks.pocket import Pocket, PocketConfig
from azeotrope.tokens import encode_prompt

TEACHER = "pocket/teacher"
ROWS, MAX_TOKENS, PROBLEMS = 32, 64, 256
READY_S, STOP_S, WARM_UP_S = 300.0, 40.0, 1.0
LIMITS = ("requests_per_minute", "tokens_per_minute", "tokens_per_day", "concurrency")
POLICY = {"tiers": {"standard": dict.fromkeys(LIMITS, 10**9)}, "in_flight": 1024}


@dataclass
class Server:
    """One of the three, and what it did; without a token it is the bare engine."""

    label: str
    url: str
    token: str | None = None
    rates: list[float] = field(default_factory=list)  # tokens a second, of each round
    answers: list[tuple[float, int]] = field(default_factory=list)  # ms to the first, and tokens


def bare(port: int) -> None:
    """The engine behind a server that does nothing else; runs until it is asked to end."""
    torch.set_num_threads(1)  # as behind the gateway
    loaded = models.load(TEACHER)
    engine = TransformersEngine(loaded, rows=ROWS, queue=2 * ROWS)

    async def generate(request: Any) -> StreamingResponse:
        asked = await request.json()
        prompt = encode_prompt(loaded.tokenizer, [{"role": "user", "content": asked["text"]}])
        wanted = EngineRequest("bench", prompt, asked["max_tokens"], temperature=0.0)

        async def lines() -> AsyncIterator[str]:
            async for chunk in engine.generate(wanted):
                yield json.dumps([token.id for token in chunk.tokens]) + "\n"

        return StreamingResponse(lines(), media_type="application/x-ndjson")

    app = Starlette(routes=[Route("/generate", generate, methods=["POST"])])
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


def defend(folder: Path) -> None:
    """Save the teacher with a small low-rank change folded into its head."""
    torch.manual_seed(0)
    loaded = models.load(TEACHER)
    models.untie(loaded.model)
    weight = models.head_of(loaded.model).weight
    change = torch.randn(weight.shape[0], 8) @ torch.randn(8, weight.shape[1])
    weight.data += 0.02 * change * (weight.data.norm() / change.norm())
    models.save(loaded, folder)


def wait(server: Server, process: "subprocess.Popen[bytes]") -> None:
    """Until it is ready; the bare engine has no probe, but answers only once it has loaded."""
    until = time.monotonic() + READY_S
    while process.poll() is None and time.monotonic() < until:
        with suppress(httpx.TransportError):
            if httpx.get(f"{server.url}/readyz", timeout=5).is_success or not server.token:
                return
        time.sleep(0.2)
    sys.exit(f"{server.label} did not start")


def stop(processes: "list[subprocess.Popen[bytes]]") -> None:
    """Ask them to end, then make them; nothing that they started is left behind."""
    running = [psutil.Process(item.pid) for item in processes if item.poll() is None]
    children = [child for item in running for child in item.children(recursive=True)]
    for item in running:
        item.terminate()
    left = psutil.wait_procs(running, timeout=STOP_S)[1]
    for process in left + psutil.wait_procs(children, timeout=5)[1]:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def gateway(label: str, source: str, folder: Path, port: int) -> tuple[Server, list[str], dict]:
    """What serves a model with a store of its own: address and token, command, environment."""
    folder.mkdir()
    (policy := folder / "policy.yaml").write_text(json.dumps(POLICY))  # JSON is YAML
    env = {**os.environ, "AZEOTROPE_HOME": str(folder / "home")}
    env.pop("RAY_ADDRESS", None)  # each has its own Ray
    cli = [sys.executable, "-m", "workflows.cli"]
    keys = [*cli, *"keys create bench --tier standard".split()]
    token = subprocess.check_output(keys, env=env, stderr=subprocess.DEVNULL, text=True).strip()
    settings = [f"port={port}", "engine=transformers", f"rows={ROWS}", "name=bench"]
    command = [*cli, "serve", source, *settings, "gateways.most=1", "--policy", str(policy)]
    return Server(label, f"http://127.0.0.1:{port}", token), command, env


async def ask(client: httpx.AsyncClient, server: Server, question: str) -> tuple[float, int]:
    """One streamed answer: when its first token came, and how many it had."""
    path, body = "/generate", {"text": question, "max_tokens": MAX_TOKENS}
    if server.token:
        path, messages = "/v1/chat/completions", [{"role": "user", "content": question}]
        body = {"model": "bench", "messages": messages, "max_tokens": MAX_TOKENS}
        body |= {"temperature": 0.0, "stream": True, "stream_options": {"include_usage": True}}
    headers, first, tokens = {"authorization": f"Bearer {server.token}"}, 0.0, 0
    async with client.stream("POST", server.url + path, json=body, headers=headers) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if line in ("", "data: [DONE]"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if server.token:
                written = any(item["delta"].get("content") for item in event["choices"])
                tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
            else:
                written, tokens = bool(event), tokens + len(event)
            first = first or (time.perf_counter() if written else 0.0)
    return first, tokens


async def drive(server: Server, questions: list[str], clients: int, seconds: float) -> None:
    """Every client asks again as soon as it has its answer, until the time is over."""
    over, total = time.perf_counter() + seconds, 0.0

    async def one(number: int) -> None:
        nonlocal total
        async with httpx.AsyncClient(timeout=120, verify=False, trust_env=False) as client:
            while (sent := time.perf_counter()) < over:
                first, tokens = await ask(client, server, questions[number % len(questions)])
                # The last answer counts by the share of it that was within the time.
                total += tokens * min(1.0, (over - sent) / (time.perf_counter() - sent))
                server.answers.append((1000 * (first - sent), tokens))
                number += clients

    await asyncio.gather(*(one(number) for number in range(clients)))
    server.rates.append(total / seconds)


def show(servers: list[Server]) -> None:
    names = "server,tokens/s,of each round,first token p50 ms,p95 ms,answers,tokens each"
    table = Table(*names.split(","))
    for server in servers:
        firsts, lengths = zip(*sorted(server.answers), strict=True)
        cells = [f"{firsts[int(part * len(firsts))]:,.1f}" for part in (0.5, 0.95)]
        cells += [f"{len(firsts):,}", f"{statistics.mean(lengths):.1f}"]
        rates = [f"{rate:,.0f}" for rate in (statistics.median(server.rates), *server.rates)]
        table.add_row(server.label, rates[0], ", ".join(rates[1:]), *cells)
    Console(width=150).print(table)
    gate, engine, defended = servers
    for name, over, under in (("A/B", gate, engine), ("C/A", defended, gate)):
        ratios = [one / other for one, other in zip(over.rates, under.rates, strict=True)]
        print(f"{name}: {statistics.median(ratios):.2f} x tokens/s", [f"{x:.2f}" for x in ratios])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for option, usual in (("--clients", 16), ("--seconds", 6), ("--rounds", 3)):
        parser.add_argument(option, type=int, default=usual)
    parser.add_argument("--bare", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.bare:
        return bare(given.bare)
    questions = [item.question for item in Pocket(PocketConfig()).problems("test", PROBLEMS)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
        ports = [(item.getsockname()[1], item.close())[0] for item in sockets]
        defend(folder / "defended")
        engine = [sys.executable, "-m", __spec__.name, "--bare", str(ports[1])]
        plans = [(Server("B bare engine", f"http://127.0.0.1:{ports[1]}"), engine, {**os.environ})]
        plans.insert(0, gateway("A gateway", TEACHER, folder / "a", ports[0]))
        plans.append(gateway("C defended", str(folder / "defended"), folder / "c", ports[2]))
        servers, processes = [server for server, _, _ in plans], []
        try:
            for _, command, env in plans:
                processes.append(subprocess.Popen(command, env=env, stdout=sys.stderr))
            for server, process in zip(servers, processes, strict=True):
                wait(server, process)
            for warm in [replace(server, rates=[], answers=[]) for server in servers]:
                asyncio.run(drive(warm, questions, given.clients, WARM_UP_S))
            for server in servers * given.rounds:
                asyncio.run(drive(server, questions, given.clients, given.seconds))
            print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors")
        finally:
            stop(processes)
    show(servers)


if __name__ == "__main__":
    main()
