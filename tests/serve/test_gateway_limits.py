"""What the gateway refuses when there is too much of something, and when it may not go on."""

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI
from witness import Call, FullLog, check_refusal, choices, decisions, send

from azeotrope.engine.protocol import Chunk, Engine, EngineRequest
from azeotrope.engine.transformers import TransformersEngine
from azeotrope.models import Loaded
from gateway import service
from gateway.accounts.sqlite_keys import SqliteKeyStore
from gateway.http.app import create_app
from gateway.policy import Extraction, Policy, Tier
from gateway.service import Gateway

CHAT = "/v1/chat/completions"
WAIT_S, POLL_S = 10.0, 0.01
EVERY = 20
Server = Callable[[FastAPI], str]


def asked(**more: Any) -> dict[str, Any]:
    said = {"role": "user", "content": "joe has 2 eggs . he drops 1 . how many eggs are there ?"}
    return {"model": "teacher", "messages": [said], "temperature": 0, "max_tokens": 4, **more}


def client(url: str, token: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=token, max_retries=0)


class Gated(Engine):
    """An engine that begins when the test allows it."""

    def __init__(self, inner: Engine) -> None:
        self.inner, self.waiting, self.gate = inner, 0, threading.Event()

    async def generate(self, request: EngineRequest) -> AsyncGenerator[Chunk]:
        self.waiting += 1
        while not self.gate.is_set():
            await asyncio.sleep(POLL_S)
        async with contextlib.aclosing(self.inner.generate(request)) as chunks:
            async for chunk in chunks:
                yield chunk


@contextlib.contextmanager
def held(gated: Gated, ask: openai.OpenAI, **more: Any) -> Iterator[None]:
    """Keep one request in the engine while the block runs; then it is answered."""
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(lambda: ask.chat.completions.create(**asked(**more)))
        try:
            until = time.monotonic() + WAIT_S
            while gated.waiting < more.get("n", 1):
                assert time.monotonic() < until, "the request did not reach the engine"
                time.sleep(POLL_S)
            yield
        finally:
            gated.gate.set()
        assert answer.result(WAIT_S).choices[0].message.content


def test_a_key_has_a_limit_of_completions_at_once(
    gateway_factory: Any, live_server: Server, engine: Engine
) -> None:
    gated = Gated(engine)
    policy = Policy(tiers={"standard": Tier(concurrency=2)})
    gateway: Gateway = gateway_factory(policy, engine=gated)
    url = live_server(create_app(gateway))
    alice, bob = (client(url, gateway.keys.create(name)[1]) for name in ("alice", "bob"))
    with held(gated, alice, n=2):
        for stream in (False, True):
            with pytest.raises(openai.RateLimitError) as caught:
                alice.chat.completions.create(**asked(stream=stream))
            assert caught.value.response.headers["retry-after"] == "1"
            assert "completions at once" in caught.value.message
        # The limit holds for this key only. Three completions of one request can never fit.
        with pytest.raises(openai.RateLimitError, match="ask for fewer"):
            bob.chat.completions.create(**asked(n=3))
        gated.gate.set()
        assert bob.chat.completions.create(**asked()).choices
    assert alice.chat.completions.create(**asked()).choices
    assert gated.waiting == 4


def test_a_replica_has_a_limit_of_requests_at_once(
    gateway_factory: Any, live_server: Server, engine: Engine
) -> None:
    gated = Gated(engine)
    gateway: Gateway = gateway_factory(Policy(in_flight=1), engine=gated)
    url = live_server(create_app(gateway))
    alice, bob = (client(url, gateway.keys.create(name)[1]) for name in ("alice", "bob"))
    with held(gated, alice):
        with pytest.raises(openai.InternalServerError) as caught:
            bob.chat.completions.create(**asked(stream=True))
        assert (caught.value.status_code, caught.value.code) == (503, "overloaded")
        assert caught.value.response.headers["retry-after"] == "1"
        # A refusal for load is not billed, and requests without a key do not learn about the load.
        assert {row.key for row in gateway.ledger.usage()} == {_id(gateway, "alice")}
        with pytest.raises(openai.AuthenticationError):
            client(url, "az-nobody").chat.completions.create(**asked())
    assert bob.chat.completions.create(**asked()).choices


