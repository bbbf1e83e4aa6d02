"""The fields of a request, and the engine requests that follow from them."""

import json
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from azeotrope.tokens import encode_prompt
from gateway.coarse import CELL
from gateway.errors import ApiError
from gateway.http.requests import ChatRequest, CompletionRequest, parse
from gateway.plan import MOST_COMPLETIONS, ModelLimits, Plan, plan
from gateway.policy import Tier

QUESTION = "joe has 2 eggs ."
CONTEXT = 64


def chat(**more: Any) -> ChatRequest:
    body = {"model": "m", "messages": [{"role": "user", "content": QUESTION}], **more}
    return parse(ChatRequest, json.dumps(body).encode())


def text(**more: Any) -> CompletionRequest:
    return parse(CompletionRequest, json.dumps({"model": "m", "prompt": QUESTION, **more}).encode())


def planned(
    word: PreTrainedTokenizerFast, request: Any, *, seed_key: bytes = b"secret", **tier: Any
) -> Plan:
    model = ModelLimits(word, CONTEXT, len(word))
    return plan(request, Tier(**tier), model, identity="r", seed_key=seed_key)


def refusal(call: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        call()
    return caught.value


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"prompt_logprobs": 0}, "prompt_logprobs"),
        ({"vllm_xargs": {}, "echo": True}, "echo, vllm_xargs"),
        ({"stream": True, "stream_options": {"stray": 1}}, "stream_options.stray"),
        ({"messages": [{"role": "user", "content": "a", "stray": 1}]}, "messages.0.stray"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "x": 1}]}]},
            "messages.0.content.0.x",
        ),
    ],
)
def test_unknown_fields_are_named_at_any_depth(more: dict[str, Any], named: str) -> None:
    error = refusal(lambda: chat(**more))
    assert error.status == 422
    assert error.message.startswith(f"unknown fields: {named};")
    assert error.body()["error"]["code"] == "unknown_field"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"", None),
        (b"[]", None),
        (b"\xff\xfe", None),
        (b'{"model": "m"}', "messages"),
        (b'{"model": "m", "messages": []}', "messages"),
        (b'{"model": "m", "messages": [{"role": "tool", "content": "a"}]}', "messages.0.role"),
        (b'{"model": 1, "messages": [{"role": "user", "content": "a"}]}', "model"),
    ],
)
def test_bodies_that_do_not_fit_are_refused_with_the_field(body: bytes, param: str | None) -> None:
    error = refusal(lambda: parse(ChatRequest, body))
    assert (error.status, error.param) == (400, param)


@pytest.mark.parametrize(
    "more",
    [
        {"n": 0},
        {"n": "1"},
        {"temperature": -0.1},
        {"temperature": 2.1},
        {"top_p": 0},
        {"max_tokens": 0},
        {"top_logprobs": 2},
        {"logprobs": True, "top_logprobs": 21},
        {"stop": ["a", "b", "c", "d", "e"]},
        {"stop": ""},
        {"stream_options": {"include_usage": True}},
        {"logprobs": True, "logit_bias": {"5": -100}},
        {"seed": 2**64},
    ],
)
def test_values_out_of_range_are_refused(more: dict[str, Any]) -> None:
    assert refusal(lambda: chat(**more)).status == 400


def test_not_a_number_is_refused() -> None:
    body = b'{"model": "m", "prompt": "a", "temperature": NaN}'
    assert refusal(lambda: parse(CompletionRequest, body)).param == "temperature"


def test_a_chat_is_encoded_by_the_chat_template(word: PreTrainedTokenizerFast) -> None:
    ids = encode_prompt(word, [{"role": "user", "content": QUESTION}])
    result = planned(word, chat(max_tokens=7, temperature=0.5, top_p=0.9, seed=3))
    (request,) = result.requests
    assert request.prompt == ids
    assert (request.max_tokens, request.temperature) == (7, 0.5)
    assert request.top_p == pytest.approx(0.9, abs=CELL / 2)
    assert (request.logprobs, request.banned) == (None, ())
    assert request.seed is not None
    assert request.seed >= 0
    assert (result.prompt_tokens, result.completion_tokens) == (len(ids), 7)
    # The parts of a message's text are joined.
    parts = [{"type": "text", "text": "joe has "}, {"type": "text", "text": "2 eggs ."}]
    same = planned(word, chat(messages=[{"role": "user", "content": parts}], seed=3))
    assert same.requests[0].prompt == ids
    # Some evaluation harnesses add the type of the text to the message.
    named = [{"type": "text", "role": "user", "content": QUESTION}]
    assert planned(word, chat(messages=named)).requests[0].prompt == ids


