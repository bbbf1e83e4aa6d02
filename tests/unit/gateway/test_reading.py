"""Prompts that open the reasoning, and bans that keep a tag from being written."""

import pytest
from completions_made import BOUNDARY, encoded, tokenizer_named, wrapped
from tokenizers import decoders, models

from azeotrope.tokens import decode
from gateway.answers.reading import opening, opening_of_ids, without_pattern


@pytest.mark.parametrize(
    ("prompt", "opening_tag"),
    [
        ("how many?", ""),
        ("how many? <think>\n", "<think>"),
        ("how many? <think>\n\n</think>\n\n", ""),
        ("<think> a </think> b <think> c", "<think>"),
        ("<think> a <think> b </think> c", ""),
        ("a </think> b", ""),
        # The completion may finish the tag.
        ("how many? <thi", "<thi"),
        ("<think> a </think> <", "<"),
        # Half a closing tag does not close the reasoning.
        ("how many? <think> a </thi", "<think>"),
        ("how many? </thi", ""),
    ],
)
def test_a_prompt_says_whether_the_reasoning_is_open(prompt: str, opening_tag: str) -> None:
    assert opening(prompt, BOUNDARY) == opening_tag


def test_tags_that_are_special_tokens_open_a_prompt_too() -> None:
    names = {"<think>": 0, "a": 1, "<unk>": 2}
    model = models.WordLevel(names, unk_token="<unk>")
    tokenizer = wrapped(model, decoders.Fuse(), extra_special_tokens=["<think>"])
    assert decode(tokenizer, [1, 0]) == "a"
    assert opening_of_ids(tokenizer, [1, 0], BOUNDARY) == "<think>"


def test_a_ban_that_keeps_tags_from_being_spelt_leaves_no_pattern(word) -> None:
    ids = {name: word.convert_tokens_to_ids(f"▁{name}") for name in ("<think>", "</think>", "joe")}
    for name in ("<think>", "</think>"):
        assert without_pattern(word, [ids["joe"], ids[name]], BOUNDARY).answer_pattern == ""
    assert without_pattern(word, [ids["joe"]], BOUNDARY) == BOUNDARY
    assert without_pattern(word, [], BOUNDARY) == BOUNDARY
    letters = tokenizer_named("gpt2")
    for letter in "</think>":
        banned = [letters.convert_tokens_to_ids(letter)]
        assert without_pattern(letters, banned, BOUNDARY).answer_pattern == ""
    assert without_pattern(letters, encoded(letters, "z#4"), BOUNDARY) == BOUNDARY
