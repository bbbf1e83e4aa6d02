"""The gateway gives every request an allowed answer or an error in OpenAI's shape.

The requests are drawn from the gateway's own description and then damaged, see `fuzzing`. Their
number is `AZEOTROPE_FUZZ`: 1,500 by default, 10,000 in continuous integration.
"""

import itertools
import json
import os
from collections import Counter
from typing import Any

import httpx
from fuzzing import Fuzzer
from witness import (
    Call,
    Choice,
    Recording,
    Reference,
    check,
    check_refusal,
    choices,
    events,
    send,
)

from azeotrope.engine.protocol import Engine
from azeotrope.tokens import Boundary, decode, spans
from gateway.audit import engine_fields, probes
from gateway.http.app import create_app
from gateway.policy import Policy, Tier
from gateway.service import Gateway

COUNT = int(os.environ.get("AZEOTROPE_FUZZ") or (10_000 if os.environ.get("CI") else 1_500))
BATCH = 500
DECIMALS = 4
REFUSALS = {400, 401, 403, 404, 405, 413, 422, 503}

_EVENT = {"id", "object", "created", "model", "choices"}
_PLACES = {
    "": {*_EVENT, "usage"},
    "usage": {"prompt_tokens", "completion_tokens", "total_tokens"},
    "choices": {"index", "message", "delta", "text", "logprobs", "finish_reason"},
    "choices.message": {"role", "content", "refusal"},
    "choices.delta": {"role", "content"},
    "choices.logprobs": {
        *("content", "refusal", "tokens", "token_logprobs", "top_logprobs", "text_offset"),
    },
    "choices.logprobs.content": {"token", "bytes", "logprob", "top_logprobs"},
    "choices.logprobs.content.top_logprobs": {"token", "bytes", "logprob"},
}
"""Every key that an answer may have, by its position."""
_BY_TOKEN = "choices.logprobs.top_logprobs"
"""The log-probabilities of completions, whose keys are tokens."""


def check_keys(value: Any, place: str = "") -> None:
    if isinstance(value, list):
        for item in value:
            check_keys(item, place)
    elif isinstance(value, dict) and place != _BY_TOKEN:
        assert set(value) <= _PLACES[place], (place, sorted(value))
        for name, inner in value.items():
            check_keys(inner, f"{place}.{name}" if place else name)


def tiers() -> dict[str, Tier]:
    """Tiers with all kinds of rules, and completions short enough for thousands of requests."""
    limits = {"requests_per_minute": 10**6, "tokens_per_minute": 10**9, "tokens_per_day": 10**9}
    short = {**limits, "concurrency": 10**6, "max_tokens": 6, "decimals": DECIMALS}
    return {
        "plain": Tier(**short),
        "numbers": Tier(**short, logprobs="topk", bans=True),
        "one": Tier(**short, logprobs="top1", strength=1.0),
        "hidden": Tier(**{**short, "max_tokens": 40}, logprobs="topk", bans=True, reasoning="cut"),
    }


def unknown_fields() -> list[str]:
    fields = engine_fields.read()
    rulings = (fields.chat, fields.completion, fields.sampling)
    named = {name for item in rulings for name in item.names}
    return sorted(named | set(probes.SWITCHES) | set(probes.TEXT_SWITCHES))


def check_completion(call: Call, answer: httpx.Response) -> None:
    streams = answer.headers["content-type"].startswith("text/event-stream")
    for part in events(answer.text) if streams else [answer.json()]:
        check_keys(part)
        assert part["model"] == "teacher", call


def check_said(
    choice: Choice, id: str, hidden: bool, defended: Recording, reference: Reference
) -> int:
    """The answer is of the defended model and has no reasoning that the tier hides."""
    request, wrote = defended.asked[id], defended.wrote[id]
    whole = decode(reference.loaded.tokenizer, wrote)
    if hidden:
        _, span = spans(whole, Boundary())
        whole = whole[span.start : span.end].strip()
    # A stop string ends the answer earlier.
    assert whole.startswith(choice.text), (whole, choice.text)
    return check(reference.numbers(request, wrote, choice), DECIMALS)


def check_refused(call: Call, answer: httpx.Response) -> None:
    assert answer.status_code in REFUSALS, (call, answer.text)
    if call.method == "HEAD":
        return
    check_refusal(answer)
    if answer.status_code == 503:
        assert int(answer.headers["retry-after"]) > 0
    # The undefended model is named only to clients that named it themselves.
    asked = call.body if isinstance(call.body, bytes) else json.dumps(call.body).encode()
    if b"undefended" not in asked.lower() and "undefended" not in call.path:
        assert "undefended" not in answer.text.replace(call.method, ""), (call, answer.text)


def test_no_request_breaks_the_gateway_or_gets_more_than_it_may(
    gateway_factory: Any, marked: Engine, engine: Engine, reference: Reference
) -> None:
    defended, undefended = Recording(marked), Recording(engine)
    gateway: Gateway = gateway_factory(
        Policy(tiers=tiers()), engine=defended, undefended=undefended
    )
    keys = {gateway.keys.create(name, tier=name)[1]: name for name in gateway.policy.tiers}
    fuzzer = Fuzzer(create_app(gateway).openapi(), list(keys), unknown_fields())
    found: Counter[Any] = Counter()
    calls = fuzzer.calls(COUNT)
    while batch := list(itertools.islice(calls, BATCH)):
        for call, answer in zip(batch, send(gateway, batch), strict=True):
            found[answer.status_code] += 1
            if answer.status_code != 200:
                check_refused(call, answer)
            elif "x-request-id" in answer.headers:
                check_completion(call, answer)
                hidden = keys[call.token or ""] == "hidden"
                for index, choice in choices(answer).items():
                    id = f"{answer.headers['x-request-id']}-{index}"
                    found["telling"] += check_said(choice, id, hidden, defended, reference)
        assert undefended.asked == {}
        defended.asked.clear()
        defended.wrote.clear()
    # Enough requests were answered, with values that differ between the two distributions.
    assert found[200] > COUNT // 8, found
    assert found[400] > COUNT // 20, found
    assert found[422] > COUNT // 20, found
    assert found["telling"] > COUNT // 20, found
