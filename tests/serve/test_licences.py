"""The undefended model is available by a distillation licence and in no other way."""

import itertools
from collections.abc import Callable
from typing import Any

from witness import (
    CHAT,
    TEXT,
    Call,
    Guarded,
    Reference,
    body,
    check,
    check_refusal,
    choices,
    decisions,
    questions,
    send,
    wide,
)

from gateway.accounts.key_records import UNDEFENDED
from gateway.policy import Policy

NAMES = (
    "teacher:undefended",
    "teacher:undefended ",
    " teacher:undefended",
    "TEACHER:UNDEFENDED",
    "teacher:undefended\n",
    "teacher\uff1aundefended",
    "teacher%3Aundefended",
    "teacher :undefended",
    ":undefended",
    "undefended",
    "teacher:",
    "teacher/undefended",
    "teacher:undefended:undefended",
    "",
)


def test_a_usage_key_never_reaches_the_undefended_engine(guarded: Callable[..., Guarded]) -> None:
    made = guarded()
    header_names = (
        b"x-model",
        b"openai-model",
        b"openai-organization",
        b"openai-project",
        b"x-licence",
    )
    headers = (
        *((name, b"teacher:undefended") for name in header_names),
        (b"x-http-method-override", b"GET"),
        (b"x-original-url", b"/v1/models/teacher:undefended"),
        (b"x-forwarded-for", b"127.0.0.1"),
    )
    routes = (
        "/v1/models/teacher:undefended",
        "/v1/models/teacher%3Aundefended",
        "/v1/engines/teacher:undefended/completions",
        "/v1/teacher:undefended/chat/completions",
        "/v1//chat/completions",
        "/v1/chat/completions/",
        "/v1/chat/completions/../completions",
        "/v1/chat/completions%3Fmodel=teacher:undefended",
        "/undefended/v1/chat/completions",
    )
    for token in made.keys.values():
        for path in (CHAT, TEXT):
            wrong = [
                Call(path, token, body(path, "joe has 2 eggs .", model=name), headers=headers)
                for name in NAMES
            ]
            for answer in send(made.gateway, wrong):
                assert answer.status_code == 404, answer.text
                check_refusal(answer)
                # The message repeats the requested name and reveals no other model.
                message = answer.json()["error"]["message"]
                assert message.endswith("for this key; it may use teacher")
            right = body(path, "joe has 2 eggs .", max_tokens=2)
            (answer,) = send(made.gateway, [Call(path, token, right, headers=headers)])
            assert answer.status_code == 200
        (listed,) = send(made.gateway, [Call("/v1/models", token, method="GET")])
        assert [item["id"] for item in listed.json()["data"]] == ["teacher"]
        undefended = body(CHAT, "joe has 2 eggs .", model="teacher:undefended")
        for method, route in itertools.product(("GET", "POST", "PUT"), routes):
            (answer,) = send(made.gateway, [Call(route, token, undefended, method=method)])
            assert answer.status_code in {404, 405}, (method, route, answer.text)
            check_refusal(answer)
    assert made.undefended.asked == {}
    assert len(made.defended.asked) == 2 * len(made.keys)
    assert decisions(made.gateway, "licence") == []


def test_a_distillation_key_gets_the_undefended_teacher_by_its_name_alone(
    guarded: Callable[..., Guarded], reference: Reference, settled_usage: Any
) -> None:
    made = guarded(Policy(tiers={"open": wide(logprobs="topk", decimals=4)}))
    record, token = made.gateway.keys.create("lab", tier="open", licence="distillation")
    _, narrow = made.gateway.keys.create(
        "narrow", tier="open", licence="distillation", models=["teacher"]
    )
    name = f"teacher{UNDEFENDED}"
    fields = body(TEXT, questions(1)[0], logprobs=5)
    plain, clean, refused = send(
        made.gateway,
        [
            Call(TEXT, token, fields),
            Call(TEXT, token, {**fields, "model": name}),
            Call(TEXT, narrow, {**fields, "model": name}),
        ],
    )
    assert refused.status_code == 404
    for answer, recording, defended in (
        (plain, made.defended, True),
        (clean, made.undefended, False),
    ):
        id = f"{answer.headers['x-request-id']}-0"
        assert list(recording.asked) == [id]
        (choice,) = choices(answer).values()
        numbers = reference.numbers(
            recording.asked[id], recording.wrote[id], choice, defended=defended
        )
        assert (check(numbers, 4) > 50) == defended
        assert len(numbers) > 100
    assert clean.json()["model"] == name
    (line,) = decisions(made.gateway, "licence")
    assert (line["key"], line["request"]) == (record.id, clean.headers["x-request-id"])
    assert [item["key"] for item in decisions(made.gateway, "request")] == [record.id]
    # Each model has a quota and a bill of its own.
    billed = {row.key: row.requests for row in settled_usage(made.gateway)}
    assert billed == {record.id: 1, record.id + UNDEFENDED: 1}
