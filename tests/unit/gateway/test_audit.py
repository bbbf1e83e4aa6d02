"""What an audit says about answers as engines give them, written by hand."""

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


def text(said: str = "he has 1 .", logprobs: Any = None) -> dict[str, Any]:
    choice = {"index": 0, "text": said, "logprobs": logprobs, "finish_reason": "stop"}
    return {"id": "a", "object": "text_completion", "choices": [choice]}


def shown(value: float, width: int) -> dict[str, Any]:
    top = [{"token": f"t{place}", "bytes": None, "logprob": value} for place in range(width)]
    return {"content": [{"token": "t0", "bytes": None, "logprob": value, "top_logprobs": top}]}


def is_ordinary(body: dict[str, Any]) -> bool:
    words = {name: value for name, value in body.items() if name not in BASE}
    return words in ({"messages": messages()}, {"prompt": PROMPT})


class Server:
    """Refuses what it has no answer for, and answers ordinary requests."""

    def __init__(self, *answers: tuple[dict[str, Any], Any]) -> None:
        self.answers = answers
        """(what the body must hold, the answer: JSON, text of events, or a status)."""

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "m"}]})
        if request.headers.get("authorization") != "Bearer k":
            return httpx.Response(401)
        body = json.loads(request.content or b"{}")
        for wanted, answer in self.answers:
            if wanted.items() <= body.items():
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


def asked(
    server: Handler, sleep: Callable[[float], None] = lambda _: None
) -> dict[str, ProbeResult]:
    with httpx.Client(transport=httpx.MockTransport(server)) as client:
        listed = audit("http://here/v1", "k", client=client, sleep=sleep)
    assert len(listed) == count()
    return {item.probe: item for item in listed}


def found(*answers: tuple[dict[str, Any], Any]) -> dict[str, ProbeResult]:
    return asked(Server(*answers))


def body_of(request: httpx.Request) -> dict[str, Any]:
    return json.loads(request.content or b"{}")


def events(*parts: dict[str, Any]) -> str:
    return "".join(f"data: {json.dumps(part)}\n\n" for part in parts) + "data: [DONE]\n\n"


def test_a_server_that_refuses_everything_holds() -> None:
    assert {item.outcome for item in found().values()} == {"held"}


@pytest.mark.parametrize(
    ("probe", "wanted", "answer", "seen"),
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
            chat(shown(-0.25, 5)),
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
        ("top_logprobs=20", {"top_logprobs": 20}, chat(shown(-1, 20)), "20 log-probabilities"),
        ("precision", {"top_logprobs": 5}, chat(shown(-0.123456789, 5)), "-0.123456789"),
        (
            "chat: return_token_ids",
            {"return_token_ids": True, "top_logprobs": 5},
            chat(),
            "",
        ),
    ],
)
def test_what_an_answer_shows_is_named(
    probe: str, wanted: dict[str, Any], answer: dict[str, Any], seen: str
) -> None:
    item = found((wanted, answer))[probe]
    assert item.outcome == ("leaked" if seen else "held")
    assert seen in item.seen


def test_a_switch_that_was_taken_may_leak_or_not() -> None:
    taken = {"return_token_ids": True}
    assert found((taken, chat()))["chat: return_token_ids"].outcome == "accepted"
    # vLLM sends fields that are not set as null.
    empty = chat(prompt_token_ids=None, prompt_logprobs=None)
    assert found((taken, empty))["chat: return_token_ids"].outcome == "accepted"
    item = found((taken, chat(prompt_token_ids=[5, 6])))["chat: return_token_ids"]
    assert (item.outcome, item.seen) == ("leaked", "fields prompt_token_ids")


def test_answers_without_the_leaking_part_hold() -> None:
    rounded = found(({"top_logprobs": 5}, chat(shown(-0.1235, 5))))
    assert rounded["precision"].outcome == "held"
    ignored = found(({"prompt_logprobs": 1}, chat(prompt_logprobs=None)))
    assert ignored["prompt_logprobs=1"].outcome == "held"


def test_every_event_of_a_stream_is_judged() -> None:
    wanted = {"stream": True, "top_logprobs": 5}
    exact = events(chat(shown(-0.5, 5)), chat(shown(-0.123456789, 5)))
    assert found((wanted, exact))["stream with logprobs"].outcome == "leaked"
    assert found((wanted, events(chat())))["stream with logprobs"].outcome == "held"
    stray = {"stream": True, "stream_options": {"include_usage": True, "stray": 1}}
    name = "stray field in stream_options"
    assert found((stray, events(chat())))[name].outcome == "accepted"
    late = events(chat(), chat(prompt_token_ids=[5]))
    assert found((stray, late))[name].outcome == "leaked"


def test_a_server_that_breaks_says_nothing() -> None:
    broken = found(({"prompt_logprobs": 1}, 500), ({"stream": True}, 503))
    assert broken["prompt_logprobs=1"].outcome == "unclear"
    assert broken["stream"].outcome == "unclear"


