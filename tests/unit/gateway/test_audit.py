"""The outcomes of an audit for answers in the form of real engines, written by hand."""

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from azeotrope.config import ConfigError
from gateway.audit.probes import PROMPT, messages
from gateway.audit.run import PATIENCE_S, TRIES, ProbeResult, audit, count
from workflows import audit as command

BASE = {"model", "max_tokens", "temperature"}


def chat(logprobs: Any = None, **more: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": "he has 1 ."}
    choice = {"index": 0, "message": message, "logprobs": logprobs, "finish_reason": "stop"}
    return {"id": "a", "object": "chat.completion", "choices": [choice], **more}


def text(words: str = "he has 1 .", logprobs: Any = None) -> dict[str, Any]:
    choice = {"index": 0, "text": words, "logprobs": logprobs, "finish_reason": "stop"}
    return {"id": "a", "object": "text_completion", "choices": [choice]}


def logprobs_of(value: float, width: int) -> dict[str, Any]:
    top = [{"token": f"t{rank}", "bytes": None, "logprob": value} for rank in range(width)]
    return {"content": [{"token": "t0", "bytes": None, "logprob": value, "top_logprobs": top}]}


def is_ordinary(body: dict[str, Any]) -> bool:
    words = {name: value for name, value in body.items() if name not in BASE}
    return words in ({"messages": messages()}, {"prompt": PROMPT})


class Server:
    """Answers ordinary requests and those with a prepared answer; refuses all others."""

    def __init__(self, *answers: tuple[dict[str, Any], Any]) -> None:
        self.answers = answers
        """Pairs: fields that the body must have, and the answer (JSON, events or a status)."""

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "m"}]})
        if request.headers.get("authorization") != "Bearer k":
            return httpx.Response(401)
        body = json.loads(request.content or b"{}")
        for fields, answer in self.answers:
            if fields.items() <= body.items():
                return self._answer(answer)
        if is_ordinary(body):
            is_chat = request.url.path == "/v1/chat/completions"
            return httpx.Response(200, json=chat() if is_chat else text())
        return httpx.Response(404 if not body else 422)

    def _answer(self, answer: Any) -> httpx.Response:
        if isinstance(answer, int):
            return httpx.Response(answer)
        if isinstance(answer, str):
            return httpx.Response(200, text=answer, headers={"content-type": "text/event-stream"})
        return httpx.Response(200, json=answer)


Handler = Callable[[httpx.Request], httpx.Response]


def audit_of(
    server: Handler, sleep: Callable[[float], None] = lambda _: None
) -> dict[str, ProbeResult]:
    with httpx.Client(transport=httpx.MockTransport(server)) as client:
        listed = audit("http://here/v1", "k", client=client, sleep=sleep)
    assert len(listed) == count()
    return {result.probe: result for result in listed}


def results_of(*answers: tuple[dict[str, Any], Any]) -> dict[str, ProbeResult]:
    return audit_of(Server(*answers))


def body_of(request: httpx.Request) -> dict[str, Any]:
    return json.loads(request.content or b"{}")


def events(*parts: dict[str, Any]) -> str:
    return "".join(f"data: {json.dumps(part)}\n\n" for part in parts) + "data: [DONE]\n\n"


def test_a_server_that_refuses_everything_holds() -> None:
    assert {result.outcome for result in results_of().values()} == {"held"}


@pytest.mark.parametrize(
    ("probe", "fields", "answer", "seen"),
    [
        (
            "prompt_logprobs=1",
            {"prompt_logprobs": 1},
            chat(prompt_logprobs=[None, {"5": {"logprob": -0.5, "rank": 1}}]),
            "log-probabilities of the prompt",
        ),
        (
            "echo, no tokens",
            {"echo": True, "prompt": PROMPT},
            text(f"{PROMPT} 1"),
            "the prompt is echoed",
        ),
        (
            "logit_bias and logprobs",
            {"logit_bias": {"5": 100, "6": 100}},
            chat(logprobs_of(-0.25, 5)),
            "log-probabilities under a bias",
        ),
        (
            "completions: the same",
            {"logit_bias": {"5": 100, "6": 100}, "prompt": PROMPT},
            text(
                logprobs={"tokens": ["a"], "token_logprobs": [-0.5], "top_logprobs": [{"a": -0.5}]}
            ),
            "log-probabilities under a bias",
        ),
        (
            "top_logprobs=20",
            {"top_logprobs": 20},
            chat(logprobs_of(-1, 20)),
            "20 log-probabilities",
        ),
        ("precision", {"top_logprobs": 5}, chat(logprobs_of(-0.123456789, 5)), "-0.123456789"),
        (
            "chat: return_token_ids",
            {"return_token_ids": True, "top_logprobs": 5},
            chat(),
            "",
        ),
    ],
)
def test_the_leak_in_an_answer_is_named(
    probe: str, fields: dict[str, Any], answer: dict[str, Any], seen: str
) -> None:
    result = results_of((fields, answer))[probe]
    assert result.outcome == ("leaked" if seen else "held")
    assert seen in result.seen


