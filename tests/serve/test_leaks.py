"""Nothing of the undefended model leaves the gateway by a field, a number or a header.

The engine under test has a decoding defense, so each log-probability has two possible values. The
tests tell which one the client received. The undefended engine records every request it gets.
"""

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

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
    questions,
    send,
    user,
    wide,
)

from gateway.audit import engine_fields, probes, run
from gateway.http.app import create_app
from gateway.http.neutral import REQUEST
from gateway.http.requests import ChatRequest, CompletionRequest
from gateway.policy import Policy

STRENGTHS = (0.5, None, 9.0)
"""None leaves the engine's own strength."""


@pytest.mark.parametrize("tier", sorted(Policy().tiers))
def test_all_probes_of_an_audit_hold(
    tier: str, guarded: Callable[..., Guarded], live_server: Callable[[FastAPI], str]
) -> None:
    made = guarded()
    url = live_server(create_app(made.gateway))
    results = run.audit(f"{url}/v1", made.keys[tier])
    assert [result for result in results if result.outcome != "held"] == []
    assert len(results) == run.count() > 100
    assert made.undefended.asked == {}
    assert made.defended.asked != {}


def test_an_audit_says_which_probes_were_not_answered(
    guarded: Callable[..., Guarded], live_server: Callable[[FastAPI], str]
) -> None:
    """A tier without temperature 0 is audited fully; a key for one route is not."""
    made = guarded(Policy(tiers={"careful": wide(temperature=(0.3, 1.0))}))
    url = live_server(create_app(made.gateway))
    results = {item.probe: item for item in run.audit(f"{url}/v1", made.keys["careful"])}
    assert {item.outcome for item in results.values()} == {"held"}
    for stream in ("stream", "completions: stream"):
        assert results[stream].seen == "nothing but text"
    assert results["chat: echo"].seen == "refused with 422"
    _, token = made.gateway.keys.create("chat alone", tier="careful", features=["chat"])
    results = {item.probe: item for item in run.audit(f"{url}/v1", token)}
    assert results["chat: echo"].outcome == "held"
    assert results["echo"].outcome == results["completions: stream"].outcome == "unclear"
    assert "403" in results["echo"].seen


def everywhere(path: str, extra: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A request with the same extra fields at each level that can have fields."""
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
    # Fields that the gateway accepts are judged by their values.
    kind = ChatRequest if path == CHAT else CompletionRequest
    return sorted(names - set(kind.model_fields))


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_fields_of_engines_are_unknown_at_every_level(
    path: str, guarded: Callable[..., Guarded]
) -> None:
    made = guarded(Policy(tiers={"open": wide(logprobs="topk", bans=True, decimals=4)}))
    values = {**probes.SWITCHES, **probes.TEXT_SWITCHES}
    calls: list[Call] = []
    names = forbidden(path)
    assert len(names) > 70
    for name in names:
        value = values.get(name, 1)
        if name in REQUEST and REQUEST[name](value):
            # Neutral, so that it is taken; another value of the field is not.
            value = 7
        calls += [Call(path, made.keys["open"], item) for item in everywhere(path, {name: value})]
    for call, answer in zip(calls, send(made.gateway, calls), strict=True):
        assert answer.status_code == 422, (call.body, answer.text)
        check_refusal(answer)
        assert answer.json()["error"]["code"] == "unknown_field"
    assert made.defended.asked == made.undefended.asked == {}


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_fields_that_are_null_change_nothing(path: str, guarded: Callable[..., Guarded]) -> None:
    made = guarded(Policy(tiers={"open": wide()}))
    asked = body(path, "joe has 2 eggs .", temperature=0)
    calls = [Call(path, made.keys["open"], {**asked, name: None}) for name in forbidden(path)]
    plain = Call(path, made.keys["open"], asked)
    texts = {
        choice.text
        for answer in send(made.gateway, [plain, *calls])
        for choice in choices(answer).values()
    }
    assert len(texts) == 1
    requests = {replace(request, id="", seed=0) for request in made.defended.asked.values()}
    assert len(requests) == 1
    assert made.undefended.asked == {}


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
        # If a name occurs twice, the last value counts. No other program reads the body.
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
def test_a_ban_never_comes_with_log_probabilities(
    path: str, guarded: Callable[..., Guarded]
) -> None:
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
        Call(path, token, body(path, "joe has 2 eggs .", logit_bias=bias, stream=stream, **fields))
        for token in made.keys.values()
        for bias in biases
        for fields in numbers
        for stream in (False, True)
    ]
    for answer in send(made.gateway, calls):
        assert answer.status_code == 400, answer.text
        check_refusal(answer)
    assert made.defended.asked == {}
    # A ban alone is accepted if the tier allows it, and the answer has no log-probabilities.
    ban = body(path, "joe has 2 eggs .", logit_bias={"5": -100})
    (answer,) = send(made.gateway, [Call(path, made.keys["topk-True"], ban)])
    (only,) = choices(answer).values()
    assert only.text
    assert only.tokens == only.values == only.top == []
    assert [request.banned for request in made.defended.asked.values()] == [(5,)]


def test_every_log_probability_is_of_the_defended_distribution(
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
            fields = {"logprobs": True, "top_logprobs": 5} if path == CHAT else {"logprobs": 5}
            for more in ({}, {"temperature": 1.2, "top_p": 0.9, "seed": 7, "n": 2}):
                request_body = body(path, question, stream=stream, **fields, **more)
                calls.append(Call(path, token, request_body))
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
    # Enough of the values differ between the distributions for the test to find a leak.
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
        for item in everywhere(path, {name: value})
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
