"""Nothing undefended leaves the gateway: not by a field, a number, a name, a header or a word.

The engine under test has a decoding defense, so each number has two values, and the tests say which
one was shown. The undefended engine notes every request that reaches it.
"""

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from witness import (
    CHAT,
    TEXT,
    Call,
    Guarded,
    Reference,
    body,
    check,
    check_refusal,
    choices,
    decisions,
    questions,
    send,
    user,
    wide,
)

from azeotrope import models
from azeotrope.logits.oracle import ModelOracle, RefusedError, TopLogprobs
from azeotrope.logits.recovery import random_prompts, sample_tokens
from azeotrope.logits.subspace import recover_subspace
from azeotrope.models import Loaded
from gateway.accounts.key_records import UNDEFENDED
from gateway.audit import engine_fields, probes, run
from gateway.http.app import create_app
from gateway.http.requests import ChatRequest, CompletionRequest
from gateway.policy import Policy

STRENGTHS = (0.5, None, 9.0)
"""None is the engine's own."""


# From outside ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tier", sorted(Policy().tiers))
def test_the_audit_finds_nothing(
    tier: str, guarded: Callable[..., Guarded], live_server: Callable[[FastAPI], str]
) -> None:
    made = guarded()
    url = live_server(create_app(made.gateway))
    found = run.audit(f"{url}/v1", made.keys[tier])
    assert [item for item in found if item.outcome != "held"] == []
    assert len(found) == run.count() > 100
    assert made.undefended.asked == {}
    assert made.defended.asked != {}


def test_an_audit_says_what_it_has_not_seen(
    guarded: Callable[..., Guarded], live_server: Callable[[FastAPI], str]
) -> None:
    """A tier that takes no temperature of 0 is audited all the same; a key of one route is not."""
    made = guarded(Policy(tiers={"careful": wide(temperature=(0.3, 1.0))}))
    url = live_server(create_app(made.gateway))
    found = {item.probe: item for item in run.audit(f"{url}/v1", made.keys["careful"])}
    assert {item.outcome for item in found.values()} == {"held"}
    for stream in ("stream", "completions: stream"):
        assert found[stream].seen == "nothing but text"
    assert found["chat: echo"].seen == "refused with 422"
    _, token = made.gateway.keys.create("chat alone", tier="careful", features=["chat"])
    found = {item.probe: item for item in run.audit(f"{url}/v1", token)}
    assert found["chat: echo"].outcome == "held"
    assert found["echo"].outcome == found["completions: stream"].outcome == "unclear"
    assert "403" in found["echo"].seen


# Fields ----------------------------------------------------------------------------------------


