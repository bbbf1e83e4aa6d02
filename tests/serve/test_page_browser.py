"""The page at `/` in a real browser."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from azeotrope.engine.transformers import TransformersEngine
from azeotrope.tasks import build

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page
from page_requests import TASK, with_page

ARTEFACTS = "AZEOTROPE_ARTEFACTS"
"""The folder that keeps the screenshots; without it they are in pytest's temporary folder."""
WAIT_MS = 30_000


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
    """A tab. Its errors, such as refused styles and scripts, fail the test."""
    context = browser.new_context(viewport={"width": 1100, "height": 900})
    page = context.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on(
        "console",
        lambda message: errors.append(message.text) if message.type == "error" else None,
    )
    yield page
    context.close()
    # Chromium also reports refused requests. The tests check those themselves.
    assert [text for text in errors if "Failed to load resource" not in text] == []


@pytest.fixture(scope="session")
def picture(tmp_path_factory: pytest.TempPathFactory) -> "Callable[[Page, str], None]":
    configured = os.environ.get(ARTEFACTS)
    folder = Path(configured) if configured else tmp_path_factory.mktemp("pictures")
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


def test_differences_between_the_sides_are_marked(
    page, picture, live_server, gateway_factory, small_engine
):
    page.goto(live_server(with_page(gateway_factory(undefended=small_engine), demo=True)))
    page.get_by_role("button", name="Ask").click()
    wait_for_verdicts(page, 2)
    page.wait_for_selector("#legend:visible")
    clean, defended = page.locator(".text").all_inner_texts()
    assert clean != defended
    # Without the marked words both texts are equal.
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
    # There is an undefended teacher, but the page must not reveal it.
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

    # With the keyboard only: the key, then Enter.
    page.keyboard.type(token)
    page.keyboard.press("Enter")
    [verdict] = wait_for_verdicts(page, 1)
    assert "Correct" in verdict
    assert error.inner_text() == ""
    assert page.get_by_text("Undefended teacher").is_hidden()
    assert "<think>" in page.locator("#defended .text").inner_text()
    # The answer arrived in several pieces.
    assert page.locator("#defended .text").evaluate("text => text.childNodes.length") > 1
    [bill] = settled_usage(gateway)
    assert (bill.key, bill.requests) == (record.id, 1)
    count = page.locator("#defended .count").inner_text()
    assert count.startswith(f"{bill.completion_tokens} tokens in ")
    stored = page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}])")
    assert (stored, page.context.cookies()) == ("[{},{}]", [])
    picture(page, "key")


def test_a_failing_engine_is_reported_in_a_browser(
    page, picture, live_server, gateway_factory, engine, teacher
):
    broken = TransformersEngine(teacher)
    broken.close()
    page.goto(live_server(with_page(gateway_factory(engine=broken, undefended=engine), demo=True)))
    page.get_by_role("button", name="Ask").click()
    page.locator("#defended .error").filter(has_text="The engine failed").wait_for(timeout=WAIT_MS)
    # The other side continues.
    assert "Correct" in wait_for_verdicts(page, 1)[0]
    assert page.get_by_role("button", name="Ask").is_enabled()
    picture(page, "engine-failed")
