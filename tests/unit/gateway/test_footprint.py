"""What is remembered of a request: keyed hashes and numbers, and whether it asks for reasoning."""

from dataclasses import asdict

import pytest
from traffic import START, ask

from gateway.extraction import footprint
from gateway.extraction.elicitation import asks_for_reasoning
from gateway.extraction.footprint import Observation


def test_an_observation_has_no_words() -> None:
    observation = asdict(
        ask("My secret is 42, Alice.", START, address="192.0.2.7", user_agent="curl/8")
    )
    assert not [value for value in observation.values() if isinstance(value, str | bytes)]


def test_hashes_compare_under_one_secret_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def hashed(text: str, secret: bytes) -> Observation:
        monkeypatch.setattr(footprint, "_SECRET", secret)
        return ask(text, START)

    one, two = b"1" * 16, b"2" * 16
    assert hashed("What is  2\nplus 3?", one).prompt == hashed("what is 2 plus 3?", one).prompt
    assert hashed("what is 2 plus 3?", one).prompt != hashed("what is 2 plus 4?", one).prompt
    assert hashed("what is 2 plus 3?", one).template == hashed("what is 7 plus 41.5?", one).template
    assert hashed("does Ann know?", one).template == hashed("does Bob know?", one).template
    first, second = hashed("a b c d e f g h i", one), hashed("a b c d e f g h i", two)
    for name in ("prompt", "template", "head", "tail", "ip_hash", "user_agent_hash"):
        assert getattr(first, name) != getattr(second, name)
    # Equal words have different hashes as a prompt, a template, a head and a tail.
    assert len({first.template, first.head, first.tail, first.prompt}) == 4


def test_short_prompts_have_no_form() -> None:
    assert ask("why not?", START).template is None
    assert ask("a b c d e f g h", START).head is None
    assert ask("a b c d e f g h i", START).head is not None


def test_the_middle_of_a_long_prompt_is_hashed_and_not_searched() -> None:
    filler = "a " * 5000
    first, second = ask(f"{filler}x {filler}", START), ask(f"{filler}y {filler}", START)
    assert first.prompt != second.prompt
    assert first.template == second.template
    assert ask(f"{filler} step by step", START).elicits_reasoning


def test_instructions_are_searched_too() -> None:
    assert ask("2 + 2?", START, instructions="Think aloud.").elicits_reasoning
    assert not ask("2 + 2?", START).elicits_reasoning


@pytest.mark.parametrize(
    "text",
    [
        "Solve it Step-by-Step.",
        "show me all of your work",
        "Explain your full thought process",
        "answer inside <think> tags",
        "Löse das SCHRITT für Schritt",
        "résous étape par étape",
        "resuélvelo paso a paso",
        "реши шаг за шагом",
        "请一步一步地解答",
        "ステップバイステップで",
        "단계별로 설명해 줘",
        "\uff53\uff54\uff45\uff50 by step",
    ],
)
def test_requests_for_reasoning_are_recognized(text: str) -> None:
    assert asks_for_reasoning(text)


@pytest.mark.parametrize(
    "text",
    ["what is the reason for rain?", "I like your work", "the last steps", "think of a name", ""],
)
def test_other_requests_are_not(text: str) -> None:
    assert not asks_for_reasoning(text)
