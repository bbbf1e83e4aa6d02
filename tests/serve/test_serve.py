"""The whole endpoint on Ray Serve: two gateways, two engines, many clients, and replicas that die.

How long the load lasts is AZEOTROPE_LOAD_S seconds (8 unless it is set); the engine is
AZEOTROPE_ENGINE (transformers unless it is set).
"""

import asyncio
import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest
import yaml
from openai import OpenAI
from served import Key, Served, served

from azeotrope import models, tasks
from azeotrope.generation import Sampling, generate
from azeotrope.tokens import decode, encode_prompt
from gateway.policy import Policy, Tier

logger = logging.getLogger(__name__)
CLIENTS = 64
PROBLEMS = 48
LOAD_S = float(os.environ.get("AZEOTROPE_LOAD_S", "8"))
ENGINE = os.environ.get("AZEOTROPE_ENGINE", "transformers")
DEATH_S = 8.0
"""The load before and after a replica's death."""
LEASE_S = 20.0
AT_ONCE_S = 10.0
"""The wait after a replica's death, on a machine that is busy with the load."""
TIGHT_TOKENS = 3000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("serve")
    big = {
        "requests_per_minute": 10**6,
        "tokens_per_minute": 10**9,
        "tokens_per_day": 10**9,
        "concurrency": 1000,
    }
    policy = Policy(
        tiers={
            "trusted": Tier(logprobs="topk", bans=True, **big),  # type: ignore[arg-type]
            "tight": Tier(**{**big, "tokens_per_minute": TIGHT_TOKENS}),  # type: ignore[arg-type]
        },
        in_flight=128,
    )
    (place / "policy.yaml").write_text(yaml.safe_dump(policy.dump()))
    return place


@pytest.fixture(scope="module")
def endpoint(folder: Path) -> Iterator[Served]:
    settings = (f"engine={ENGINE}", "gateways.least=2", "engines.least=2", "name=teacher")
    with served(folder, *settings) as running:
        yield running


@dataclass(frozen=True)
class Reference:
    question: str
    text: str
    tokens: int


@pytest.fixture(scope="module")
def references() -> list[Reference]:
    """Greedy answers of the library's own generation."""
    loaded = models.load("pocket/teacher", device="cpu")
    task = tasks.build(tasks.PocketConfig())
    problems = task.problems("test", PROBLEMS)
    prompts = [encode_prompt(loaded.tokenizer, task.messages(p.question)) for p in problems]
    eos = int(loaded.tokenizer.eos_token_id)  # type: ignore[arg-type]
    done = generate(
        loaded.model,
        prompts,
        Sampling(temperature=0.0, max_new_tokens=120),
        end_ids=(eos,),
        pad_id=0,
    )
    return [
        Reference(p.question, decode(loaded.tokenizer, d.ids), len(d.ids) - int(d.finished))
        for p, d in zip(problems, done, strict=True)
    ]


@dataclass
class Outcome:
    """The end of one request."""

    status: int
    text: str = ""
    tokens: int = 0
    error: str = ""
    right: bool = False
    ended: float = 0.0
    """On the monotonic clock."""


async def ask(client: httpx.AsyncClient, key: Key, reference: Reference) -> Outcome:
    """One streaming request, read to its end."""
    found = await _ask(client, key, reference)
    found.ended = time.monotonic()
    return found