def test_an_endpoint_that_does_not_answer_is_no_finding() -> None:
    for server in (
        lambda _: httpx.Response(404),
        lambda request: httpx.Response(200, json={"data": []}),
    ):
        with (
            httpx.Client(transport=httpx.MockTransport(server)) as client,
            pytest.raises(ValueError, match=r"lists no model|answers with 404"),
        ):
            audit("http://here/v1", "k", client=client)


# Refusals that say nothing -------------------------------------------------------------------


def test_a_busy_server_is_asked_again_when_it_says() -> None:
    server, waits, refused = Server(), [], set()

    def busy(request: httpx.Request) -> httpx.Response:
        asked_before = (request.url.path, request.content)
        if asked_before in refused:
            return server(request)
        refused.add(asked_before)
        status = 429 if len(refused) % 2 else 503
        return httpx.Response(status, headers={"retry-after": "2"})

    results = asked(busy, waits.append)
    assert {item.outcome for item in results.values()} == {"held"}
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
def test_a_server_that_stays_busy_is_given_up(headers: dict[str, str], waits: list[float]) -> None:
    server, waited = Server(), []

    def busy(request: httpx.Request) -> httpx.Response:
        if "echo" in body_of(request) and request.url.path == "/v1/chat/completions":
            return httpx.Response(429, headers=headers)
        return server(request)

    item = asked(busy, waited.append)["chat: echo"]
    assert (item.outcome, item.seen) == ("unclear", "status 429")
    assert waited == waits


def test_a_server_that_is_always_busy_passes_nothing_and_ends() -> None:
    server, waited = Server(), []

    def busy(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models" or is_ordinary(body_of(request)):
            return server(request)
        return httpx.Response(503, headers={"retry-after": "30"})

    results = asked(busy, waited.append)
    held = {name for name, item in results.items() if item.outcome == "held"}
    # The doors that strangers find shut are the server's own answers.
    assert held == {"no key", "an empty key", "another key", "another scheme"}
    assert {item.outcome for item in results.values()} == {"held", "unclear"}
    assert sum(waited) == PATIENCE_S


def test_an_answer_without_a_completion_says_nothing() -> None:
    empty = found(({"stream": True}, events({"error": {}})), ({"top_logprobs": 5}, {"error": {}}))
    assert empty["stream"].outcome == "unclear"
    assert empty["precision"].outcome == "unclear"


class Careful(Server):
    """Takes temperatures in a range alone."""

    def __init__(self, *given: Any, allowed: tuple[float, ...]) -> None:
        super().__init__(*given)
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
def test_a_least_temperature_hides_no_leak(allowed: tuple[float, ...]) -> None:
    leak = ({"prompt_logprobs": 1}, chat(prompt_logprobs=[None, {"5": {"logprob": -0.5}}]))
    results = asked(Careful(leak, allowed=allowed))
    assert results["prompt_logprobs=1"].outcome == "leaked"
    assert results["echo"].seen == "refused with 422"


def test_a_key_without_a_route_is_said() -> None:
    server = Server()

    def scoped(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/completions":
            return httpx.Response(403, text="this key may not use completions")
        return server(request)

    results = asked(scoped)
    assert results["echo"].outcome == results["completions: stream"].outcome == "unclear"
    assert "403: this key may not use completions" in results["echo"].seen
    assert results["chat: echo"].outcome == "held"


def test_a_route_that_is_not_there_leaks_nothing() -> None:
    server = Server()

    def chat_only(request: httpx.Request) -> httpx.Response:
        missing = request.url.path == "/v1/completions"
        return httpx.Response(404) if missing else server(request)

    echo = asked(chat_only)["echo"]
    assert echo.outcome == "held"
    assert "/completions is answered with 404" in echo.seen


def test_a_key_that_is_shut_out_on_the_way_sees_nothing() -> None:
    server, probed = Server(), []

    def shutting(request: httpx.Request) -> httpx.Response:
        probed.append("top_logprobs" in body_of(request))
        named = request.headers.get("authorization") == "Bearer k"
        return httpx.Response(403) if named and sum(probed) > 1 else server(request)

    results = asked(shutting)
    assert results["prompt_logprobs=1"].outcome == "held"
    assert results["stray field"].outcome == "unclear"
    assert "no ordinary answer any more: status 403" in results["stray field"].seen


def test_no_ordinary_answer_is_no_finding() -> None:
    def refusing(request: httpx.Request) -> httpx.Response:
        models = request.url.path == "/v1/models"
        return httpx.Response(200, json={"data": [{"id": "m"}]}) if models else httpx.Response(403)

    with pytest.raises(ValueError, match=r"ordinary request to /chat/completions .* with 403"):
        asked(refusing)


@pytest.mark.parametrize("outcome", ["held", "unclear", "accepted", "leaked"])
def test_the_command_passes_if_everything_held(
    outcome: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    items = [ProbeResult("a", "held", "[/] seen"), ProbeResult("b", outcome, "")]
    monkeypatch.setattr(command.run, "audit", lambda *_, **__: items)
    assert command.main("http://here/v1", "k") == int(outcome != "held")
    shown = capsys.readouterr().out
    assert "[/] seen" in shown
    assert ("did not pass" in shown) == (outcome == "unclear")
    with pytest.raises(ConfigError, match="a URL such as"):
        command.main("here", "k")