def test_the_rest_of_the_context_bounds_an_answer(word: PreTrainedTokenizerFast) -> None:
    ids = encode_prompt(word, [{"role": "user", "content": QUESTION}])
    assert planned(word, chat()).requests[0].max_tokens == CONTEXT - len(ids)
    assert planned(word, chat(max_tokens=2000)).requests[0].max_tokens == CONTEXT - len(ids)
    error = refusal(lambda: planned(word, text(prompt="eggs " * CONTEXT)))
    assert error.code == "context_length_exceeded"
    assert str(CONTEXT) in error.message


def test_completions_of_one_request_have_seeds_of_their_own(word: PreTrainedTokenizerFast) -> None:
    one = planned(word, text(prompt=["joe", "eggs"], n=2, seed=5))
    seeds = [request.seed for request in one.requests]
    assert len(set(seeds)) == 4
    # A client cannot know them, and those of other customers are different.
    assert 5 not in seeds
    elsewhere = planned(word, text(prompt=["joe", "eggs"], n=2, seed=5), seed_key=b"another")
    assert not {request.seed for request in elsewhere.requests} & set(seeds)
    assert seeds == [
        r.seed for r in planned(word, text(prompt=["joe", "eggs"], n=2, seed=5)).requests
    ]
    # A prompt counts once, whatever its number of completions.
    assert one.prompt_tokens == len({r.prompt for r in one.requests}) * len(one.requests[0].prompt)
    assert [r.id for r in one.requests] == ["r-0", "r-1", "r-2", "r-3"]
    without = [planned(word, text()).requests[0].seed for _ in range(2)]
    assert without[0] != without[1]


def test_a_tier_bounds_requests(word: PreTrainedTokenizerFast) -> None:
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (chat(n=5), {"n": 4}, "n"),
        (chat(max_tokens=9), {"max_tokens": 8}, "max_tokens"),
        (chat(temperature=0), {"temperature": (0.5, 1)}, "temperature"),
        (chat(temperature=1.5), {"temperature": (0, 1)}, "temperature"),
        (chat(top_p=1e-9), {"top_p": (0.5, 1)}, "top_p"),
        (chat(top_p=1), {"top_p": (0.5, 0.9)}, "top_p"),
        (text(top_p=0.4), {"top_p": (0.5, 1)}, "top_p"),
        (chat(logprobs=True), {}, "logprobs"),
        (chat(logprobs=True, top_logprobs=2), {"logprobs": "top1"}, "logprobs"),
        (chat(logprobs=True, top_logprobs=4), {"logprobs": "topk", "top_k": 3}, "logprobs"),
        (text(logprobs=0), {}, "logprobs"),
        (chat(logit_bias={"5": -100}), {}, "logit_bias"),
        (chat(logit_bias={"5": -99}), {"bans": True}, "logit_bias"),
        (chat(logit_bias={"5": 100}), {"bans": True}, "logit_bias"),
        (chat(logit_bias={str(len(word)): -100}), {"bans": True}, "logit_bias"),
        (chat(logit_bias={"-1": -100}), {"bans": True}, "logit_bias"),
        (chat(logit_bias={"x": -100}), {"bans": True}, "logit_bias"),
    ]
    for request, tier, param in cases:
        error = refusal(lambda request=request, tier=tier: planned(word, request, **tier))
        assert (error.status, error.param) == (400, param), (request, tier)


def test_allowed_values_reach_the_engine(word: PreTrainedTokenizerFast) -> None:
    topk = planned(word, chat(logprobs=True, top_logprobs=3), logprobs="topk", strength=0.5)
    assert (topk.requests[0].logprobs, topk.requests[0].strength) == (3, 0.5)
    assert planned(word, chat(logprobs=True), logprobs="top1").requests[0].logprobs == 0
    assert planned(word, text(logprobs=1), logprobs="top1").requests[0].logprobs == 1
    bans = planned(word, chat(logit_bias={"5": -100, "3": -100}), bans=True)
    assert bans.requests[0].banned == (3, 5)
    # Without a value of the client, the default of 1 moves into the tier's bounds.
    assert planned(word, chat(), temperature=(0.2, 0.7)).requests[0].temperature == 0.7
    assert planned(word, chat(), top_p=(0.2, 0.7)).requests[0].top_p == 0.7
    assert planned(word, chat(), top_p=(0.2, 1)).requests[0].top_p == 1
    low = planned(word, chat(top_p=0.2), top_p=(0.2, 0.7)).requests[0].top_p
    assert 0.2 <= low <= 0.2 + CELL / 2
    assert 0 < planned(word, chat(top_p=1e-9)).requests[0].top_p <= CELL


def test_too_many_completions_at_once_are_refused(word: PreTrainedTokenizerFast) -> None:
    request = text(prompt=["eggs"] * 33, n=2)
    assert MOST_COMPLETIONS < 33 * 2
    assert refusal(lambda: planned(word, request)).param == "n"


def test_an_empty_prompt_is_refused(word: PreTrainedTokenizerFast) -> None:
    error = refusal(lambda: planned(word, text(prompt="")))
    assert error.status == 400