async def _ask(client: httpx.AsyncClient, key: Key, reference: Reference) -> Outcome:
    body = {
        "model": "teacher",
        "messages": [{"role": "user", "content": reference.question}],
        "temperature": 0,
        "max_tokens": 120,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    found = Outcome(0)
    try:
        async with client.stream(
            "POST",
            "/v1/chat/completions",
            json=body,
            headers={"authorization": f"Bearer {key.token}"},
        ) as answer:
            found.status = answer.status_code
            if answer.status_code == 500:
                # Serve's own message if a gateway died before its first byte.
                found.error = "gateway died"
                return found
            if answer.status_code != 200:
                found.error = json.loads(await answer.aread())["error"]["code"]
                assert answer.headers["retry-after"]
                return found
            async for line in answer.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    found.error = event["error"]["code"]
                    return found
                if event.get("usage"):
                    found.tokens = event["usage"]["total_tokens"]
                for choice in event["choices"]:
                    found.text += choice["delta"].get("content") or ""
    except httpx.TransportError as error:
        found.error = type(error).__name__
        return found
    found.right = found.text == reference.text
    return found


async def load(
    endpoint: Served, key: Key, references: list[Reference], seconds: float
) -> list[Outcome]:
    """Run all clients at once, each with one request after another, until the time is over."""
    until = time.monotonic() + seconds
    limits = httpx.Limits(max_connections=CLIENTS)
    async with httpx.AsyncClient(
        base_url=endpoint.url, limits=limits, timeout=60, trust_env=False
    ) as client:

        async def one(number: int) -> list[Outcome]:
            found = []
            while time.monotonic() < until:
                found.append(await ask(client, key, references[number % PROBLEMS]))
                number += 7
                if found[-1].status in {429, 503}:
                    await asyncio.sleep(0.5)
            return found

        return [item for part in await asyncio.gather(*map(one, range(CLIENTS))) for item in part]


def test_an_openai_client_gets_the_teachers_own_answer(
    endpoint: Served, references: list[Reference]
) -> None:
    # `pytest --log-cli-level=INFO` shows how long the start took.
    logger.info("%s", endpoint.log.read_text())
    client = OpenAI(base_url=f"{endpoint.url}/v1", api_key=endpoint.key().token, max_retries=0)
    for reference in references[:4]:
        answer = client.chat.completions.create(
            model="teacher",
            messages=[{"role": "user", "content": reference.question}],
            temperature=0,
        )
        assert answer.choices[0].message.content == reference.text
        assert answer.usage is not None
        assert answer.usage.completion_tokens == reference.tokens


def test_many_streams_are_complete_and_billed_exactly(
    endpoint: Served, references: list[Reference]
) -> None:
    key = endpoint.key()
    outcomes = asyncio.run(load(endpoint, key, references, LOAD_S))
    whole = [item for item in outcomes if item.status == 200]
    assert len(whole) >= CLIENTS
    assert {item.status for item in outcomes} <= {200, 429, 503}
    assert [item for item in whole if item.error or not item.right] == []
    used = endpoint.settled(key, within_s=10)
    assert used.requests == len(whole)
    assert used.prompt_tokens + used.completion_tokens == sum(item.tokens for item in whole)


def test_a_quota_holds_over_both_gateways(endpoint: Served, references: list[Reference]) -> None:
    key = endpoint.key("tight")
    outcomes = asyncio.run(load(endpoint, key, references, 4.0))
    granted = [item for item in outcomes if item.status == 200]
    refused = [item for item in outcomes if item.status == 429]
    assert granted
    assert refused
    assert all(item.right for item in granted)
    used = endpoint.settled(key, within_s=10)
    total = used.prompt_tokens + used.completion_tokens
    assert total == sum(item.tokens for item in granted)
    assert total <= TIGHT_TOKENS


@pytest.mark.parametrize("deployment", ["Defended", "Gateway"])
def test_a_killed_replica_takes_only_its_own_streams_with_it(
    endpoint: Served, references: list[Reference], deployment: str
) -> None:
    endpoint.wait_for(deployment, 2)
    key = endpoint.key()
    victim = endpoint.replicas(deployment)[0]
    died: list[float] = []

    def kill() -> None:
        victim.kill()
        died.append(time.monotonic())

    killer = threading.Timer(2.0, kill)
    killer.start()
    outcomes = asyncio.run(load(endpoint, key, references, DEATH_S))
    killer.join()
    whole = [item for item in outcomes if item.status == 200 and not item.error]
    assert len(whole) >= CLIENTS
    assert [item for item in whole if not item.right] == []
    broken = [item for item in outcomes if item.error and item.status not in {429, 503}]
    if deployment == "Defended":
        # The gateway lives, so every stream ends as the protocol requires.
        assert {item.error for item in broken} <= {"engine_error"}
    # Each client had one open request at that time, and no client waited in vain.
    assert len(broken) <= CLIENTS
    assert all(item.ended - died[0] < AT_ONCE_S for item in broken)
    used = endpoint.settled(key, within_s=LEASE_S)
    total = used.prompt_tokens + used.completion_tokens
    known = sum(item.tokens for item in whole)
    most = sum(len(item.text.split()) + 200 for item in broken)
    assert known <= total <= known + most
    endpoint.wait_for(deployment, 2)


def test_a_stream_that_has_begun_is_finished_before_the_end(
    endpoint: Served, references: list[Reference]
) -> None:
    key = endpoint.key()
    told = threading.Event()
    text: list[str] = []

    def read() -> None:
        client = OpenAI(base_url=f"{endpoint.url}/v1", api_key=key.token, max_retries=0)
        stream = client.chat.completions.create(
            model="teacher",
            messages=[{"role": "user", "content": references[0].question}],
            temperature=0,
            # This completion does not end by itself, so it fills the context.
            logit_bias={"2": -100},
            stream=True,
        )
        for event in stream:
            text.append(event.choices[0].delta.content or "")
            told.set()
            if event.choices[0].finish_reason:
                text.append(event.choices[0].finish_reason)

    reader = threading.Thread(target=read)
    reader.start()
    assert told.wait(30)
    own = psutil.Process(endpoint.process.pid).children(recursive=True)
    assert endpoint.stop() == 0
    reader.join(10)
    assert text[-1] == "length"
    _, left = psutil.wait_procs(own, timeout=5)
    assert left == []
    assert "Traceback" not in endpoint.log.read_text()
