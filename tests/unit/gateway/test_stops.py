"""Stop strings."""

import pytest
from completions_made import random_parts
from hypothesis import given
from hypothesis import strategies as st

from gateway.answers.stops import StopStrings


@pytest.mark.parametrize(
    ("stops", "text", "answer"),
    [
        (["b"], "abc", "a"),
        (["bd"], "abcbd", "abc"),
        (["aab"], "aaab", "a"),
        # The stop that is complete first counts, and the longest of those that end together.
        (["abcd", "bc"], "abcd", "a"),
        (["bc", "abc"], "xabc", "x"),
        (["\n\n"], "a\nb\n\nc", "a\nb"),
        (["b"], "b", ""),
    ],
)
def test_the_first_stop_ends_the_text(stops: list[str], text: str, answer: str) -> None:
    for size in range(1, len(text) + 1):
        stream = StopStrings(stops)
        fed = [stream.feed(text[at : at + size]) for at in range(0, len(text), size)]
        assert "".join(piece for piece, _ in fed) + stream.flush() == answer
        assert fed[-1][1]


@given(st.data(), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3))
def test_stops_do_not_depend_on_how_the_text_comes(data: st.DataObject, stops: list[str]) -> None:
    text = data.draw(st.text("ab", max_size=12))
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    expected = text[: min(ends)[1]] if ends else text
    stream = StopStrings(stops)
    fed = [stream.feed(part) for part in random_parts(data, text)]
    assert "".join(piece for piece, _ in fed) + stream.flush() == expected
    assert any(stopped for _, stopped in fed) == bool(ends)


def test_only_what_may_become_a_stop_is_held_back() -> None:
    stream = StopStrings(["</end>"])
    assert stream.feed("a < b </e") == ("a < b ", False)
    assert stream.feed("x") == ("</ex", False)
    assert stream.feed("</end") == ("", False)
    assert stream.flush() == "</end"


def test_an_empty_stop_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one character"):
        StopStrings(["a", ""])
