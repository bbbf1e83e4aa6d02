"""A tier that hides the reasoning shows the answer alone, wherever that began or was cut."""

import itertools
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
from witness import (
    CHAT,
    TEXT,
    Call,
    Guarded,
    Reference,
    body,
    check,
    choices,
    questions,
    send,
    wide,
)

from azeotrope.models import Loaded
from azeotrope.tokens import Boundary, decode, spans
from gateway.coarse import LENGTH_CELL
from gateway.policy import Policy


def summarised(text: str) -> tuple[str, str]:
    """The line of the summary, and the answer."""
    found = re.fullmatch(r"(\[\d+ steps? of reasoning (?:is|are) not shown\])?\n?(.*)", text)
    assert found is not None, text
    return found[1] or "", found[2]


@pytest.mark.parametrize("mode", ["cut", "summary"])
def test_no_word_of_the_reasoning_is_sent(
    mode: str, guarded: Callable[..., Guarded], teacher: Loaded, reference: Reference
) -> None:
    """At any length, streamed or not, with log-probabilities and with stop strings."""
    made = guarded(Policy(tiers={"hidden": wide(logprobs="topk", decimals=4, reasoning=mode)}))
    token, tokenizer = made.keys["hidden"], teacher.tokenizer
    calls: list[Call] = []
    for question in questions(4):
        for length in (1, 12, 28, 36, 50, 64, 80, 96, 120, 140):
            for path, stream in itertools.product((CHAT, TEXT), (False, True)):
                shown = {"logprobs": True, "top_logprobs": 5} if path == CHAT else {"logprobs": 5}
                for more in ({}, {"stop": ["is", "begins", "<", "> "]}):
                    asked = body(path, question, stream=stream, **shown, **more)
                    calls.append(Call(path, token, asked | {"max_tokens": length}))
    answers = send(made.gateway, calls)
    answered = 0
    for call, answer in zip(calls, answers, strict=True):
        id = f"{answer.headers['x-request-id']}-0"
        request, wrote = made.defended.asked[id], made.defended.wrote[id]
        whole = decode(tokenizer, wrote)
        _, span = spans(whole, Boundary())
        allowed = whole[span.start : span.end].strip()
        (choice,) = choices(answer).values()
        line, text = summarised(choice.text) if mode == "summary" else ("", choice.text)
        assert text == allowed, (call.body, whole)
        assert not set(line.split()) & {"begins", "so", "plus", "at", "that", "then"}
        # Log-probabilities belong to the visible words only.
        assert decode(tokenizer, [reference.ids[name] for name in choice.tokens]) == allowed
        check(reference.numbers(request, wrote, choice), 4)
        answered += bool(allowed)
        if not call.body["stream"]:
            # Hidden words are written and billed.
            # Their number is shown in cells, and billed exactly.
            told = answer.json()["usage"]["completion_tokens"]
            assert told % LENGTH_CELL == 0
            assert len(wrote) <= told <= len(wrote) + 2 * LENGTH_CELL
    assert answered > 20
    assert made.undefended.asked == {}


@pytest.mark.parametrize("mode", ["cut", "summary"])
def test_reasoning_that_the_prompt_opened_is_not_sent(
    mode: str, guarded: Callable[..., Guarded], teacher: Loaded, reference: Reference
) -> None:
    """Such a completion has no opening tag, and no closing tag if it is cut or may not write it."""
    policy = Policy(
        tiers={
            "hidden": wide(logprobs="topk", decimals=4, reasoning=mode),
            "banning": wide(bans=True, reasoning=mode),
        }
    )
    made = guarded(policy)
    # The reasoning contains words that look like the start of an answer.
    boundary = Boundary(answer_pattern="####|begins|so|at|is")
    made.gateway.model = replace(made.gateway.model, boundary=boundary)
    close = next(id for name, id in reference.ids.items() if name.strip() == "</think>")
    calls: list[Call] = []
    # Limits of hidden reasoning are rounded down to cells of 32 tokens.
    for question, length in itertools.product(questions(3), (1, 33, 45, 60, 96)):
        for path, stream in itertools.product((CHAT, TEXT), (False, True)):
            asked = body(path, f"{question} <think>", stream=stream, max_tokens=length, n=2)
            shown = {"logprobs": True, "top_logprobs": 5} if path == CHAT else {"logprobs": 5}
            calls.append(Call(path, made.keys["hidden"], asked | shown))
            calls.append(Call(path, made.keys["banning"], asked))
            ban = {"logit_bias": {str(close): -100}}
            calls.append(Call(path, made.keys["banning"], asked | ban))
    answered = tempting = 0
    for call, answer in zip(calls, send(made.gateway, calls), strict=True):
        found = choices(answer)
        assert len(found) == 2
        for index, choice in found.items():
            wrote = made.defended.wrote[f"{answer.headers['x-request-id']}-{index}"]
            whole = decode(teacher.tokenizer, wrote)
            assert "<think>" not in whole
            _, closed, after = whole.partition("</think>")
            _, text = summarised(choice.text) if mode == "summary" else ("", choice.text)
            assert text == after.strip(), (call.body, whole)
            names = [reference.ids[name] for name in choice.tokens]
            assert decode(teacher.tokenizer, names) == (text if "logprobs" in call.body else "")
            answered += bool(text)
            # This is the part that looks like an answer.
            tempting += not closed and bool(re.search(boundary.answer_pattern, whole))
    assert answered > 20
    assert tempting > 50


def test_a_ban_of_the_tags_shows_no_reasoning(
    guarded: Callable[..., Guarded], reference: Reference
) -> None:
    """A client that bans the tags that end the reasoning gets neither reasoning nor answer."""
    made = guarded(Policy(tiers={"hidden": wide(bans=True, reasoning="cut")}))
    ids = {name.strip(): id for name, id in reference.ids.items()}
    question = questions(1)[0]

    def asked(path: str, *names: str) -> Call:
        bias = {str(ids[name]): -100 for name in names}
        return Call(
            path, made.keys["hidden"], body(path, question, logit_bias=bias, max_tokens=120)
        )

    (plain,) = send(made.gateway, [asked(CHAT)])
    assert "####" in choices(plain)[0].text
    subsets = (["</think>"], ["</think>", "####"], ["<think>", "</think>", "####"])
    calls = [asked(path, *names) for names in subsets for path in (CHAT, TEXT)]
    for answer in send(made.gateway, calls):
        assert choices(answer)[0].text == ""
        assert len(made.defended.wrote[f"{answer.headers['x-request-id']}-0"]) > 20
