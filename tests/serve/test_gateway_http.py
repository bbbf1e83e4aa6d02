"""The gateway as OpenAI's own client sees it, over HTTP."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest
import torch
from fastapi import FastAPI

from azeotrope import tasks
from azeotrope.defenses.answers_only import Config, build
from azeotrope.endings import end_ids
from azeotrope.engine.protocol import Chunk, Engine, EngineError, EngineRequest
from azeotrope.generation import Sampling, generate
from azeotrope.models import Loaded
from azeotrope.tokens import Boundary, Message, decode, encode_prompt, without_reasoning
from gateway.http.app import create_app
from gateway.policy import Policy, Tier
from gateway.service import Gateway

DECIMALS = 4
POLL_S, WAIT_S = 0.01, 10.0
Server = Callable[[FastAPI], str]


def question() -> list[Message]:
    task = tasks.build(tasks.PocketConfig())
    return list(task.messages(task.problems("test", 1)[0].question))


def asked(**more: Any) -> dict[str, Any]:
    return {"model": "teacher", "messages": question(), "temperature": 0, "max_tokens": 64, **more}


def client(url: str, token: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=token, max_retries=0)


class Failing(Engine):
    """An engine that fails after a number of chunks, for the first `times` requests."""

    def __init__(self, inner: Engine, *, after: int, times: int) -> None:
        self.inner, self.after, self.times, self.asked = inner, after, times, 0

    async def generate(self, request: EngineRequest) -> AsyncGenerator[Chunk]:
        self.asked += 1
        fails, seen = self.asked <= self.times, 0
        async for chunk in self.inner.generate(request):
            if fails and seen == self.after:
                raise EngineError("the machine is gone")
            seen += 1
            yield chunk


class Slow(Engine):
    """An engine that repeats one token until it is closed."""

    def __init__(self, inner: Engine) -> None:
        self.inner, self.rows, self.began, self.closed = inner, 0, 0, 0

    async def generate(self, request: EngineRequest) -> AsyncGenerator[Chunk]:
        self.rows += 1
        self.began += 1
        try:
            async for chunk in self.inner.generate(replace(request, max_tokens=1)):
                while True:
                    yield Chunk(chunk.tokens)
                    await asyncio.sleep(POLL_S)
        finally:
            self.rows -= 1
            self.closed += 1


def wait_until_free(slow: Slow) -> None:
    until = time.monotonic() + WAIT_S
    while slow.rows:
        assert time.monotonic() < until, "the row is still written"
        time.sleep(POLL_S)


@pytest.fixture
def opened(
    gateway_factory: Any, live_server: Server
) -> Callable[..., tuple[Gateway, str, openai.OpenAI]]:
    """A gateway that serves over HTTP, and a client with a key of its only tier."""

    def make(engine: Engine | None = None, **tier: Any) -> tuple[Gateway, str, openai.OpenAI]:
        rules = {"logprobs": "topk", "decimals": DECIMALS, **tier}
        gateway = gateway_factory(Policy(tiers={"standard": Tier(**rules)}), engine=engine)
        url = live_server(create_app(gateway))
        return gateway, url, client(url, gateway.keys.create("alice")[1])

    return make


@pytest.fixture
def greedy(teacher: Loaded) -> str:
    """The teacher's greedy answer to the question, by the library's own generation."""
    (made,) = generate(
        teacher.model,
        [encode_prompt(teacher.tokenizer, question())],
        Sampling(temperature=0, max_new_tokens=64),
        end_ids=end_ids(teacher.tokenizer),
        pad_id=int(teacher.tokenizer.pad_token_id or 0),  # type: ignore[arg-type]
    )
    ids = made.ids[:-1] if made.finished else made.ids
    return decode(teacher.tokenizer, ids)


def test_greedy_text_and_numbers_are_the_models_own(
    opened: Any, teacher: Loaded, greedy: str
) -> None:
    _, _, ask = opened()
    answer = ask.chat.completions.create(**asked(logprobs=True, top_logprobs=5))
    (choice,) = answer.choices
    assert choice.message.content == greedy
    assert choice.finish_reason == "stop"
    tokenizer = teacher.tokenizer
    ids = {str(tokenizer.decode([id])): id for id in range(len(tokenizer))}
    prompt = encode_prompt(tokenizer, question())
    written = [ids[item.token] for item in choice.logprobs.content]
    assert decode(tokenizer, written) == greedy
    with torch.inference_mode():
        logits = teacher.model(input_ids=torch.tensor([[*prompt, *written]])).logits[0].double()
    expected = logits[len(prompt) - 1 : -1].log_softmax(-1)
    for row, item in zip(expected, choice.logprobs.content, strict=True):
        assert len(item.top_logprobs) == 5
        for shown in (item, *item.top_logprobs):
            number = float(row[ids[shown.token]])
            assert shown.logprob == pytest.approx(number, abs=10**-DECIMALS)
    # The end-of-sequence token is written and billed, but is not part of the answer.
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens == len(written)
    assert answer.usage.total_tokens == len(prompt) + len(written)


def test_a_stream_has_the_same_text_and_its_usage(opened: Any, greedy: str) -> None:
    _, _, ask = opened()
    whole = ask.chat.completions.create(**asked())
    parts = list(
        ask.chat.completions.create(**asked(stream=True, stream_options={"include_usage": True}))
    )
    text = "".join(part.choices[0].delta.content or "" for part in parts[:-1])
    assert text == whole.choices[0].message.content == greedy
    assert parts[0].choices[0].delta.role == "assistant"
    assert parts[-2].choices[0].finish_reason == "stop"
    assert (parts[-1].choices, parts[-1].usage) == ([], whole.usage)


@pytest.mark.parametrize("whole", [False, True])
def test_an_answer_can_be_sent_back_as_a_turn(whole: bool, opened: Any) -> None:
    _, _, ask = opened()
    first = ask.chat.completions.create(**asked()).choices[0].message
    turns = [*question(), first.model_dump() if whole else first, *question()]
    second = ask.chat.completions.create(**{**asked(max_tokens=4), "messages": turns})
    plain = {"role": "assistant", "content": first.content}
    same = ask.chat.completions.create(
        **{**asked(max_tokens=4), "messages": [*question(), plain, *question()]}
    )
    assert second.usage == same.usage
    assert second.choices[0].message.content == same.choices[0].message.content


def test_completions_accept_prompts_n_stops_and_seeds(opened: Any) -> None:
    _, _, ask = opened()
    drawn: dict[str, Any] = {"model": "teacher", "temperature": 1.0, "max_tokens": 12, "seed": 3}
    once, again = (
        ask.completions.create(prompt=["joe has", "tom has"], n=2, **drawn) for _ in range(2)
    )
    assert [choice.index for choice in once.choices] == [0, 1, 2, 3]
    texts = [choice.text for choice in once.choices]
    assert texts == [choice.text for choice in again.choices]
    assert len(set(texts)) > 1
    chat = ask.chat.completions.create(**asked(stop="####"))
    said = chat.choices[0].message.content
    assert "####" not in said
    assert chat.choices[0].finish_reason == "stop"
    assert ask.chat.completions.create(**asked()).choices[0].message.content.startswith(said)
    short = ask.chat.completions.create(**asked(max_tokens=3))
    assert (short.choices[0].finish_reason, short.usage.completion_tokens) == ("length", 3)


def test_offsets_are_the_same_in_a_stream(opened: Any) -> None:
    _, _, ask = opened()
    asked = {"model": "teacher", "prompt": "joe has 2 eggs", "temperature": 0, "logprobs": 2}
    (whole,) = ask.completions.create(max_tokens=12, **asked).choices
    parts = list(ask.completions.create(max_tokens=12, stream=True, **asked))
    offsets = [at for part in parts for at in part.choices[0].logprobs.text_offset or ()]
    assert offsets == whole.logprobs.text_offset
    ends = [*offsets[1:], len(whole.text)]
    words = [whole.text[start:end].strip() for start, end in zip(offsets, ends, strict=True)]
    assert words == whole.logprobs.tokens
    assert len(words) > 3


def test_models_are_listed(opened: Any) -> None:
    _, _, ask = opened()
    assert [model.id for model in ask.models.list()] == ["teacher"]
    assert ask.models.retrieve("teacher").id == "teacher"
    with pytest.raises(openai.NotFoundError):
        ask.models.retrieve("other")


def test_only_the_rewritten_text_is_sent(
    gateway_factory: Any, live_server: Server, greedy: str
) -> None:
    """A stream waits for the whole text, so it has one event with text."""
    gateway: Gateway = gateway_factory()
    gateway.model = replace(gateway.model, rewriting=(build(Config()),))
    ask = client(live_server(create_app(gateway)), gateway.keys.create("alice")[1])
    expected = without_reasoning(greedy, Boundary())
    assert ask.chat.completions.create(**asked()).choices[0].message.content == expected != greedy
    parts = list(ask.chat.completions.create(**asked(stream=True)))
    said = [part.choices[0].delta.content for part in parts if part.choices[0].delta.content]
    assert said == [expected]


def test_each_refusal_has_its_own_error(opened: Any) -> None:
    gateway, url, ask = opened()
    wrong: list[tuple[dict[str, Any], type[openai.APIStatusError], str | None]] = [
        ({"temperature": 3}, openai.BadRequestError, "temperature"),
        ({"model": "other"}, openai.NotFoundError, "model"),
        ({"extra_body": {"echo": True}}, openai.UnprocessableEntityError, "echo"),
    ]
    for more, kind, param in wrong:
        with pytest.raises(kind) as caught:
            ask.chat.completions.create(**asked(**more))
        assert caught.value.param == param
    with pytest.raises(openai.AuthenticationError):
        client(url, "az-nobody").chat.completions.create(**asked())
    _, narrow = gateway.keys.create("narrow", features=["completions"])
    with pytest.raises(openai.PermissionDeniedError):
        client(url, narrow).chat.completions.create(**asked())
    large = json.dumps(asked(user="a" * gateway.policy.most_bytes))
    headers = {"authorization": f"Bearer {ask.api_key}"}
    answer = httpx.post(f"{url}/v1/chat/completions", content=large, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")


def test_quotas_are_in_the_headers_and_refusals_say_how_long(opened: Any) -> None:
    _, _, ask = opened(requests_per_minute=2)
    left = [
        ask.chat.completions.with_raw_response.create(**asked(max_tokens=1)).headers[
            "x-ratelimit-remaining-requests"
        ]
        for _ in range(2)
    ]
    assert left == ["1", "0"]
    with pytest.raises(openai.RateLimitError) as caught:
        ask.chat.completions.create(**asked())
    headers = caught.value.response.headers
    assert 1 <= int(headers["retry-after"]) <= 60
    assert headers["x-ratelimit-limit-requests"] == "2"
    assert headers["x-ratelimit-remaining-requests"] == "0"


def test_a_revoked_key_is_refused_when_its_cache_expires(opened: Any) -> None:
    gateway, url, _ = opened()
    record, token = gateway.keys.create("gone")
    ask = client(url, token)
    ask.models.list()
    gateway.keys.revoke(record.id)
    time.sleep(1.1)
    with pytest.raises(openai.AuthenticationError):
        ask.models.list()


def test_an_aborted_stream_is_settled_and_frees_its_row(
    opened: Any, engine: Engine, settled_usage: Any
) -> None:
    slow = Slow(engine)
    gateway, _, ask = opened(slow)
    stream = ask.chat.completions.create(**asked(stream=True))
    for _, _ in zip(range(5), stream, strict=False):
        pass
    assert slow.rows == 1
    stream.close()
    wait_until_free(slow)
    (row,) = settled_usage(gateway)
    assert (slow.closed, row.open_requests) == (1, 0)
    assert 5 <= row.completion_tokens < 64


def test_an_answer_to_a_disconnected_client_is_settled_and_frees_its_row(
    opened: Any, engine: Engine, settled_usage: Any
) -> None:
    slow = Slow(engine)
    gateway, _, ask = opened(slow)
    with pytest.raises(openai.APITimeoutError):
        ask.with_options(timeout=httpx.Timeout(WAIT_S, read=1.0)).chat.completions.create(**asked())
    wait_until_free(slow)
    (row,) = settled_usage(gateway)
    assert (row.requests, row.open_requests) == (1, 0)
    assert slow.closed == slow.began == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_repeated_once_if_the_engine_fails_at_first(
    stream: bool, opened: Any, engine: Engine, settled_usage: Any
) -> None:
    failing = Failing(engine, after=0, times=1)
    _, _, ask = opened(failing)
    answer = ask.chat.completions.create(**asked(stream=stream))
    assert list(answer)
    assert failing.asked == 2
    broken = Failing(engine, after=0, times=9)
    gateway, _, ask = opened(broken)
    with pytest.raises(openai.InternalServerError) as caught:
        ask.chat.completions.create(**asked(stream=stream))
    assert (caught.value.status_code, caught.value.code) == (503, "engine_error")
    assert caught.value.response.headers["retry-after"] == "1"
    assert "machine" not in caught.value.message
    assert broken.asked == 2
    (row,) = settled_usage(gateway)
    assert row.completion_tokens == 0


def test_an_engine_that_fails_later_ends_the_stream_with_an_error(
    opened: Any, engine: Engine, settled_usage: Any
) -> None:
    failing = Failing(engine, after=1, times=9)
    gateway, _, ask = opened(failing)
    stream = ask.chat.completions.create(**asked(stream=True))
    assert next(stream).choices[0].delta.role == "assistant"
    with pytest.raises(openai.APIError) as caught:
        list(stream)
    assert caught.value.code == "engine_error"
    assert failing.asked == 1
    (row,) = settled_usage(gateway)
    assert row.completion_tokens > 0


def test_a_gateway_without_its_store_is_alive_and_not_ready(opened: Any, tmp_path: Any) -> None:
    _, url, ask = opened()
    assert httpx.get(f"{url}/readyz").status_code == 200
    (store,) = tmp_path.rglob("store.sqlite")
    store.rename(store.with_suffix(".away"))
    time.sleep(1.1)
    assert httpx.get(f"{url}/readyz").status_code == 503
    assert httpx.get(f"{url}/healthz").status_code == 200
    with pytest.raises(openai.InternalServerError) as caught:
        ask.chat.completions.create(**asked())
    assert (caught.value.status_code, caught.value.code) == (503, "store_unavailable")


def test_metrics_need_their_scope(opened: Any) -> None:
    gateway, url, ask = opened()
    ask.chat.completions.create(**asked())
    _, watcher = gateway.keys.create("watcher", features=["metrics"])
    codes = {
        token: httpx.get(f"{url}/metrics", headers={"authorization": f"Bearer {token}"})
        for token in (watcher, ask.api_key, "az-nobody")
    }
    assert [answer.status_code for answer in codes.values()] == [200, 403, 401]
    assert "azeotrope" in codes[watcher].text
    assert ask.api_key not in codes[watcher].text
