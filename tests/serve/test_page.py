"""The page at `/`: its content, and who may use it."""

import json
import re
from typing import TYPE_CHECKING

import pytest

from azeotrope.tasks import JsonlConfig, build
from gateway.errors import ApiError
from gateway.http import playground, showcase
from gateway.http.playground import PAGE, page_policy
from gateway.http.showcase import Throttle, first_problems

if TYPE_CHECKING:
    pass
from page_requests import TASK, ask, bearer, send, with_page


def test_the_undefended_side_exists_only_in_a_demonstration(gateway_factory, small_engine):
    gateway = gateway_factory(undefended=small_engine)
    _, token = gateway.keys.create("alice", licence="distillation")
    app = with_page(gateway)
    assert ask(app, "undefended").status_code == 404
    # A licence does not open it on the page: keys with one use /v1.
    assert ask(app, "undefended", headers=bearer(token)).status_code == 404
    assert send(app, "GET", "/playground/problems").json()["sides"] == ["defended"]
    # The same holds for a demonstration without an undefended teacher.
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
def test_only_the_tasks_own_problems_can_be_asked(gateway_factory, engine, body, status):
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
def test_a_demonstration_is_for_this_machine_only(gateway_factory, engine, path, tmp_path):
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


def test_visitors_are_limited_on_each_side(gateway_factory, engine, monkeypatch):
    monkeypatch.setattr(showcase, "QUESTIONS_PER_MINUTE", 1)
    app = with_page(gateway_factory(undefended=engine), demo=True)
    assert ask(app, "defended").status_code == 200
    assert ask(app, "undefended").status_code == 200
    refused = ask(app, "undefended")
    assert refused.status_code == 429
    assert 1 <= int(refused.headers["retry-after"]) <= 60


def test_a_throttle_counts_the_last_minute(monkeypatch):
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


def test_the_listing_has_questions_and_no_answers(gateway_factory):
    listing = send(with_page(gateway_factory(name="mine")), "GET", "/playground/problems").json()
    expected = build(TASK).problems("test", showcase.MOST_PROBLEMS)
    assert listing == {
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
    problems = first_problems(build(JsonlConfig(train=str(path), test=str(path))))
    assert [problem.answer for problem in problems] == ["1", "2", "3"]


def test_without_its_task_the_page_has_no_problems_and_the_rest_works(
    gateway_factory, tmp_path, caplog
):
    path = tmp_path / "gone.jsonl"
    task = JsonlConfig(train=str(path), test=str(path))
    app = with_page(gateway_factory(), task=task, demo=True)
    assert "the page has no problems" in caplog.text
    assert send(app, "GET", "/playground/problems").json()["problems"] == []
    assert ask(app).status_code == 400
    assert send(app, "GET", "/healthz").status_code == 200


def test_the_report_is_one_file_that_cannot_run_scripts(gateway_factory, tmp_path):
    report = tmp_path / "report.html"
    app = with_page(gateway_factory(), report=report)
    assert send(app, "GET", "/report").status_code == 404
    report.write_text("<p>gain removed</p>")
    response = send(app, "GET", "/report")
    assert response.text == "<p>gain removed</p>"
    assert response.headers["content-security-policy"].startswith("sandbox; default-src 'none'")
    assert send(app, "GET", "/report/../report.html").status_code == 404
    assert send(with_page(gateway_factory()), "GET", "/report").status_code == 404


def test_the_page_loads_nothing_from_other_sites(gateway_factory):
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
