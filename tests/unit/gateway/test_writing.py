"""From tokens to visible text: any chunks give the same answer, and hidden text stays hidden."""

from random import Random

import pytest
from completions_made import (
    BOUNDARY,
    POCKET,
    RULES,
    TRACE,
    completions,
    encoded,
    engine_tokens,
    gpt2_alphabet,
    text_of,
    tokenizer_named,
    visible_tokens,
    wrapped,
    write,
)
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models

from azeotrope.engine.protocol import Chunk, Token
from azeotrope.tokens import decode, without_reasoning
from gateway.answers.reading import ReadingRules
from gateway.answers.reasoning import Mode
from gateway.answers.writing import AnswerWriter


@pytest.mark.parametrize("kind", POCKET)
@pytest.mark.parametrize("mode", ["cut", "summary"])
@given(text=completions, sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_open_reasoning_is_written_without_words_and_numbers(
    kind: str, mode: Mode, text: str, sizes: list[int]
) -> None:
    tokenizer = tokenizer_named(kind)
    ids = encoded(tokenizer, text)
    expected = without_reasoning("<think>" + decode(tokenizer, ids), BOUNDARY)
    writer = AnswerWriter(tokenizer, ReadingRules(BOUNDARY, "<think>"), mode=mode)
    pieces = write(writer, ids, sizes, finish="length")
    answer = text_of(pieces)
    line = answer.removesuffix(expected).removesuffix("\n")
    assert line == "" or (mode == "summary" and line.startswith("[") and line.endswith("shown]"))
    visible_ids = [token.id for token in visible_tokens(pieces)]
    assert decode(tokenizer, visible_ids).strip() == expected
    assert engine_tokens(pieces) == len(ids)


@pytest.mark.parametrize("kind", POCKET)
@pytest.mark.parametrize("mode", ["shown", "cut"])
@given(
    text=completions,
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    stops=st.lists(st.sampled_from(["has", " 4", "eggs so", ".", "nk>"]), max_size=2),
)
def test_what_is_written_is_the_same_in_any_chunks(
    kind: str, mode: Mode, text: str, sizes: list[int], stops: list[str]
) -> None:
    tokenizer = tokenizer_named(kind)
    ids = encoded(tokenizer, text)
    whole = decode(tokenizer, ids)
    visible = without_reasoning(whole, BOUNDARY) if mode == "cut" else whole
    ends = [(visible.find(s) + len(s), visible.find(s)) for s in stops if s in visible]
    expected = visible[: min(ends)[1]] if ends else visible

    writer = AnswerWriter(tokenizer, RULES, stops=stops, mode=mode)
    pieces = write(writer, ids, sizes, finish="length")
    assert text_of(pieces) == expected
    assert [piece.finish for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].finish == ("stop" if ends else "length")
    assert engine_tokens(pieces) <= len(ids)
    if not ends:
        assert engine_tokens(pieces) == len(ids)

    again = AnswerWriter(tokenizer, RULES, stops=stops, mode=mode)
    one_by_one = write(again, ids, [1], finish="length")
    assert engine_tokens(one_by_one) == engine_tokens(pieces)
    assert visible_tokens(one_by_one) == visible_tokens(pieces)


@pytest.mark.parametrize("kind", POCKET)
@given(text=completions, sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_numbers_are_given_of_the_answer_alone(kind: str, text: str, sizes: list[int]) -> None:
    tokenizer = tokenizer_named(kind)
    ids = encoded(tokenizer, text)
    writer = AnswerWriter(tokenizer, RULES, mode="cut")
    pieces = write(writer, ids, sizes)
    positions = [int(-token.logprob) for token in visible_tokens(pieces)]
    answer = without_reasoning(decode(tokenizer, ids), BOUNDARY)
    # The visible tokens are the last ones, without a gap, and spell the answer.
    assert bool(positions) == bool(answer)
    assert positions == list(range(len(ids)))[len(ids) - len(positions) :]
    assert decode(tokenizer, [ids[position] for position in positions]).strip() == answer


def test_tokens_come_with_the_last_of_their_text(word) -> None:
    ids = encoded(word, "joe has 4 eggs")
    writer = AnswerWriter(word, RULES, stops=["has 4 pens"])
    pieces = write(writer, ids)
    assert [piece.text for piece in pieces] == ["joe", " ", "", "has 4 eggs", ""]
    assert [[t.id for t in piece.tokens] for piece in pieces] == [
        [ids[0]],
        [],
        [],
        ids[1:],
        [],
    ]


def test_a_stop_in_a_chunk_ends_it_there(word) -> None:
    ids = encoded(word, "joe has 4 eggs. so joe has 4")
    writer = AnswerWriter(word, RULES, stops=["eggs"])
    piece = writer.feed(Chunk(tuple(map(Token, ids)), finish="length"))
    assert (piece.text, piece.finish) == ("joe has 4 ", "stop")
    # joe, has, 4, and the token that completes the stop. The stop itself is not visible.
    assert (piece.engine_tokens, [token.id for token in piece.tokens]) == (4, ids[:3])
    with pytest.raises(ValueError, match="ended with 'stop'"):
        writer.feed(Chunk((Token(ids[0]),)))


@pytest.mark.parametrize("mode", ["cut", "summary"])
def test_hidden_reasoning_has_no_numbers_and_no_stops(word, mode: Mode) -> None:
    ids = encoded(word, TRACE)
    writer = AnswerWriter(word, RULES, stops=["doubles"], mode=mode)
    pieces = write(writer, ids)
    assert pieces[-1].finish == "stop"
    assert engine_tokens(pieces) == len(ids)
    assert [token.id for token in visible_tokens(pieces)] == ids[-2:]
    line = "[2 steps of reasoning are not shown]\n" if mode == "summary" else ""
    assert text_of(pieces) == line + "#### 4"


def test_a_stop_does_not_end_the_line_of_a_summary(word) -> None:
    writer = AnswerWriter(word, RULES, stops=["steps", "["], mode="summary")
    pieces = write(writer, encoded(word, TRACE))
    assert text_of(pieces).endswith("not shown]\n#### 4")


def test_a_token_across_the_boundary_is_hidden() -> None:
    names = ["<unk>", "2", "2</think>4", "5", "\n", "6\n"]
    tokenizer = wrapped(
        models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"),
        decoders.Fuse(),
        unk_token="<unk>",
    )
    writer = AnswerWriter(tokenizer, RULES, mode="cut")
    pieces = write(writer, [1, 2, 3, 4, 3, 4, 5, 4])
    assert text_of(pieces) == "45\n5\n6"
    # The first token is partly reasoning, and the last is white space that is cut off.
    assert [token.id for token in visible_tokens(pieces)] == [3, 4, 3, 4, 5]


def test_tokens_of_one_character_come_together() -> None:
    tokenizer = tokenizer_named("gpt2")
    alphabet = gpt2_alphabet()
    ids = [tokenizer.convert_tokens_to_ids(alphabet[byte]) for byte in "a漢".encode()]
    pieces = write(AnswerWriter(tokenizer, RULES), ids)
    assert [piece.text for piece in pieces] == ["a", "", "", "漢", ""]
    assert [len(piece.tokens) for piece in pieces] == [1, 0, 0, 3, 0]


def test_a_long_completion_without_tags_is_hidden_to_its_end() -> None:
    tokenizer = tokenizer_named("pieces")
    rng = Random(0)
    plain = [id for token, id in tokenizer.get_vocab().items() if token.isalpha()]
    ids = rng.choices(plain, k=2000)
    writer = AnswerWriter(tokenizer, RULES, stops=["zzz"], mode="summary")
    pieces = write(writer, ids)
    assert engine_tokens(pieces) == len(ids)
    assert text_of(pieces) == "[1 step of reasoning is not shown]"
    assert not any(piece.tokens for piece in pieces)
