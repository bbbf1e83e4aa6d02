"""What clients send without meaning anything is taken; what would change the answer is named."""

import json
from typing import Any

import pytest

from gateway.errors import ApiError
from gateway.http.requests import ChatRequest, CompletionRequest, parse

NEUTRAL: dict[str, Any] = {
    "frequency_penalty": 0,
    "presence_penalty": 0.0,
    "tools": [],
    "functions": [],
    "tool_choice": "auto",
    "response_format": {"type": "text"},
    "modalities": ["text"],
    "store": False,
    "metadata": {"run": "7"},
    "service_tier": "auto",
    "parallel_tool_calls": True,
    "safety_identifier": "user-1",
    "prompt_cache_key": "k",
    "some_field_of_next_year": None,
    "reasoning_effort": None,
    "stop": None,
    "temperature": None,
}
CHANGING: dict[str, Any] = {
    "frequency_penalty": 0.5,
    "presence_penalty": -1,
    "tools": [{"type": "function"}],
    "tool_choice": "required",
    "response_format": {"type": "json_object"},
    "modalities": ["audio"],
    "store": True,
    "best_of": 4,
    "echo": True,
    "suffix": "end",
    "service_tier": "flex",
    "metadata": {"run": 7},
    "prompt_cache_key": 5,
}
ANSWER: dict[str, Any] = {
    "role": "assistant",
    "content": "four",
    "refusal": None,
    "annotations": [],
    "audio": None,
    "function_call": None,
    "tool_calls": [],
    "reasoning_content": "two and two",
    "parsed": {"answer": 4},
}


def body(**more: Any) -> bytes:
    turns = [{"role": "user", "content": "2 + 2 ?"}]
    return json.dumps({"model": "m", "messages": turns, **more}).encode()


@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_values_are_taken(name: str) -> None:
    assert parse(ChatRequest, body(**{name: NEUTRAL[name]})) == parse(ChatRequest, body())


def test_they_are_taken_together_and_in_completions() -> None:
    assert parse(ChatRequest, body(**NEUTRAL)) == parse(ChatRequest, body())
    plain = {"model": "m", "prompt": "2 + 2"}
    more = {"echo": False, "best_of": 1, "suffix": "", "frequency_penalty": 0, "logprobs": None}
    bodies = [json.dumps(one).encode() for one in (plain, {**plain, **more})]
    assert parse(CompletionRequest, bodies[0]) == parse(CompletionRequest, bodies[1])


@pytest.mark.parametrize("name", CHANGING)
def test_values_that_would_change_the_answer_are_refused_by_name(name: str) -> None:
    with pytest.raises(ApiError, match=name) as error:
        parse(ChatRequest, body(**{name: CHANGING[name]}))
    assert error.value.status in (400, 422)


def test_unknown_fields_with_a_value_stay_refused() -> None:
    with pytest.raises(ApiError, match="unknown fields: prompt_logprobs"):
        parse(ChatRequest, body(prompt_logprobs=1))


def test_answers_are_sent_back_as_they_came() -> None:
    turns = [{"role": "user", "content": "a"}, ANSWER, {"role": "user", "content": "b"}]
    request = parse(ChatRequest, body(messages=turns))
    assert request.messages[1].plain() == {"role": "assistant", "content": "four"}
    empty = {**ANSWER, "content": None}
    request = parse(ChatRequest, body(messages=[turns[0], empty, turns[2]]))
    assert request.messages[1].plain() == {"role": "assistant", "content": ""}


def test_other_turns_need_a_content() -> None:
    with pytest.raises(ApiError, match="content"):
        parse(ChatRequest, body(messages=[{"role": "user", "content": None}]))
    with pytest.raises(ApiError, match="tool_calls"):
        parse(ChatRequest, body(messages=[{**ANSWER, "tool_calls": [{"id": "x"}]}]))