def test_an_accepted_switch_may_leak_or_not() -> None:
    switch = {"return_token_ids": True}
    assert results_of((switch, chat()))["chat: return_token_ids"].outcome == "accepted"
    # vLLM sends fields that are not set as null.
    empty = chat(prompt_token_ids=None, prompt_logprobs=None)
    assert results_of((switch, empty))["chat: return_token_ids"].outcome == "accepted"
    result = results_of((switch, chat(prompt_token_ids=[5, 6])))["chat: return_token_ids"]
    assert (result.outcome, result.seen) == ("leaked", "fields prompt_token_ids")


def test_answers_without_the_leaking_part_hold() -> None:
    rounded = results_of(({"top_logprobs": 5}, chat(logprobs_of(-0.1235, 5))))
    assert rounded["precision"].outcome == "held"
    ignored = results_of(({"prompt_logprobs": 1}, chat(prompt_logprobs=None)))
    assert ignored["prompt_logprobs=1"].outcome == "held"


def test_every_event_of_a_stream_is_judged() -> None:
    fields = {"stream": True, "top_logprobs": 5}
    exact = events(chat(logprobs_of(-0.5, 5)), chat(logprobs_of(-0.123456789, 5)))
    assert results_of((fields, exact))["stream with logprobs"].outcome == "leaked"
    assert results_of((fields, events(chat())))["stream with logprobs"].outcome == "held"
    stray = {"stream": True, "stream_options": {"include_usage": True, "stray": 1}}
    name = "stray field in stream_options"
    assert results_of((stray, events(chat())))[name].outcome == "accepted"
    late = events(chat(), chat(prompt_token_ids=[5]))
    assert results_of((stray, late))[name].outcome == "leaked"


def test_nothing_is_known_about_a_server_that_fails() -> None:
    broken = results_of(({"prompt_logprobs": 1}, 500), ({"stream": True}, 503))
    assert broken["prompt_logprobs=1"].outcome == "unclear"
    assert broken["stream"].outcome == "unclear"


def test_an_endpoint_that_does_not_answer_cannot_be_audited() -> None:
    for server in (
        lambda _: httpx.Response(404),
        lambda request: httpx.Response(200, json={"data": []}),
    ):
        with (
            httpx.Client(transport=httpx.MockTransport(server)) as client,
            pytest.raises(ValueError, match=r"lists no model|answers with 404"),
        ):
            audit("http://here/v1", "k", client=client)


def test_a_busy_server_gets_the_request_again_after_its_wait() -> None:
    server, waits, refused = Server(), [], set()

    def busy(request: httpx.Request) -> httpx.Response:
        call = (request.url.path, request.content)
        if call in refused:
            return server(request)
        refused.add(call)
        status = 429 if len(refused) % 2 else 503
        return httpx.Response(status, headers={"retry-after": "2"})

    results = audit_of(busy, waits.append)
    assert {result.outcome for result in results.values()} == {"held"}
    assert set(waits) == {2.0}
    assert len(waits) >= count() - 4


@pytest.mark.parametrize(
    ("headers", "waits"),
    [
        ({"retry-after": "1"}, [1.0] * (TRIES - 1)),
        ({}, []),
        ({"retry-after": "3600"}, []),
        ({"retry-after": "Wed, 21 Oct 2026 07:28:00 GMT"}, []),
    ],
)
def test_a_server_that_stays_busy_is_unclear(headers: dict[str, str], waits: list[float]) -> None:
    server, waited = Server(), []

    def busy(request: httpx.Request) -> httpx.Response:
        if "echo" in body_of(request) and request.url.path == "/v1/chat/completions":
            return httpx.Response(429, headers=headers)
        return server(request)

    result = audit_of(busy, waited.append)["chat: echo"]
    assert (result.outcome, result.seen) == ("unclear", "status 429")
    assert waited == waits


