"""The cost of the gateway: an endpoint against its bare engine, and defended against undefended.

    python -m benchmarks.serving
    python -m benchmarks.serving --engine vllm --run runs/pocket_demo

The bare engine is the transformers engine behind a minimal server, or vLLM's own server. The
servers take turns and share the processors with their clients, so compare ratios, not rates.
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
from rich.progress import track
from rich.table import Table
from starlette.applications import Starlette
from starlette.responses import StreamingResponse
from starlette.routing import Route

from azeotrope import models
from azeotrope.engine.protocol import EngineRequest
from azeotrope.engine.transformers import TransformersEngine
from azeotrope.tasks import PocketConfig
from azeotrope.tasks.pocket import Pocket
from azeotrope.tokens import encode_prompt
from experiment.points import find_point

TEACHER = "pocket/teacher"
ROWS, MAX_TOKENS, PROBLEMS = 32, 64, 256
READY_S, STOP_S, WARM_UP_S = 300.0, 40.0, 1.0
LIMITS = ("requests_per_minute", "tokens_per_minute", "tokens_per_day", "concurrency")
VLLM_ENV = {
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
VLLM_ON_CPU = "--enforce-eager --dtype float32 --gpu-memory-utilization 0.3"
VLLM_CACHE = "--kv-cache-memory-bytes 67108864"
POLICY = {"tiers": {"standard": dict.fromkeys(LIMITS, 10**9)}, "in_flight": 1024}


@dataclass
class Server:
    """One of the three servers, and its measurements."""

    label: str
    url: str
    token: str | None = None
    chat: bool = True
    """Whether it speaks OpenAI's protocol; the minimal server has its own."""
    probe: str = "/readyz"
    rates: list[float] = field(default_factory=list)  # tokens per second, one per round
    answers: list[tuple[float, int]] = field(
        default_factory=list
    )  # ms to the first token, and tokens


def bare(port: int, teacher: str) -> None:
    """Run the engine behind a minimal server until the process is terminated."""
    torch.set_num_threads(1)  # as behind the gateway
    loaded = models.load(teacher)
    engine = TransformersEngine(loaded, rows=ROWS, queue=2 * ROWS)

    async def generate(request: Any) -> StreamingResponse:
        body = await request.json()
        prompt = encode_prompt(loaded.tokenizer, [{"role": "user", "content": body["text"]}])
        completion = EngineRequest("bench", prompt, body["max_tokens"], temperature=0.0)

        async def lines() -> AsyncIterator[str]:
            async for chunk in engine.generate(completion):
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
    """Wait until a server is ready. The minimal one has no probe, but answers only once it is."""
    until = time.monotonic() + READY_S
    while process.poll() is None and time.monotonic() < until:
        with suppress(httpx.TransportError):
            answer = httpx.get(server.url + server.probe, timeout=5, trust_env=False)
            if answer.is_success or not server.chat:
                return
        time.sleep(0.2)
    sys.exit(f"{server.label} did not start")


def stop(processes: "list[subprocess.Popen[bytes]]") -> None:
    """Terminate the processes, and kill those that do not end, with all their children."""
    running = [psutil.Process(process.pid) for process in processes if process.poll() is None]
    children = [child for process in running for child in process.children(recursive=True)]
    for process in running:
        process.terminate()
    alive = psutil.wait_procs(running, timeout=STOP_S)[1]
    for process in alive + psutil.wait_procs(children, timeout=5)[1]:
        with suppress(psutil.NoSuchProcess):
            process.kill()


Launch = tuple[Server, list[str], dict[str, str]]
"""A server, its command and its environment."""


def engine_alone(kind: str, teacher: str, port: int) -> Launch:
    """How to start a server without a gateway."""
    server = Server("B bare engine", f"http://127.0.0.1:{port}")
    if kind == "transformers":
        command = [sys.executable, "-m", __spec__.name, "--bare", str(port), "--teacher", teacher]
        return replace(server, chat=False), command, {**os.environ}
    options = f"--host 127.0.0.1 --port {port} --served-model-name bench --max-num-seqs {ROWS}"
    if not torch.cuda.is_available():
        options += f" {VLLM_ON_CPU} {VLLM_CACHE}"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", models.resolve(teacher), *options.split()]
    return replace(server, probe="/health"), command, {**os.environ, **VLLM_ENV}


def gateway(label: str, kind: str, source: str, folder: Path, port: int) -> Launch:
    """How to start a gateway with a store of its own."""
    folder.mkdir()
    (policy := folder / "policy.yaml").write_text(json.dumps(POLICY))  # JSON is YAML
    env = {**os.environ, "AZEOTROPE_HOME": str(folder / "home")}
    env.pop("RAY_ADDRESS", None)  # each starts its own Ray
    cli = [sys.executable, "-m", "workflows"]
    keys = [*cli, *"keys create bench --tier standard".split()]
    token = subprocess.check_output(keys, env=env, stderr=subprocess.DEVNULL, text=True).strip()
    settings = [f"port={port}", f"engine={kind}", f"rows={ROWS}", "name=bench"]
    command = [*cli, "serve", source, *settings, "gateways.most=1", "--policy", str(policy)]
    return Server(label, f"http://127.0.0.1:{port}", token), command, env


