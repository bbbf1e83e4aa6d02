"""The page at `/`: what it shows, to whom, on whose bill, and in a real browser."""

import asyncio
import contextlib
import json
import os
import re
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2
import pytest
from fastapi import FastAPI
from witness import FullLog

from azeotrope import models
from azeotrope.engine.protocol import Chunk, EngineError, EngineRequest
from azeotrope.engine.transformers import TransformersEngine
from azeotrope.tasks import JsonlConfig, PocketConfig, TaskConfig, build
from gateway.errors import ApiError
from gateway.http import playground, showcase
from gateway.http.app import create_app
from gateway.http.playground import PAGE, add_page, page_policy
from gateway.http.showcase import Throttle, first_problems
from gateway.policy import Policy, Tier
from gateway.service import Gateway

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

TASK = PocketConfig()
ARTEFACTS = "AZEOTROPE_ARTEFACTS"
"""Names a folder that keeps the screenshots; without it they go to pytest's temporary one."""
WAIT_MS = 30_000


def with_page(
    gateway: Gateway, *, task: TaskConfig = TASK, demo: bool = False, report: Path | None = None
) -> FastAPI:
    app = create_app(gateway)
    app.state.gateway = gateway
    add_page(app, gateway, task, demo=demo, report=report)
    return app


def send(
    app: FastAPI, method: str, path: str, *, client: str = "127.0.0.1", **more: Any
) -> httpx2.Response:
    """One request, without a server. The event loop stays until its bill is written."""

    async def go() -> httpx2.Response:
        transport = httpx2.ASGITransport(app, client=(client, 1234))
        async with httpx2.AsyncClient(
            transport=transport, base_url="http://127.0.0.1:8000"
        ) as http:
            response = await http.request(method, path, **more)
        await app.state.gateway.open.close()
        return response

    return asyncio.run(go())


def ask(app: FastAPI, side: str = "defended", problem: Any = 0, **more: Any) -> httpx2.Response:
    body = {"problem": problem, "side": side}
    return send(app, "POST", "/playground/ask", json=body, **more)


def events(response: httpx2.Response) -> list[tuple[str, dict[str, Any]]]:
    found = re.findall(r"event: (\w+)\ndata: (.*)\n\n", response.text)
    return [(name, json.loads(data)) for name, data in found]


def text_of(response: httpx2.Response) -> str:
    assert response.status_code == 200, response.text
    return "".join(data["text"] for name, data in events(response) if name == "text")


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


@pytest.fixture(scope="module")
def other() -> Iterator[TransformersEngine]:
    """A teacher that writes something else, so that the sides cannot be taken for each other."""
    engine = TransformersEngine(models.load("pocket/small", device="cpu"))
    yield engine
    engine.close()


# Who may ask what ------------------------------------------------------------------------------


def test_the_undefended_side_exists_in_a_demonstration_alone(gateway_factory, engine, other):
    gateway = gateway_factory(undefended=other)
    _, token = gateway.keys.create("alice", licence="distillation")
    app = with_page(gateway)
    assert ask(app, "undefended").status_code == 404
    # Not even a licence opens it here: such a key has /v1.
    assert ask(app, "undefended", headers=bearer(token)).status_code == 404
    assert send(app, "GET", "/playground/problems").json()["sides"] == ["defended"]
    # A demonstration of a gateway that has no undefended teacher.
    assert ask(with_page(gateway_factory(), demo=True), "undefended").status_code == 404
    assert gateway.ledger.usage() == []


def test_without_a_valid_key_nothing_is_answered(gateway_factory):
    gateway = gateway_factory()
    record, token = gateway.keys.create("alice")
    gateway.keys.revoke(record.id)
    app = with_page(gateway)
    for headers in ({}, bearer("az-" + "x" * 43), bearer(token)):
        response = ask(app, headers=headers)
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
    assert gateway.ledger.usage() == []


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"problem": showcase.MOST_PROBLEMS, "side": "defended"}, 400),
        ({"problem": -1, "side": "defended"}, 400),
        ({"problem": "0", "side": "defended"}, 400),
        ({"problem": True, "side": "defended"}, 400),
        ({"problem": 0, "side": "both"}, 400),
        ({"problem": 0}, 400),
        ([0, "defended"], 400),
        ({"problem": 0, "side": "defended", "prompt": "hello"}, 422),
        ({"problem": 0, "side": "defended", "temperature": 1}, 422),
        ({"problem": 0, "side": "defended" + " " * playground.MOST_BYTES}, 413),
    ],
)
def test_nothing_but_the_tasks_own_problems_can_be_asked(gateway_factory, engine, body, status):
    app = with_page(gateway_factory(undefended=engine), demo=True)
    response = send(app, "POST", "/playground/ask", json=body)
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_a_body_that_another_site_could_send_is_refused(gateway_factory):
    app = with_page(gateway_factory(), demo=True)
    body = json.dumps({"problem": 0, "side": "defended"})
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        headers = {"content-type": kind}
        response = send(app, "POST", "/playground/ask", content=body, headers=headers)
        assert response.status_code == 415