def places(path: str, extra: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A request with the same fields in each place where a field can stand."""
    question = "joe has 2 eggs ."
    yield body(path, question, **extra)
    options = {"include_usage": True, **extra}
    yield body(path, question, stream=True, stream_options=options)
    if path == CHAT:
        yield {**body(path, question), "messages": [{**user(question), **extra}]}
        part = {"type": "text", "text": question, **extra}
        yield {**body(path, question), "messages": [user([part])]}


def forbidden(path: str) -> list[str]:
    """Every field that an engine knows and a client may not use."""
    fields = engine_fields.read()
    own = fields.chat if path == CHAT else fields.completion
    rulings = (own, fields.sampling)
    names = {name for item in rulings for name in set(item.names) - set(item.allowed)}
    names |= {name for group in fields.chat.refused.values() for name in group}
    names |= set(probes.SWITCHES) | set(probes.TEXT_SWITCHES)
    names |= {"extra_args", "extra_body", "additional_config", "metadata", "functions", "store"}
    # What the gateway takes itself is judged by its value, and not by its name.
    kind = ChatRequest if path == CHAT else CompletionRequest
    return sorted(names - set(kind.model_fields))


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_fields_of_engines_are_unknown_in_every_place(
    path: str, guarded: Callable[..., Guarded]
) -> None:
    made = guarded(Policy(tiers={"open": wide(logprobs="topk", bans=True, decimals=4)}))
    values = {**probes.SWITCHES, **probes.TEXT_SWITCHES}
    calls: list[Call] = []
    names = forbidden(path)
    assert len(names) > 70
    for name in names:
        for value in (values.get(name, 1), None):
            calls += [Call(path, made.keys["open"], item) for item in places(path, {name: value})]
    for call, answer in zip(calls, send(made.gateway, calls), strict=True):
        assert answer.status_code == 422, (call.body, answer.text)
        check_refusal(answer)
        assert answer.json()["error"]["code"] == "unknown_field"
    assert made.defended.asked == made.undefended.asked == {}


def test_fields_cannot_be_disguised(guarded: Callable[..., Guarded]) -> None:
    made = guarded()
    key = made.keys["trusted"]
    base = json.dumps(body(CHAT, "joe has 2 eggs ."))[:-1]
    disguised = [
        base + ', "\\u0065cho": true}',
        base + ', "Echo": true}',
        base + ', "echo ": true}',
        base + ', "": true}',
        base + ', "stream": true, "stream": false, "echo": true}',
        # Of a name that is there twice the last one counts, for the gateway and for nobody else.
        base + ', "model": "teacher:undefended"}',
        base + ', "logprobs": true, "top_logprobs": 2, "top_logprobs": 20}',
    ]
    answers = send(made.gateway, [Call(CHAT, key, item.encode()) for item in disguised])
    assert [answer.status_code for answer in answers] == [422, 422, 422, 422, 422, 404, 400]
    for query in ("?echo=true", "?prompt_logprobs=1", "?model=teacher:undefended", "?strength=0"):
        (answer,) = send(made.gateway, [Call(CHAT + query, key, body(CHAT, "joe has 2 eggs ."))])
        assert set(answer.json()["choices"][0]) == {"index", "message", "logprobs", "finish_reason"}
    assert made.undefended.asked == {}


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_a_ban_never_comes_with_numbers(path: str, guarded: Callable[..., Guarded]) -> None:
    tiers = {
        f"{numbers}-{bans}": wide(logprobs=numbers, bans=bans)
        for numbers in ("none", "top1", "topk")
        for bans in (False, True)
    }
    made = guarded(Policy(tiers=tiers))
    numbers = [{"logprobs": 0}, {"logprobs": 5}]
    if path == CHAT:
        numbers = [{"logprobs": True}, {"logprobs": True, "top_logprobs": 5}]
    biases = [{"5": -100}, {"5": 100}, {"5": 0}, {"5": -99.9}, {str(id): -100 for id in range(64)}]
    calls = [
        Call(path, token, body(path, "joe has 2 eggs .", logit_bias=bias, stream=stream, **shown))
        for token in made.keys.values()
        for bias in biases
        for shown in numbers
        for stream in (False, True)
    ]
    for answer in send(made.gateway, calls):
        assert answer.status_code == 400, answer.text
        check_refusal(answer)
    assert made.defended.asked == {}
    # A ban alone is taken where the tier allows it, and is answered without numbers.
    asked = body(path, "joe has 2 eggs .", logit_bias={"5": -100})
    (answer,) = send(made.gateway, [Call(path, made.keys["topk-True"], asked)])
    (only,) = choices(answer).values()
    assert only.text
    assert only.tokens == only.values == only.top == []
    assert [request.banned for request in made.defended.asked.values()] == [(5,)]


# Numbers ---------------------------------------------------------------------------------------


def test_every_number_is_of_the_defended_distribution(
    guarded: Callable[..., Guarded], reference: Reference
) -> None:
    settings = list(itertools.product(STRENGTHS, (4, 2)))
    tiers = {
        f"{strength}-{decimals}": wide(logprobs="topk", decimals=decimals, strength=strength)
        for strength, decimals in settings
    }
    made = guarded(Policy(tiers=tiers))
    calls: list[Call] = []
    expected: list[tuple[float | None, int]] = []
    for (name, token), setting in zip(made.keys.items(), settings, strict=True):
        assert name == f"{setting[0]}-{setting[1]}"
        for path, stream, question in itertools.product((CHAT, TEXT), (False, True), questions(2)):
            shown = {"logprobs": True, "top_logprobs": 5} if path == CHAT else {"logprobs": 5}
            for more in ({}, {"temperature": 1.2, "top_p": 0.9, "seed": 7, "n": 2}):
                asked = body(path, question, stream=stream, **shown, **more)
                calls.append(Call(path, token, asked))
                expected.append(setting)
    telling = dict.fromkeys(expected, 0)
    for setting, answer in zip(expected, send(made.gateway, calls), strict=True):
        for index, choice in choices(answer).items():
            id = f"{answer.headers['x-request-id']}-{index}"
            request, wrote = made.defended.asked[id], made.defended.wrote[id]
            assert request.strength == setting[0]
            assert len(choice.tokens) == len(wrote) > 0
            assert [len(top) for top in choice.top] == [5] * len(wrote)
            telling[setting] += check(reference.numbers(request, wrote, choice), setting[1])
    assert made.undefended.asked == {}
    # The test means something: so many numbers would have given the other distribution away.
    assert min(telling.values()) > 1000, telling


def test_no_field_changes_a_strength(guarded: Callable[..., Guarded]) -> None:
    tiers = {"weak": wide(strength=1.5), "own": wide(), "strong": wide(strength=6.0)}
    made = guarded(Policy(tiers=tiers))
    names = ("strength", "delta", "ads_lambda", "vllm_xargs", "extra_args", "watermark_key", "tier")
    calls = [
        Call(path, token, item)
        for token in made.keys.values()
        for path in (CHAT, TEXT)
        for name in names
        for value in (0, {"strength": 0}, "none")
        for item in places(path, {name: value})
    ]
    assert {answer.status_code for answer in send(made.gateway, calls)} == {422}
    assert made.defended.asked == {}
    headers = ((b"x-strength", b"0"), (b"x-tier", b"weak"), (b"x-watermark-key", b"mine"))
    for name, token in made.keys.items():
        user_field = body(CHAT, "joe has 2 eggs .", max_tokens=2, user="strength=0")
        (answer,) = send(made.gateway, [Call(CHAT, token, user_field, headers=headers)])
        request = made.defended.asked[f"{answer.headers['x-request-id']}-0"]
        record = made.gateway.keys.find(token)
        assert record is not None
        assert request.strength == tiers[name].strength
        assert request.watermark_key == record.watermark_key


# Licences --------------------------------------------------------------------------------------

NAMES = (
    "teacher:undefended",
    "teacher:undefended ",
    " teacher:undefended",
    "TEACHER:UNDEFENDED",
    "teacher:undefended\n",
    "teacher\uff1aundefended",
    "teacher%3Aundefended",
    "teacher :undefended",
    ":undefended",
    "undefended",
    "teacher:",
    "teacher/undefended",
    "teacher:undefended:undefended",
    "",
)


def test_a_usage_key_never_reaches_the_undefended_engine(guarded: Callable[..., Guarded]) -> None:
    made = guarded()
    named = (b"x-model", b"openai-model", b"openai-organization", b"openai-project", b"x-licence")
    headers = (
        *((name, b"teacher:undefended") for name in named),
        (b"x-http-method-override", b"GET"),
        (b"x-original-url", b"/v1/models/teacher:undefended"),
        (b"x-forwarded-for", b"127.0.0.1"),
    )
    routes = (
        "/v1/models/teacher:undefended",
        "/v1/models/teacher%3Aundefended",
        "/v1/engines/teacher:undefended/completions",
        "/v1/teacher:undefended/chat/completions",
        "/v1//chat/completions",
        "/v1/chat/completions/",
        "/v1/chat/completions/../completions",
        "/v1/chat/completions%3Fmodel=teacher:undefended",
        "/undefended/v1/chat/completions",
    )
    for token in made.keys.values():
        for path in (CHAT, TEXT):
            wrong = [
                Call(path, token, body(path, "joe has 2 eggs .", model=name), headers=headers)
                for name in NAMES
            ]
            for answer in send(made.gateway, wrong):
                assert answer.status_code == 404, answer.text
                check_refusal(answer)
                # Not even that there is one; the name that was asked for may be repeated.
                assert answer.json()["error"]["message"].endswith("for this key; there is teacher")
            right = body(path, "joe has 2 eggs .", max_tokens=2)
            (answer,) = send(made.gateway, [Call(path, token, right, headers=headers)])
            assert answer.status_code == 200
        (listed,) = send(made.gateway, [Call("/v1/models", token, method="GET")])
        assert [item["id"] for item in listed.json()["data"]] == ["teacher"]
        asked = body(CHAT, "joe has 2 eggs .", model="teacher:undefended")
        for method, route in itertools.product(("GET", "POST", "PUT"), routes):
            (answer,) = send(made.gateway, [Call(route, token, asked, method=method)])
            assert answer.status_code in {404, 405}, (method, route, answer.text)
            check_refusal(answer)
    assert made.undefended.asked == {}
    assert len(made.defended.asked) == 2 * len(made.keys)
    assert decisions(made.gateway, "licence") == []


def test_a_distillation_key_gets_the_undefended_teacher_by_its_name_alone(
    guarded: Callable[..., Guarded], reference: Reference, settled_usage: Any
) -> None:
    made = guarded(Policy(tiers={"open": wide(logprobs="topk", decimals=4)}))
    record, token = made.gateway.keys.create("lab", tier="open", licence="distillation")
    _, narrow = made.gateway.keys.create(
        "narrow", tier="open", licence="distillation", models=["teacher"]
    )
    name = f"teacher{UNDEFENDED}"
    asked = body(TEXT, questions(1)[0], logprobs=5)
    plain, clean, refused = send(
        made.gateway,
        [
            Call(TEXT, token, asked),
            Call(TEXT, token, {**asked, "model": name}),
            Call(TEXT, narrow, {**asked, "model": name}),
        ],
    )
    assert refused.status_code == 404
    for answer, recording, defended in (
        (plain, made.defended, True),
        (clean, made.undefended, False),
    ):
        id = f"{answer.headers['x-request-id']}-0"
        assert list(recording.asked) == [id]
        (choice,) = choices(answer).values()
        numbers = reference.numbers(
            recording.asked[id], recording.wrote[id], choice, defended=defended
        )
        assert (check(numbers, 4) > 50) == defended
        assert len(numbers) > 100
    assert clean.json()["model"] == name
    (line,) = decisions(made.gateway, "licence")
    assert (line["key"], line["request"]) == (record.id, clean.headers["x-request-id"])
    assert [item["key"] for item in decisions(made.gateway, "request")] == [record.id]
    # Each has a quota and a bill of its own.
    billed = {row.key: row.requests for row in settled_usage(made.gateway)}
    assert billed == {record.id: 1, record.id + UNDEFENDED: 1}


# A thief who reads subspaces -------------------------------------------------------------------


class GatewayOracle:
    """The thief of `azeotrope.subspace`, asking over HTTP."""

    def __init__(self, url: str, token: str, loaded: Loaded, path: str) -> None:
        self.client = httpx.Client(headers={"authorization": f"Bearer {token}"})
        self.url, self.loaded, self.path = url, loaded, path
        self.answered = 0

    def query(self, prompt_ids: Sequence[int], logit_bias: Mapping[int, float]) -> TopLogprobs:
        tokenizer = self.loaded.tokenizer
        shown = {"logprobs": True, "top_logprobs": 5} if self.path == CHAT else {"logprobs": 5}
        bias = {str(id): value for id, value in logit_bias.items()}
        more = {"logit_bias": bias, "max_tokens": 1, **shown}
        text = str(tokenizer.decode(list(prompt_ids)))
        answer = self.client.post(self.url + self.path, json=body(self.path, text, **more))
        if answer.status_code != 200:
            raise RefusedError(answer.json()["error"]["message"])
        self.answered += 1
        (choice,) = choices(answer).values()
        ids = {str(tokenizer.decode([id])): id for id in range(len(tokenizer))}
        return [(ids[name], value) for name, value in (choice.top or [{}])[0].items()]


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_a_thief_reads_no_subspace_off_the_gateway(
    path: str,
    guarded: Callable[..., Guarded],
    live_server: Callable[[FastAPI], str],
    teacher: Loaded,
) -> None:
    made = guarded()
    vocabulary = int(teacher.model.config.vocab_size)
    prompts = random_prompts(vocabulary, 20, length=6)
    url = live_server(create_app(made.gateway))
    for tier, answered, why in (
        ("trusted", 1, "logit_bias is not taken together with logprobs"),
        ("standard", 0, "this key gets no log-probabilities"),
    ):
        oracle = GatewayOracle(url, made.keys[tier], teacher, path)
        found = recover_subspace(oracle, prompts, sample_tokens(vocabulary))
        assert found.hidden_size is None
        assert (found.prompts, oracle.answered) == (0, answered)
        assert why in (found.refused or "")


def test_the_same_thief_reads_it_off_an_open_api() -> None:
    small = models.load("pocket/small", device="cpu").model
    vocabulary, hidden = int(small.config.vocab_size), int(small.config.hidden_size)
    found = recover_subspace(
        ModelOracle(small),
        random_prompts(vocabulary, hidden + 8, length=6),
        sample_tokens(vocabulary),
    )
    assert (found.hidden_size, found.saturated, found.refused) == (hidden, False, None)
