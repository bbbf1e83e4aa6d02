"""Hidden and summarized reasoning: exactly the answer is shown, and never too early."""

import pytest
from completions_made import (
    BOUNDARY,
    INSIDE,
    RULES,
    TRACE,
    boundaries,
    random_parts,
    texts,
)
from hypothesis import given
from hypothesis import strategies as st

from azeotrope.tokens import Boundary, without_reasoning
from gateway.answers.reading import ReadingRules, opening
from gateway.answers.reasoning import ReasoningFilter, count_sentences

ONE = "[1 step of reasoning is not shown]"


@given(st.data(), texts, boundaries)
def test_cut_shows_exactly_what_without_reasoning_leaves(
    data: st.DataObject, text: str, boundary: Boundary
) -> None:
    expected = without_reasoning(text, boundary)
    cut = ReasoningFilter("cut", ReadingRules(boundary))
    shown = ""
    for part in random_parts(data, text):
        shown += cut.feed(part)
        # Text that was sent cannot be taken back, so all of it must be part of the answer.
        assert expected.startswith(shown)
    assert shown + cut.flush() == expected


def test_a_tag_that_begins_another_is_not_taken_for_it() -> None:
    boundary = Boundary(open_tag="</think>4", close_tag="</think>")
    for text in ["a</think>4b</think>d", "a</think>5b</think>d", "a</think>", "a</think>4"]:
        cut = ReasoningFilter("cut", ReadingRules(boundary))
        shown = "".join(cut.feed(letter) for letter in text) + cut.flush()
        assert shown == without_reasoning(text, boundary)


@given(st.data(), texts, boundaries)
def test_shown_passes_everything_at_once(
    data: st.DataObject, text: str, boundary: Boundary
) -> None:
    passing = ReasoningFilter("shown", ReadingRules(boundary))
    for part in random_parts(data, text):
        assert passing.feed(part) == part
    assert passing.flush() == ""


@given(st.data(), texts, boundaries)
def test_a_summary_is_one_line_and_the_answer(
    data: st.DataObject, text: str, boundary: Boundary
) -> None:
    summary = ReasoningFilter("summary", ReadingRules(boundary))
    shown = "".join(summary.feed(part) for part in random_parts(data, text)) + summary.flush()
    answer = without_reasoning(text, boundary)
    line = shown.removesuffix(answer).removesuffix("\n")
    assert line == "" or line.endswith("of reasoning is not shown]") or "steps" in line
    assert shown == (f"{line}\n{answer}" if line and answer else line + answer)


@pytest.mark.parametrize(
    ("text", "summary"),
    [
        (TRACE, "[2 steps of reasoning are not shown]\n#### 4"),
        ("at first 2. </think> #### 4", "[1 step of reasoning is not shown]\n#### 4"),
        ("<think> at first 2. 2 doubles", "[2 steps of reasoning are not shown]"),
        ("so 2. #### 4", "[1 step of reasoning is not shown]\n#### 4"),
        ("#### 4", "#### 4"),
        ("<think></think>4", "4"),
        # This may be reasoning or an answer, so it is hidden.
        ("a story. its end.", "[2 steps of reasoning are not shown]"),
    ],
)
def test_summaries_of_every_kind_of_completion(text: str, summary: str) -> None:
    whole = ReasoningFilter("summary", RULES)
    assert whole.feed(text) + whole.flush() == summary


def test_an_answer_streams_once_the_reasoning_is_closed() -> None:
    cut = ReasoningFilter("cut", RULES)
    fed = [cut.feed(part) for part in ["so 2. </thi", "nk", "> ", "####", " 4", " \n", "."]]
    assert fed == ["", "", "", "####", " 4", "", " \n."]


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("at first 2. 2 doubles to 4.", 2),
        ("1. add 3.5 to 2\n2. it is 5.5!\n\n", 2),
        ("2+2=4", 1),
        ("首先是二。然后是四。", 2),
        (" \n . ", 0),
        ("", 0),
    ],
)
def test_sentences_are_counted(text: str, steps: int) -> None:
    assert count_sentences(text) == steps


@given(st.data(), texts, boundaries)
def test_reasoning_of_the_prompt_is_cut_as_if_it_were_the_text_s_own(
    data: st.DataObject, text: str, boundary: Boundary
) -> None:
    opening_tag = opening(f"4 {boundary.open_tag} 4", boundary)
    assert opening_tag == boundary.open_tag
    expected = without_reasoning(opening_tag + text, boundary)
    cut = ReasoningFilter("cut", ReadingRules(boundary, opening_tag))
    shown = ""
    for part in random_parts(data, text):
        shown += cut.feed(part)
        assert expected.startswith(shown)
    assert shown + cut.flush() == expected


@given(st.data(), st.integers(0, len(INSIDE)), st.sampled_from(["<think>", "<thi", "<"]))
def test_nothing_is_shown_of_reasoning_that_is_cut_off(
    data: st.DataObject, length: int, opening_tag: str
) -> None:
    # The same wherever it is cut, and however it comes.
    text = ("<think>" + INSIDE)[len(opening_tag) :][: length + 7 - len(opening_tag)]
    cut = ReasoningFilter("cut", ReadingRules(BOUNDARY, opening_tag))
    summary = ReasoningFilter("summary", ReadingRules(BOUNDARY, opening_tag))
    divided = random_parts(data, text)
    assert "".join(map(cut.feed, divided)) + cut.flush() == ""
    line = "".join(map(summary.feed, divided)) + summary.flush()
    assert line in {"", *(f"[{n} steps of reasoning are not shown]" for n in range(2, 9)), ONE}
    assert bool(line) == any(map(str.isalnum, text.removeprefix("nk>").removeprefix("think>")))
