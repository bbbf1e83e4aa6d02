"""Answers on the page at `/`, and their bills."""

import contextlib
import re
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from witness import FullLog

from azeotrope.engine.protocol import Chunk, EngineError, EngineRequest
from azeotrope.engine.transformers import TransformersEngine
from azeotrope.tasks import build
from gateway.policy import Policy, Tier

if TYPE_CHECKING:
    pass
from page_requests import TASK, ask, bearer, events, send, text_of, with_page


def test_the_answer_to_a_key_and_its_bill_equal_those_of_the_api(gateway_factory, settled_usage):
    gateway = gateway_factory()
    record, token = gateway.keys.create("alice")
    app = with_page(gateway)
    problem = build(TASK).problems("test", 4)[3]
    answer = ask(app, problem=3, headers=bearer(token))
    [page_bill] = settled_usage(gateway)
    body = {
        "model": "teacher",
        "messages": [{"role": "user", "content": problem.question}],
        "temperature": 0,
    }
    api = send(app, "POST", "/v1/chat/completions", json=body, headers=bearer(token)).json()
    [both_bills] = settled_usage(gateway)

    assert text_of(answer) == api["choices"][0]["message"]["content"]
    name, verdict = events(answer)[-1]
    assert (name, verdict["tokens"]) == ("verdict", api["usage"]["completion_tokens"])
    assert verdict["correct"] is build(TASK).check(text_of(answer), problem.answer)
    assert (page_bill.key, page_bill.requests) == (record.id, 1)
    assert page_bill.prompt_tokens == api["usage"]["prompt_tokens"]
    assert page_bill.completion_tokens == verdict["tokens"]
    assert both_bills.completion_tokens == 2 * page_bill.completion_tokens


def test_a_key_has_its_tiers_rules_and_quota(gateway_factory):
    policy = Policy(tiers={"standard": Tier(reasoning="cut", requests_per_minute=1)})
    gateway = gateway_factory(policy)
    _, token = gateway.keys.create("alice")
    _, completions = gateway.keys.create("bob", features=("completions",))
    app = with_page(gateway)
    answer = ask(app, headers=bearer(token))
    assert re.fullmatch(r"#### \d+", text_of(answer))
    assert events(answer)[-1][1]["correct"] is True
    # Hidden tokens are billed too.
    assert events(answer)[-1][1]["tokens"] > 20
    assert ask(app, headers=bearer(token)).status_code == 429
    assert ask(app, headers=bearer(completions)).status_code == 403


def test_visitors_get_both_sides_without_a_key(gateway_factory, small_engine, settled_usage):
    policy = Policy(tiers={"other": Tier(), "standard": Tier(reasoning="cut")})
    gateway = gateway_factory(policy, undefended=small_engine)
    record, _ = gateway.keys.create("alice")
    app = with_page(gateway, demo=True)
    defended, undefended = ask(app, "defended", 1), ask(app, "undefended", 1)
    # The tier's rules hold for the defended side. The undefended side shows its reasoning.
    assert "<think>" not in text_of(defended)
    assert text_of(undefended).startswith("<think>")
    # Repeated questions give the same single completion of each problem.
    assert text_of(ask(app, "undefended", 1)) == text_of(undefended)
    assert {row.key for row in settled_usage(gateway)} == {"demo", "demo:undefended"}
    assert gateway.keys.list() == [record]


def test_the_sides_differ_only_by_the_defense(gateway_factory, engine):
    policy = Policy(tiers={"standard": Tier(temperature=(0.8, 1.0))})
    app = with_page(gateway_factory(policy, undefended=engine), demo=True)
    sides = [text_of(ask(app, side, 2)) for side in ("defended", "undefended")]
    assert sides[0] == sides[1] != ""


def test_an_engine_that_fails_is_an_error_and_not_an_empty_answer(gateway_factory, teacher):
    engine = TransformersEngine(teacher)
    engine.close()
    response = ask(with_page(gateway_factory(engine=engine), demo=True))
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "engine_error"


class DyingEngine:
    """A real engine whose process ends after the first token."""

    def __init__(self, engine: TransformersEngine) -> None:
        self._engine = engine

    async def generate(self, request: EngineRequest) -> AsyncIterator[Chunk]:
        async with contextlib.aclosing(self._engine.generate(request)) as chunks:
            first = await anext(chunks)
            yield Chunk(first.tokens[:1])
        raise EngineError("the process ended")


def test_a_failure_after_the_first_token_ends_without_a_verdict(
    gateway_factory, engine, settled_usage
):
    gateway = gateway_factory(engine=DyingEngine(engine))
    _, token = gateway.keys.create("alice")
    response = ask(with_page(gateway), headers=bearer(token))
    assert text_of(response) == "<think>"
    assert [name for name, _ in events(response)] == ["text", "error"]
    assert events(response)[-1][1]["error"]["code"] == "engine_error"
    # The tokens that were sent are billed, and no more.
    assert [row.completion_tokens for row in settled_usage(gateway)] == [1]


def test_an_answer_that_cannot_be_logged_ends_without_a_verdict(gateway_factory, tmp_path):
    gateway = gateway_factory()
    _, token = gateway.keys.create("alice")
    gateway.log = FullLog(tmp_path / "full", room=1)
    parts = events(ask(with_page(gateway), headers=bearer(token)))
    assert "verdict" not in dict(parts)
    assert parts[-1][0] == "error"
    assert parts[-1][1]["error"]["code"] == "store_unavailable"