def test_a_server_that_is_always_busy_passes_no_probe_and_the_audit_ends() -> None:
    server, waited = Server(), []

    def busy(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models" or is_ordinary(body_of(request)):
            return server(request)
        return httpx.Response(503, headers={"retry-after": "30"})

    results = audit_of(busy, waited.append)
    held = {name for name, result in results.items() if result.outcome == "held"}
    # Requests without a valid key are refused before the load counts.
    assert held == {"no key", "an empty key", "another key", "another scheme"}
    assert {result.outcome for result in results.values()} == {"held", "unclear"}
    assert sum(waited) == PATIENCE_S


def test_an_answer_without_a_completion_is_unclear() -> None:
    empty = results_of(
        ({"stream": True}, events({"error": {}})), ({"top_logprobs": 5}, {"error": {}})
    )
    assert empty["stream"].outcome == "unclear"
    assert empty["precision"].outcome == "unclear"


class BoundedTemperature(Server):
    """Accepts some temperatures only."""

    def __init__(self, *answers: Any, allowed: tuple[float, ...]) -> None:
        super().__init__(*answers)
        self.allowed = allowed

    def __call__(self, request: httpx.Request) -> httpx.Response:
        body = body_of(request)
        if "model" in body and body.get("temperature", 0.3) not in self.allowed:
            return httpx.Response(400, json={"error": {"param": "temperature"}})
        if "temperature" not in body:
            request = httpx.Request(
                request.method,
                request.url,
                json=body | {"temperature": 0.3},
                headers={"authorization": request.headers.get("authorization", "")},
            )
        return super().__call__(request)


@pytest.mark.parametrize("allowed", [(1, 0.3), (0.3,)])
def test_a_minimum_temperature_hides_no_leak(allowed: tuple[float, ...]) -> None:
    leak = ({"prompt_logprobs": 1}, chat(prompt_logprobs=[None, {"5": {"logprob": -0.5}}]))
    results = audit_of(BoundedTemperature(leak, allowed=allowed))
    assert results["prompt_logprobs=1"].outcome == "leaked"
    assert results["echo"].seen == "refused with 422"


def test_a_route_that_the_key_may_not_use_is_unclear() -> None:
    server = Server()

    def scoped(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/completions":
            return httpx.Response(403, text="this key may not use completions")
        return server(request)

    results = audit_of(scoped)
    assert results["echo"].outcome == results["completions: stream"].outcome == "unclear"
    assert "403: this key may not use completions" in results["echo"].seen
    assert results["chat: echo"].outcome == "held"


def test_a_missing_route_leaks_nothing() -> None:
    server = Server()

    def chat_only(request: httpx.Request) -> httpx.Response:
        missing = request.url.path == "/v1/completions"
        return httpx.Response(404) if missing else server(request)

    echo = audit_of(chat_only)["echo"]
    assert echo.outcome == "held"
    assert "/completions is answered with 404" in echo.seen


def test_refusals_of_a_key_that_was_locked_out_are_unclear() -> None:
    server, probed = Server(), []

    def locking_out(request: httpx.Request) -> httpx.Response:
        probed.append("top_logprobs" in body_of(request))
        has_key = request.headers.get("authorization") == "Bearer k"
        return httpx.Response(403) if has_key and sum(probed) > 1 else server(request)

    results = audit_of(locking_out)
    assert results["prompt_logprobs=1"].outcome == "held"
    assert results["stray field"].outcome == "unclear"
    assert "no longer gets an ordinary answer: status 403" in results["stray field"].seen


def test_an_audit_needs_an_ordinary_answer() -> None:
    def refusing(request: httpx.Request) -> httpx.Response:
        models = request.url.path == "/v1/models"
        return httpx.Response(200, json={"data": [{"id": "m"}]}) if models else httpx.Response(403)

    with pytest.raises(ValueError, match=r"ordinary request to /chat/completions .* with 403"):
        audit_of(refusing)


@pytest.mark.parametrize("outcome", ["held", "unclear", "accepted", "leaked"])
def test_the_command_passes_if_everything_held(
    outcome: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    items = [ProbeResult("a", "held", "[/] seen"), ProbeResult("b", outcome, "")]
    monkeypatch.setattr(command.run, "audit", lambda *_, **__: items)
    assert command.main("http://here/v1", "k") == int(outcome != "held")
    output = capsys.readouterr().out
    assert "[/] seen" in output
    assert ("did not pass" in output) == (outcome == "unclear")
    with pytest.raises(ConfigError, match="a URL such as"):
        command.main("here", "k")
