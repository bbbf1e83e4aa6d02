"""What an audit says about answers as engines give them, written by hand."""

import json
from typing import Any

import httpx
import pytest

from azeotrope.gateway.audit import Finding, audit, count
from azeotrope.gateway.probes import PROMPT


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


class Server:
    """Refuses what it has no answer for, and answers an ordinary request."""

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
        ordinary = {"model", "messages", "max_tokens"}
        if request.url.path == "/v1/chat/completions" and set(body) == ordinary:
            return httpx.Response(200, json=chat())
        return httpx.Response(404 if not body else 422)

    def _answer(self, answer: Any) -> httpx.Response:
        if isinstance(answer, int):
            return httpx.Response(answer)
        if isinstance(answer, str):
            return httpx.Response(200, text=answer, headers={"content-type": "text/event-stream"})
        return httpx.Response(200, json=answer)


def found(*answers: tuple[dict[str, Any], Any]) -> dict[str, Finding]:
    transport = httpx.MockTransport(Server(*answers))
    with httpx.Client(transport=transport) as client:
        listed = audit("http://here/v1", "k", client=client)
    assert len(listed) == count()
    return {item.probe: item for item in listed}


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