def test_a_body_that_does_not_arrive_is_given_up(
    gateway_factory: Any, live_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "BODY_S", 0.3)
    gateway: Gateway = gateway_factory(Policy(in_flight=1))
    url = live_server(create_app(gateway))
    _, token = gateway.keys.create("alice")

    def slowly() -> Iterator[bytes]:
        yield b'{"model": '
        time.sleep(1.0)
        yield b'"teacher"}'

    headers = {"authorization": f"Bearer {token}", "content-type": "application/json"}
    answer = httpx.post(f"{url}{CHAT}", content=slowly(), headers=headers, timeout=10)
    assert answer.status_code == 408
    check_refusal(answer)
    # Its slot is free again.
    assert client(url, token).chat.completions.create(**asked()).choices


def _id(gateway: Gateway, name: str) -> str:
    (found,) = (record.id for record in gateway.keys.list() if record.name == name)
    return found


@pytest.mark.parametrize(
    ("limits", "said"),
    [({"requests_per_minute": 1}, "requests"), ({"tokens_per_day": 30}, "day")],
)
def test_a_rotated_key_belongs_to_the_same_customer(
    limits: dict[str, int], said: str, gateway_factory: Any, settled_usage: Any
) -> None:
    gateway: Gateway = gateway_factory(Policy(tiers={"standard": Tier(**limits)}))
    old, old_token = gateway.keys.create("alice")
    new, new_token = gateway.keys.rotate(old.id, overlap_s=60.0)
    _, other = gateway.keys.create("bob")
    (answer,) = send(gateway, [Call(CHAT, old_token, asked())])
    assert answer.status_code == 200
    for token in (new_token, old_token):
        (refused,) = send(gateway, [Call(CHAT, token, asked())])
        assert refused.status_code == 429
        assert said in refused.json()["error"]["message"]
    (answer,) = send(gateway, [Call(CHAT, other, asked())])
    assert answer.status_code == 200
    rows = [row for row in settled_usage(gateway) if row.key in (old.id, new.id)]
    assert [(row.key, row.requests) for row in rows] == [(old.id, 1)]
    lines = [line for line in decisions(gateway, "refused") if line["account"] == old.id]
    assert [line["key"] for line in lines] == [new.id, old.id]


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_is_reported_before_the_first_token(
    stream: bool, gateway_factory: Any, teacher: Loaded, settled_usage: Any
) -> None:
    """Four completions do not fit an engine with one row and a queue of one."""
    small = TransformersEngine(teacher, rows=1, queue=1)
    try:
        gateway: Gateway = gateway_factory(engine=small)
        _, token = gateway.keys.create("alice")
        whole = Call(CHAT, token, asked(n=4, max_tokens=64, stream=stream))
        (refused,) = send(gateway, [whole])
        assert refused.status_code == 503
        check_refusal(refused)
        assert refused.json()["error"]["code"] == "overloaded"
        assert int(refused.headers["retry-after"]) > 0
        # The other completions of the request are stopped too.
        (row,) = settled_usage(gateway)
        assert row.completion_tokens < 64
        (answer,) = send(gateway, [Call(CHAT, token, asked())])
        assert choices(answer)[0].text
    finally:
        small.close()


def test_an_answer_that_takes_too_long_is_ended(
    gateway_factory: Any, engine: Engine, settled_usage: Any
) -> None:
    gateway: Gateway = gateway_factory(Policy(timeout_s=0.2), engine=Gated(engine))
    _, token = gateway.keys.create("alice")
    for answer in send(gateway, [Call(CHAT, token, asked(stream=s)) for s in (False, True)]):
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "timeout")
        assert answer.headers["retry-after"] == "1"
    (row,) = settled_usage(gateway)
    assert (row.open_requests, row.completion_tokens) == (0, 0)


def collecting(gateway: Gateway, token: str) -> list[httpx.Response]:
    """Requests one after another: enough for one score, and three more."""
    texts = [f"question {n} : think step by step , then answer ." for n in range(EVERY + 3)]
    calls = [
        Call(CHAT, token, asked(max_tokens=1, messages=[{"role": "user", "content": text}]))
        for text in texts
    ]
    return send(gateway, calls, at_once=1)