@pytest.mark.parametrize("path", ["/", "/playground/problems", "/report"])
def test_a_demonstration_is_for_this_machine_alone(gateway_factory, engine, path, tmp_path):
    report = tmp_path / "report.html"
    report.write_text("<p>report</p>")
    app = with_page(gateway_factory(undefended=engine), demo=True, report=report)
    for host in ("localhost", "localhost:8000", "127.0.0.1:1", "127.8.8.8", "[::1]:8000"):
        assert send(app, "GET", path, headers={"host": host}).status_code == 200
    for host in (
        "evil.example",
        "127.0.0.1.evil.example:8000",
        "0.0.0.0",
        "10.0.0.1",
        "",
        "[",
        "@",
    ):
        assert send(app, "GET", path, headers={"host": host}).status_code == 403
        assert ask(app, "undefended", headers={"host": host}).status_code == 403
    assert send(app, "GET", path, client="10.0.0.7").status_code == 403
    assert ask(app, "undefended", client="10.0.0.7").status_code == 403


def test_visitors_are_counted_on_each_side(gateway_factory, engine, monkeypatch):
    monkeypatch.setattr(showcase, "QUESTIONS_PER_MINUTE", 1)
    app = with_page(gateway_factory(undefended=engine), demo=True)
    assert ask(app, "defended").status_code == 200
    assert ask(app, "undefended").status_code == 200
    refused = ask(app, "undefended")
    assert refused.status_code == 429
    assert 1 <= int(refused.headers["retry-after"]) <= 60