async def ask(client: httpx.AsyncClient, server: Server, question: str) -> tuple[float, int]:
    """One streamed answer: the time of its first token, and its number of tokens."""
    path, body = "/generate", {"text": question, "max_tokens": MAX_TOKENS}
    if server.chat:
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
            if server.chat:
                written = any(choice["delta"].get("content") for choice in event["choices"])
                tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
            else:
                written, tokens = bool(event), tokens + len(event)
            first = first or (time.perf_counter() if written else 0.0)
    return first, tokens


async def drive(server: Server, questions: list[str], clients: int, seconds: float) -> None:
    """Each client sends its next request as soon as it has an answer, until the time is over."""
    over, total = time.perf_counter() + seconds, 0.0

    async def one(number: int) -> None:
        nonlocal total
        async with httpx.AsyncClient(timeout=120, verify=False, trust_env=False) as client:
            while (sent := time.perf_counter()) < over:
                first, tokens = await ask(client, server, questions[number % len(questions)])
                # The last answer counts by the share of its time that was within the round.
                total += tokens * min(1.0, (over - sent) / (time.perf_counter() - sent))
                server.answers.append((1000 * (first - sent), tokens))
                number += clients

    await asyncio.gather(*(one(number) for number in range(clients)))
    server.rates.append(total / seconds)


def report(servers: list[Server]) -> None:
    """Print the rates and waiting times of all servers, and their ratios."""
    names = "server,tokens/s,per round,first token p50 ms,p95 ms,answers,tokens each"
    table = Table(*names.split(","))
    for server in servers:
        lengths = [tokens for _, tokens in server.answers]
        cells = [f"{at(server, part):,.1f}" for part in (0.5, 0.95)]
        cells += [f"{len(lengths):,}", f"{statistics.mean(lengths):.1f}"]
        rates = [f"{rate:,.0f}" for rate in (statistics.median(server.rates), *server.rates)]
        table.add_row(server.label, rates[0], ", ".join(rates[1:]), *cells)
    Console(width=150).print(table)
    gate, engine, defended = servers
    for name, over, under in (("A/B", gate, engine), ("C/A", defended, gate)):
        ratios = [rate / base for rate, base in zip(over.rates, under.rates, strict=True)]
        waits = [at(over, part) / at(under, part) for part in (0.5, 0.95)]
        print(
            f"{name}: {statistics.median(ratios):.2f} x tokens/s",
            [f"{x:.2f}" for x in ratios],
            f"first token: p50 {waits[0]:.1f} x, p95 {waits[1]:.1f} x",
        )


def at(server: Server, part: float) -> float:
    """A quantile of the time to the first token, in milliseconds."""
    firsts = sorted(first for first, _ in server.answers)
    return firsts[int(part * len(firsts))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for option, default in (("--clients", 16), ("--seconds", 6), ("--rounds", 3)):
        parser.add_argument(option, type=int, default=default)
    parser.add_argument("--engine", choices=("transformers", "vllm"), default="transformers")
    parser.add_argument("--run", help="the defended teacher of this run instead of a random one")
    for option, default in (("--bare", 0), ("--teacher", "")):
        parser.add_argument(option, type=type(default), default=default, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare:
        return bare(options.bare, options.teacher)
    teacher = (find_point(options.run).teacher if options.run else None) or TEACHER
    questions = [problem.question for problem in Pocket(PocketConfig()).problems("test", PROBLEMS)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
        ports = [(listener.getsockname()[1], listener.close())[0] for listener in sockets]
        if not options.run:
            defend(folder / "defended")
        defended = options.run or str(folder / "defended")
        launches = [
            gateway("A gateway", options.engine, teacher, folder / "a", ports[0]),
            engine_alone(options.engine, teacher, ports[1]),
            gateway("C defended", options.engine, defended, folder / "c", ports[2]),
        ]
        servers, processes = [server for server, _, _ in launches], []
        try:
            for _, command, env in launches:
                processes.append(subprocess.Popen(command, env=env, stdout=sys.stderr))
            for server, process in zip(servers, processes, strict=True):
                wait(server, process)
            for warm in [replace(server, rates=[], answers=[]) for server in servers]:
                asyncio.run(drive(warm, questions, options.clients, WARM_UP_S))
            turns = servers * options.rounds
            for server in track(turns, "turns", console=Console(stderr=True), transient=True):
                asyncio.run(drive(server, questions, options.clients, options.seconds))
            print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors")
        finally:
            stop(processes)
    report(servers)


if __name__ == "__main__":
    main()