@pytest.mark.parametrize("action", ["observe", "throttle", "block"])
def test_a_collector_of_reasoning_is_logged_throttled_or_blocked(
    action: str, gateway_factory: Any
) -> None:
    rules = Extraction(action=action, threshold=0.3, every=EVERY, throttle=0.1)  # type: ignore[arg-type]
    gateway: Gateway = gateway_factory(Policy(extraction=rules))
    record, token = gateway.keys.create("attacker")
    _, other = gateway.keys.create("bystander")
    answers = collecting(gateway, token)
    before, after = answers[: EVERY - 1], answers[EVERY - 1 :]
    assert {answer.status_code for answer in before} == {200}
    limits = {answer.headers.get("x-ratelimit-limit-requests") for answer in after}
    statuses = {answer.status_code for answer in after}
    if action == "block":
        assert statuses == {403}
        for answer in after:
            check_refusal(answer)
            assert answer.json()["error"]["code"] == "key_suspended"
        assert len(decisions(gateway, "refused")) == len(after)
    else:
        assert statuses == {200}
        assert limits == {"600" if action == "observe" else "60"}
    (line,) = decisions(gateway, "extraction")
    assert (line["key"], line["account"], line["action"]) == (record.id, record.id, action)
    assert line["score"] >= 0.3
    assert any("reasoning" in reason for reason in line["reasons"])
    # The log has no words of the requests, and other keys are not affected.
    assert "question 1" not in "".join(line["reasons"])
    (answer,) = send(gateway, [Call(CHAT, other, asked())])
    assert (answer.status_code, answer.headers["x-ratelimit-limit-requests"]) == (200, "600")


@pytest.mark.parametrize("action", ["observe", "block"])
def test_repeated_refused_requests_for_log_probabilities_are_scored(
    action: str, gateway_factory: Any
) -> None:
    rules = Extraction(action=action, threshold=0.3, every=EVERY)  # type: ignore[arg-type]
    gateway: Gateway = gateway_factory(Policy(extraction=rules))
    record, token = gateway.keys.create("prober")
    probe = asked(logprobs=True, messages=[{"role": "user", "content": "secret words"}])
    answers = send(gateway, [Call(CHAT, token, probe)] * (EVERY + 1), at_once=1)
    statuses = [answer.status_code for answer in answers]
    last = 403 if action == "block" else 400
    assert statuses == [400] * (EVERY - 1) + [last, last]
    assert len(decisions(gateway, "refused")) == len(answers)
    (line,) = decisions(gateway, "extraction")
    assert (line["key"], line["action"]) == (record.id, action)
    assert "20 of 20 requests probe log-probabilities" in line["reasons"][0]
    kept = "".join(path.read_text() for path in gateway.log.folder.iterdir())
    assert "secret words" not in kept


def test_other_refusals_do_not_hide_the_requests_of_a_key(gateway_factory: Any) -> None:
    """Refusals cost nothing, so they must not push answered requests out of the window."""
    rules = Extraction(threshold=0.3, every=EVERY)
    gateway: Gateway = gateway_factory(Policy(extraction=rules))
    _, token = gateway.keys.create("alice")
    send(gateway, [Call(CHAT, token, asked(n=99))] * (EVERY + 1), at_once=1)
    assert decisions(gateway, "extraction") == []
    assert len(gateway._suspicion._watch) == 0


def test_a_request_that_cannot_be_logged_is_not_answered(
    gateway_factory: Any, tmp_path: Any, settled_usage: Any
) -> None:
    gateway: Gateway = gateway_factory()
    _, token = gateway.keys.create("alice")
    gateway.log = FullLog(tmp_path / "full", room=2)
    (answer,) = send(gateway, [Call(CHAT, token, asked())])
    assert answer.status_code == 200
    for body in (asked(), asked(stream=True), asked(echo=True), asked(temperature=3)):
        (answer,) = send(gateway, [Call(CHAT, token, body)])
        assert answer.status_code == 503, answer.text
        check_refusal(answer)
        assert answer.json()["error"]["code"] == "store_unavailable"
        # Clients do not learn where a store is.
        assert "space" not in answer.text
    (row,) = settled_usage(gateway)
    assert (row.requests, row.open_requests) == (1, 0)