def test_a_throttle_lets_as_many_in_each_minute(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(showcase.time, "monotonic", lambda: now)
    throttle = Throttle(2)
    throttle.take()
    now = 1030.0
    throttle.take()
    now = 1045.0
    with pytest.raises(ApiError) as refused:
        throttle.take()
    assert refused.value.headers["retry-after"] == "15"
    now = 1060.0
    throttle.take()
    with pytest.raises(ApiError):
        throttle.take()


# What they get ---------------------------------------------------------------------------------


def test_a_keys_answer_is_the_apis_and_is_billed_like_it(gateway_factory, settled_usage):
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
    # Hidden tokens are paid for.
    assert events(answer)[-1][1]["tokens"] > 20
    assert ask(app, headers=bearer(token)).status_code == 429
    assert ask(app, headers=bearer(completions)).status_code == 403


def test_visitors_get_both_sides_on_nobodys_bill(gateway_factory, other, settled_usage):
    policy = Policy(tiers={"other": Tier(), "standard": Tier(reasoning="cut")})
    gateway = gateway_factory(policy, undefended=other)
    record, _ = gateway.keys.create("alice")
    app = with_page(gateway, demo=True)
    defended, undefended = ask(app, "defended", 1), ask(app, "undefended", 1)
    # The rules for those who get the defended teacher hold here; the other side shows everything.
    assert "<think>" not in text_of(defended)
    assert text_of(undefended).startswith("<think>")
    # However often they ask, they see one completion of each problem.
    assert text_of(ask(app, "undefended", 1)) == text_of(undefended)
    assert {row.key for row in settled_usage(gateway)} == {"demo", "demo:undefended"}
    assert gateway.keys.list() == [record]


def test_the_sides_differ_by_the_defense_alone(gateway_factory, engine):
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


class Dying:
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
    gateway = gateway_factory(engine=Dying(engine))
    _, token = gateway.keys.create("alice")
    response = ask(with_page(gateway), headers=bearer(token))
    assert text_of(response) == "<think>"
    assert [name for name, _ in events(response)] == ["text", "error"]
    assert events(response)[-1][1]["error"]["code"] == "engine_error"
    # What was seen is paid for, and no more.
    assert [row.completion_tokens for row in settled_usage(gateway)] == [1]


def test_an_answer_that_cannot_be_logged_ends_without_a_verdict(gateway_factory, tmp_path):
    gateway = gateway_factory()
    _, token = gateway.keys.create("alice")
    gateway.log = FullLog(tmp_path / "full", room=1)
    found = events(ask(with_page(gateway), headers=bearer(token)))
    assert "verdict" not in dict(found)
    assert found[-1][0] == "error"
    assert found[-1][1]["error"]["code"] == "store_unavailable"


def test_the_listing_has_questions_and_no_answers(gateway_factory):
    found = send(with_page(gateway_factory(name="mine")), "GET", "/playground/problems").json()
    expected = build(TASK).problems("test", showcase.MOST_PROBLEMS)
    assert found == {
        "model": "mine",
        "demo": False,
        "sides": ["defended"],
        "report": False,
        "problems": [
            {"index": index, "question": problem.question} for index, problem in enumerate(expected)
        ],
    }


def test_a_task_with_few_problems_shows_them_all(tmp_path):
    rows = [json.dumps({"question": f"what is {n} + 1?", "answer": str(n + 1)}) for n in range(3)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(rows))
    found = first_problems(build(JsonlConfig(train=str(path), test=str(path))))
    assert [problem.answer for problem in found] == ["1", "2", "3"]


def test_a_task_that_is_gone_costs_the_page_its_problems_and_nothing_else(
    gateway_factory, tmp_path, caplog
):
    path = tmp_path / "gone.jsonl"
    task = JsonlConfig(train=str(path), test=str(path))
    app = with_page(gateway_factory(), task=task, demo=True)
    assert "the page has no problems" in caplog.text
    assert send(app, "GET", "/playground/problems").json()["problems"] == []
    assert ask(app).status_code == 400
    assert send(app, "GET", "/healthz").status_code == 200


def test_the_report_is_one_file_that_cannot_run_anything(gateway_factory, tmp_path):
    report = tmp_path / "report.html"
    app = with_page(gateway_factory(), report=report)
    assert send(app, "GET", "/report").status_code == 404
    report.write_text("<p>gain removed</p>")
    found = send(app, "GET", "/report")
    assert found.text == "<p>gain removed</p>"
    assert found.headers["content-security-policy"].startswith("sandbox; default-src 'none'")
    assert send(app, "GET", "/report/../report.html").status_code == 404
    assert send(with_page(gateway_factory()), "GET", "/report").status_code == 404


def test_the_page_needs_nothing_from_elsewhere(gateway_factory):
    page = send(with_page(gateway_factory()), "GET", "/")
    assert page.text == PAGE.read_text()
    assert page.headers["cache-control"] == "no-store"
    assert page.headers["x-content-type-options"] == "nosniff"
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert not re.search(r"https?://|\bon\w+=\"|style=\"|innerHTML", page.text)
    # sha256 of "a" and of "b".
    assert page_policy("<script>a</script><style>b</style>").startswith(
        "default-src 'none'; script-src 'sha256-ypeBEsobvcr6wjGzmiPcTaeG7/gUfE5yuYB3ha/uSLs='; "
        "style-src 'sha256-PiPoFgA5WUoziU9lZOGxNIu9egCI1CxKy3PurtWcAJ0='; "
    )


# In a browser ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("no chromium on this machine (Debian: apt-get install chromium)")
    # Chromium's sandbox does not start for root.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: "Browser") -> "Iterator[Page]":
    """A tab; whatever it complains about, refused styles and scripts among it, fails the test."""
    context = browser.new_context(viewport={"width": 1100, "height": 900})
    page = context.new_page()
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on(
        "console",
        lambda message: complaints.append(message.text) if message.type == "error" else None,
    )
    yield page
    context.close()
    # Chromium reports every refused request, and the tests look at those themselves.
    assert [text for text in complaints if "Failed to load resource" not in text] == []


@pytest.fixture(scope="session")
def picture(tmp_path_factory: pytest.TempPathFactory) -> "Callable[[Page, str], None]":
    given = os.environ.get(ARTEFACTS)
    folder = Path(given) if given else tmp_path_factory.mktemp("pictures")
    folder.mkdir(parents=True, exist_ok=True)

    def take(page: "Page", name: str) -> None:
        page.screenshot(path=folder / f"{name}.png", full_page=True)

    return take


def wait_for_verdicts(page: "Page", count: int) -> list[str]:
    page.wait_for_function(
        "count => document.querySelectorAll('.badge').length === count", arg=count, timeout=WAIT_MS
    )
    return page.locator(".badge").all_inner_texts()


def test_a_demonstration_in_a_browser(
    page, picture, live_server, gateway_factory, engine, tmp_path
):
    report = tmp_path / "report.html"
    report.write_text("<title>report</title><h1>What it was worth</h1>")
    app = with_page(gateway_factory(undefended=engine), demo=True, report=report)
    page.goto(live_server(app))
    page.get_by_label("Problem").select_option("1")
    problem = build(TASK).problems("test", 2)[1]
    assert page.locator("#question").inner_text() == problem.question
    assert page.get_by_label("API key").is_hidden()
    assert page.get_by_text("DEMO: undefended").is_visible()
    picture(page, "demo-before")
    page.get_by_role("button", name="Ask").click()
    assert wait_for_verdicts(page, 2) == [f"\u2713 Correct: {problem.answer}"] * 2
    clean, defended = page.locator(".text").all_inner_texts()
    assert clean == defended
    assert build(TASK).check(clean, problem.answer)
    assert page.locator(".text[aria-busy=true]").count() == 0
    picture(page, "demo")
    page.get_by_role("link", name="report").click()
    assert page.get_by_role("heading", name="What it was worth").is_visible()


def test_both_sides_differ_and_say_where(page, picture, live_server, gateway_factory, other):
    page.goto(live_server(with_page(gateway_factory(undefended=other), demo=True)))
    page.get_by_role("button", name="Ask").click()
    wait_for_verdicts(page, 2)
    page.wait_for_selector("#legend:visible")
    clean, defended = page.locator(".text").all_inner_texts()
    assert clean != defended
    # Without what is marked, both say the same.
    same = page.evaluate(
        """() => [...document.querySelectorAll('.text')].map(text => {
            const copy = text.cloneNode(true);
            copy.querySelectorAll('mark').forEach(mark => mark.remove());
            return copy.textContent.split(/\\s+/).filter(Boolean).join(' ');
        })"""
    )
    assert same[0] == same[1] != ""
    picture(page, "demo-differences")
    page.emulate_media(color_scheme="dark")
    picture(page, "demo-dark")
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    picture(page, "demo-phone")


def test_a_key_in_a_browser(page, picture, live_server, gateway_factory, engine, settled_usage):
    # There is an undefended teacher, and the page must not know.
    gateway = gateway_factory(undefended=engine)
    record, token = gateway.keys.create("alice")
    page.goto(live_server(with_page(gateway)))
    page.get_by_role("button", name="Ask").click()
    error = page.locator("#defended .error")
    error.filter(has_text="valid API key").wait_for(timeout=WAIT_MS)
    assert page.get_by_label("API key").evaluate("field => field === document.activeElement")
    assert page.locator(".badge").count() == 0
    assert gateway.ledger.usage() == []
    picture(page, "key-missing")

    # By keyboard alone: the key, then Enter.
    page.keyboard.type(token)
    page.keyboard.press("Enter")
    [verdict] = wait_for_verdicts(page, 1)
    assert "Correct" in verdict
    assert error.inner_text() == ""
    assert page.get_by_text("Undefended teacher").is_hidden()
    assert "<think>" in page.locator("#defended .text").inner_text()
    # It came in pieces.
    assert page.locator("#defended .text").evaluate("text => text.childNodes.length") > 1
    [bill] = settled_usage(gateway)
    assert (bill.key, bill.requests) == (record.id, 1)
    shown = page.locator("#defended .count").inner_text()
    assert shown.startswith(f"{bill.completion_tokens} tokens in ")
    stored = page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}])")
    assert (stored, page.context.cookies()) == ("[{},{}]", [])
    picture(page, "key")


def test_an_engine_that_fails_is_said_in_a_browser(
    page, picture, live_server, gateway_factory, engine, teacher
):
    broken = TransformersEngine(teacher)
    broken.close()
    page.goto(live_server(with_page(gateway_factory(engine=broken, undefended=engine), demo=True)))
    page.get_by_role("button", name="Ask").click()
    page.locator("#defended .error").filter(has_text="The engine failed").wait_for(timeout=WAIT_MS)
    # The other side goes on.
    assert "Correct" in wait_for_verdicts(page, 1)[0]
    assert page.get_by_role("button", name="Ask").is_enabled()
    picture(page, "engine-failed")