def test_a_stream_that_cannot_be_logged_ends_with_an_error(
    gateway_factory: Any, tmp_path: Any, settled_usage: Any
) -> None:
    """Its text was sent already, and the client must not take it for a complete answer."""
    gateway: Gateway = gateway_factory()
    _, token = gateway.keys.create("alice")
    gateway.log = FullLog(tmp_path / "full", room=1)
    (answer,) = send(gateway, [Call(CHAT, token, asked(stream=True))])
    assert answer.status_code == 200
    assert "[DONE]" not in answer.text
    assert '"code": "store_unavailable"' in answer.text.split("\n\n")[-2]
    (row,) = settled_usage(gateway)
    assert (row.requests, row.completion_tokens) == (1, 4)


def test_a_key_that_another_process_revokes_stops_within_a_second(
    gateway_factory: Any, live_server: Server
) -> None:
    gateway: Gateway = gateway_factory()
    record, token = gateway.keys.create("gone")
    ask = client(live_server(create_app(gateway)), token)
    assert ask.models.list().data
    # This opens the store like `azeotrope keys revoke`.
    SqliteKeyStore(gateway.keys._database.path).revoke(record.id)
    since = time.monotonic()
    while _is_taken(ask):
        assert time.monotonic() < since + 1.5, "a revoked key is still taken"
        time.sleep(0.05)


def _is_taken(ask: openai.OpenAI) -> bool:
    try:
        ask.models.list()
    except openai.AuthenticationError:
        return False
    return True


def test_old_decisions_are_removed_when_a_gateway_starts(
    gateway_factory: Any, live_server: Server
) -> None:
    gateway: Gateway = gateway_factory()
    old = gateway.log.folder / "audit-2020-01-01-7.jsonl"
    old.write_text("")
    live_server(create_app(gateway))
    until = time.monotonic() + WAIT_S
    while old.exists():
        assert time.monotonic() < until, "the old file is still there"
        time.sleep(POLL_S)


def test_a_key_of_an_unknown_tier_is_reported_to_the_operator_once(
    gateway_factory: Any, caplog: pytest.LogCaptureFixture
) -> None:
    gateway: Gateway = gateway_factory(Policy(tiers={"standard": Tier()}))
    lost, token = gateway.keys.create("lost", tier="gold")
    other, other_token = gateway.keys.create("other", tier="silver")
    calls = [Call(CHAT, name, asked()) for name in (token, token, other_token, "az-nobody")]
    answers = send(gateway, calls)
    assert {answer.status_code for answer in answers} == {401}
    # The key's owner gets the same refusal as for an unknown key.
    assert len({answer.text for answer in answers}) == 1
    said = [entry.getMessage() for entry in caplog.records if "no tier" in entry.getMessage()]
    assert sorted(said) == sorted(
        f"key {key.id} is refused: the policy has no tier {key.tier!r}" for key in (lost, other)
    )
    gateway.apply(Policy(tiers={"gold": Tier()}))
    (answer,) = send(gateway, [Call(CHAT, token, asked())])
    assert answer.status_code == 200


def test_metrics_contain_no_key_and_no_text(gateway_factory: Any) -> None:
    gateway: Gateway = gateway_factory()
    record, token = gateway.keys.create("customer-name")
    _, watcher = gateway.keys.create("watcher", features=["metrics"])
    bodies = (asked(), asked(echo=True), asked(model="secret-name"), asked(n=99))
    send(gateway, [Call(CHAT, token, body) for body in bodies])
    (page,) = send(gateway, [Call("/metrics", watcher, method="GET")])
    assert page.status_code == 200
    assert 'azeotrope_requests_total{tier="standard"} 1.0' in page.text
    for word in (record.id, record.name, record.watermark_key, token, "joe", "secret-name", "echo"):
        assert word not in page.text
