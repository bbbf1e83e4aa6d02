"""From tokens to text: nothing is lost, nothing is shown too early, nothing hidden gets out."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from functools import cache
from random import Random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from azeotrope.defenses.base import Defense, FinishedText, RewriteContext, RewrittenText
from azeotrope.engine.protocol import Chunk, Finish, Token
from azeotrope.pocket.tokenizer import build
from azeotrope.tokens import Boundary, decode, without_reasoning
from gateway.answers import answering
from gateway.answers.beginning import opening, opening_of_ids, without_pattern
from gateway.answers.writing import (
    Detokenizer,
    Mode,
    Piece,
    ReasoningFilter,
    StopStrings,
    Writer,
    count_sentences,
)
from gateway.http.responses import Said

BOUNDARY = Boundary()
TRACE = "<think> at first 2. 2 doubles to 4. </think> #### 4"
POCKET = ("word", "pieces")


def wrapped(model, decoder, **more) -> PreTrainedTokenizerFast:
    backend = Tokenizer(model)
    backend.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=backend, **more)


def bytes_of_gpt2() -> PreTrainedTokenizerFast:
    names = sorted(pre_tokenizers.ByteLevel.alphabet())
    return wrapped(models.BPE({c: i for i, c in enumerate(names)}, []), decoders.ByteLevel())


def bytes_of_llama2() -> PreTrainedTokenizerFast:
    names = ["<unk>", "</s>", "▁a", "b", "▁", "é", "�", *(f"<0x{i:02X}>" for i in range(256))]
    vocabulary = {name: i for i, name in enumerate(names)}
    return wrapped(
        models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True),
        decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        ),
        unk_token="<unk>",
        eos_token="</s>",
    )


def word_pieces(*, clean: bool) -> PreTrainedTokenizerFast:
    names = ["[UNK]", "a", "##b", ".", "'", "n't", "c", "'s", "do", "not", "##."]
    return wrapped(
        models.WordPiece({name: i for i, name in enumerate(names)}, unk_token="[UNK]"),
        decoders.WordPiece(cleanup=not clean),
        unk_token="[UNK]",
        clean_up_tokenization_spaces=clean,
    )


MADE = {
    "word": lambda: build("word"),
    "pieces": lambda: build("pieces"),
    "gpt2": bytes_of_gpt2,
    "llama2": bytes_of_llama2,
    "word_pieces": lambda: word_pieces(clean=False),
    "cleaning": lambda: word_pieces(clean=True),
}


@cache
def made(name: str) -> PreTrainedTokenizerFast:
    """A tokenizer by its name; a fixture cannot stand beside `given`'s arguments as freely."""
    return MADE[name]()


def parts(data: st.DataObject, text: str) -> list[str]:
    """The text cut at random places."""
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def encoded(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def written(
    writer: Writer, ids: Sequence[int], sizes: Sequence[int] = (1,), finish: Finish = "stop"
) -> list[Piece]:
    """The pieces of a completion that comes in chunks of the sizes given, in turn."""
    tokens = [Token(id, logprob=-float(place)) for place, id in enumerate(ids)]
    found: list[Piece] = []
    place = turn = 0
    while place < len(tokens) and writer.finish is None:
        size = sizes[turn % len(sizes)]
        found.append(writer.feed(Chunk(tuple(tokens[place : place + size]))))
        place, turn = place + size, turn + 1
    if writer.finish is None:
        found.append(writer.feed(Chunk((), finish)))
    return found


# Tokens to text ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MADE)
@given(data=st.data())
def test_text_of_any_ids_is_that_of_decode(name: str, data: st.DataObject) -> None:
    tokenizer = made(name)
    # One id more than there are: a head may be padded beyond the vocabulary.
    ids = data.draw(st.lists(st.integers(0, len(tokenizer)), max_size=30))
    stream = Detokenizer(tokenizer)
    steps = [stream.step(id) for id in ids]
    assert "".join(steps) + stream.flush() == decode(tokenizer, ids)
    assert stream.flush() == ""


@given(st.text(max_size=20))
@example("é漢🙂👩‍👩‍👧 ab")
def test_half_a_character_is_never_shown(text: str) -> None:
    text = text.replace("\N{REPLACEMENT CHARACTER}", "")
    for name in ("gpt2", "llama2"):
        tokenizer = made(name)
        if name == "gpt2":
            alphabet = _gpt2_alphabet()
            ids = [tokenizer.convert_tokens_to_ids(alphabet[b]) for b in text.encode()]
        else:
            ids = [tokenizer.convert_tokens_to_ids(f"<0x{b:02X}>") for b in text.encode()]
        stream = Detokenizer(tokenizer)
        shown = [stream.step(id) for id in ids] + [stream.flush()]
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in shown)
        # A leading space belongs to Llama 2's first token and is dropped by its own decoder.
        assert "".join(shown) == decode(tokenizer, ids)


def _gpt2_alphabet() -> dict[int, str]:
    """Which printable character stands for which byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {byte: chr(byte) for byte in printable}
    rest = [byte for byte in range(256) if byte not in table]
    return table | {byte: chr(256 + place) for place, byte in enumerate(rest)}


def test_words_are_shown_as_soon_as_they_are_written(word) -> None:
    stream = Detokenizer(word)
    shown = [stream.step(id) for id in [*encoded(word, "joe has 4 eggs."), word.eos_token_id]]
    assert shown == ["joe", " has", " 4", " eggs", ".", ""]


# Stops ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stops", "text", "shown"),
    [
        (["b"], "abc", "a"),
        (["bd"], "abcbd", "abc"),
        (["aab"], "aaab", "a"),
        # The stop that is complete first, and of those that end together the longest.
        (["abcd", "bc"], "abcd", "a"),
        (["bc", "abc"], "xabc", "x"),
        (["\n\n"], "a\nb\n\nc", "a\nb"),
        (["b"], "b", ""),
    ],
)
def test_the_first_stop_ends_the_text(stops: list[str], text: str, shown: str) -> None:
    for size in range(1, len(text) + 1):
        watch = StopStrings(stops)
        fed = [watch.feed(text[at : at + size]) for at in range(0, len(text), size)]
        assert "".join(piece for piece, _ in fed) + watch.flush() == shown
        assert fed[-1][1]


@given(st.data(), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3))
def test_stops_do_not_depend_on_how_the_text_comes(data: st.DataObject, stops: list[str]) -> None:
    text = data.draw(st.text("ab", max_size=12))
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    expected = text[: min(ends)[1]] if ends else text
    watch = StopStrings(stops)
    fed = [watch.feed(part) for part in parts(data, text)]
    assert "".join(piece for piece, _ in fed) + watch.flush() == expected
    assert any(stopped for _, stopped in fed) == bool(ends)


def test_only_what_may_become_a_stop_is_held_back() -> None:
    watch = StopStrings(["</end>"])
    assert watch.feed("a < b </e") == ("a < b ", False)
    assert watch.feed("x") == ("</ex", False)
    assert watch.feed("</end") == ("", False)
    assert watch.flush() == "</end"


def test_an_empty_stop_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one character"):
        StopStrings(["a", ""])


# Reasoning -----------------------------------------------------------------------------------

FRAGMENTS = ["<think>", "</think>", "<thi", "nk>", "</", "####", " ", "\n", "a.", "4", "Answer:"]
texts = st.lists(st.sampled_from(FRAGMENTS), max_size=10).map("".join)
odd = st.sampled_from(
    [
        BOUNDARY,
        Boundary(unmarked="reasoning"),
        Boundary(open_tag=""),
        Boundary(close_tag=""),
        Boundary(open_tag="", close_tag=""),
        Boundary(answer_pattern=""),
        # Tags that begin alike, contain one another, or are the same.
        Boundary(open_tag="<think>", close_tag="<think>4"),
        Boundary(open_tag="4</think>", close_tag="</think>"),
        Boundary(open_tag="####", close_tag="####"),
    ]
)


@given(st.data(), texts, odd)
def test_cut_shows_exactly_what_without_reasoning_leaves(
    data: st.DataObject, text: str, boundary: Boundary
) -> None:
    expected = without_reasoning(text, boundary)
    cut = ReasoningFilter("cut", boundary)
    shown = ""
    for part in parts(data, text):
        shown += cut.feed(part)
        # Nothing is taken back, so nothing may be shown that is not in the answer.
        assert expected.startswith(shown)
    assert shown + cut.flush() == expected


def test_a_tag_that_begins_another_is_not_taken_for_it() -> None:
    boundary = Boundary(open_tag="</think>4", close_tag="</think>")
    for text in ["a</think>4b</think>d", "a</think>5b</think>d", "a</think>", "a</think>4"]:
        cut = ReasoningFilter("cut", boundary)
        shown = "".join(cut.feed(letter) for letter in text) + cut.flush()
        assert shown == without_reasoning(text, boundary)


@given(st.data(), texts, odd)
def test_shown_passes_everything_at_once(
    data: st.DataObject, text: str, boundary: Boundary
) -> None:
    passing = ReasoningFilter("shown", boundary)
    for part in parts(data, text):
        assert passing.feed(part) == part
    assert passing.flush() == ""


@given(st.data(), texts, odd)
def test_a_summary_is_one_line_and_the_answer(
    data: st.DataObject, text: str, boundary: Boundary
) -> None:
    summary = ReasoningFilter("summary", boundary)
    shown = "".join(summary.feed(part) for part in parts(data, text)) + summary.flush()
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
        # It cannot be told what this is, so it is not shown.
        ("a story. its end.", "[2 steps of reasoning are not shown]"),
    ],
)
def test_summaries_of_every_kind_of_completion(text: str, summary: str) -> None:
    whole = ReasoningFilter("summary", BOUNDARY)
    assert whole.feed(text) + whole.flush() == summary


def test_an_answer_streams_once_the_reasoning_is_closed() -> None:
    cut = ReasoningFilter("cut", BOUNDARY)
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


# Reasoning that began in the prompt ----------------------------------------------------------

completions = st.lists(
    st.sampled_from("<think> </think> #### 4 2 joe has eggs . so then".split()), max_size=14
).map(" ".join)
ONE = "[1 step of reasoning is not shown]"
INSIDE = "so 2 doubles. maybe the answer is \\boxed{4} #### 4. no, wait"


@pytest.mark.parametrize(
    ("prompt", "begins"),
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
        # Half a closing tag closes nothing.
        ("how many? <think> a </thi", "<think>"),
        ("how many? </thi", ""),
    ],
)
def test_a_prompt_says_whether_the_reasoning_is_open(prompt: str, begins: str) -> None:
    assert opening(prompt, BOUNDARY) == begins


def test_tags_that_are_special_tokens_open_a_prompt_too() -> None:
    names = {"<think>": 0, "a": 1, "<unk>": 2}
    model = models.WordLevel(names, unk_token="<unk>")
    tokenizer = wrapped(model, decoders.Fuse(), extra_special_tokens=["<think>"])
    assert decode(tokenizer, [1, 0]) == "a"
    assert opening_of_ids(tokenizer, [1, 0], BOUNDARY) == "<think>"


@given(st.data(), texts, odd)
def test_reasoning_of_the_prompt_is_cut_as_if_it_were_the_text_s_own(
    data: st.DataObject, text: str, boundary: Boundary
) -> None:
    begins = opening(f"4 {boundary.open_tag} 4", boundary)
    assert begins == boundary.open_tag
    expected = without_reasoning(begins + text, boundary)
    cut = ReasoningFilter("cut", boundary, opening=begins)
    shown = ""
    for part in parts(data, text):
        shown += cut.feed(part)
        assert expected.startswith(shown)
    assert shown + cut.flush() == expected


@given(st.data(), st.integers(0, len(INSIDE)), st.sampled_from(["<think>", "<thi", "<"]))
def test_nothing_is_shown_of_reasoning_that_is_cut_off(
    data: st.DataObject, length: int, begins: str
) -> None:
    # The same wherever it is cut, and however it comes.
    text = ("<think>" + INSIDE)[len(begins) :][: length + 7 - len(begins)]
    cut = ReasoningFilter("cut", BOUNDARY, opening=begins)
    summary = ReasoningFilter("summary", BOUNDARY, opening=begins)
    divided = parts(data, text)
    assert "".join(map(cut.feed, divided)) + cut.flush() == ""
    line = "".join(map(summary.feed, divided)) + summary.flush()
    assert line in {"", *(f"[{n} steps of reasoning are not shown]" for n in range(2, 9)), ONE}
    assert bool(line) == any(map(str.isalnum, text.removeprefix("nk>").removeprefix("think>")))


@pytest.mark.parametrize("kind", POCKET)
@pytest.mark.parametrize("mode", ["cut", "summary"])
@given(text=completions, sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_open_reasoning_is_written_without_words_and_numbers(
    kind: str, mode: Mode, text: str, sizes: list[int]
) -> None:
    tokenizer = made(kind)
    ids = encoded(tokenizer, text)
    expected = without_reasoning("<think>" + decode(tokenizer, ids), BOUNDARY)
    writer = Writer(tokenizer, mode=mode, boundary=BOUNDARY, opening="<think>")
    found = written(writer, ids, sizes, finish="length")
    shown = "".join(piece.text for piece in found)
    line = shown.removesuffix(expected).removesuffix("\n")
    assert line == "" or (mode == "summary" and line.startswith("[") and line.endswith("shown]"))
    given_ids = [token.id for piece in found for token in piece.tokens]
    assert decode(tokenizer, given_ids).strip() == expected
    assert writer.tokens == len(ids)


def test_a_ban_that_keeps_tags_from_being_spelt_leaves_no_pattern(word) -> None:
    ids = {name: word.convert_tokens_to_ids(f"▁{name}") for name in ("<think>", "</think>", "joe")}
    for name in ("<think>", "</think>"):
        assert without_pattern(word, [ids["joe"], ids[name]], BOUNDARY).answer_pattern == ""
    assert without_pattern(word, [ids["joe"]], BOUNDARY) == BOUNDARY
    assert without_pattern(word, [], BOUNDARY) == BOUNDARY
    letters = made("gpt2")
    for letter in "</think>":
        banned = [letters.convert_tokens_to_ids(letter)]
        assert without_pattern(letters, banned, BOUNDARY).answer_pattern == ""
    assert without_pattern(letters, encoded(letters, "z#4"), BOUNDARY) == BOUNDARY


class Loses(Defense):
    """A rewriting that drops every tag."""

    stage = "text"

    def __init__(self) -> None:
        self.given: list[str] = []

    def rewrite(
        self, texts: Sequence[FinishedText], context: RewriteContext
    ) -> list[RewrittenText]:
        self.given += [item.text for item in texts]
        return [
            RewrittenText.compared(item.text, self.changed(item.text, context.boundary))
            for item in texts
        ]

    def changed(self, text: str, boundary: Boundary) -> str:
        return text.replace(boundary.open_tag, "").replace(boundary.close_tag, "")


class Keeps(Loses):
    """One that leaves the text as it is."""

    def changed(self, text: str, boundary: Boundary) -> str:
        return text


def rewritten(text: str, defense: Loses, mode: Mode, begins: str, **more) -> str:
    async def source() -> AsyncGenerator[Said]:
        for letter in text:
            yield Said(letter)
        yield Said(finish="length")

    async def whole() -> str:
        said = answering.rewritten(source(), [defense], BOUNDARY, mode, (), opening=begins, **more)
        return "".join([part.text async for part in said])

    return asyncio.run(whole())


@pytest.mark.parametrize("kind", [Keeps, Loses])
def test_texts_to_rewrite_are_marked_and_hidden_as_others(kind: type[Loses]) -> None:
    for mode, hidden in (("cut", ""), ("summary", "[3 steps of reasoning are not shown]")):
        defense = kind()
        # Not even handed over: there is no answer in it.
        assert rewritten(INSIDE, defense, mode, "<think>") == hidden
        assert defense.given == []
    closed = f"{INSIDE} </think> joe has 4"
    defense = kind()
    shown = rewritten(closed, defense, "shown", "<think>")
    assert defense.given == ["<think>" + closed]
    assert shown == (closed if kind is Keeps else closed.replace("</think>", ""))
    assert rewritten(closed, Keeps(), "cut", "<think>") == "joe has 4"
    # A ban of tags: without one, nothing says where the answer begins.
    judged = BOUNDARY.model_copy(update={"answer_pattern": ""})
    assert rewritten(INSIDE, kind(), "cut", "", judged=judged) == ""


# All together --------------------------------------------------------------------------------


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
    tokenizer = made(kind)
    ids = encoded(tokenizer, text)
    whole = decode(tokenizer, ids)
    visible = without_reasoning(whole, BOUNDARY) if mode == "cut" else whole
    ends = [(visible.find(s) + len(s), visible.find(s)) for s in stops if s in visible]
    expected = visible[: min(ends)[1]] if ends else visible

    writer = Writer(tokenizer, stops, mode, boundary=BOUNDARY)
    found = written(writer, ids, sizes, finish="length")
    assert "".join(piece.text for piece in found) == expected
    assert [piece.finish for piece in found[:-1]] == [None] * (len(found) - 1)
    assert found[-1].finish == ("stop" if ends else "length")
    assert found[-1].consumed == writer.tokens <= len(ids)
    if not ends:
        assert writer.tokens == len(ids)

    again = Writer(tokenizer, stops, mode, boundary=BOUNDARY)
    one = written(again, ids, [1], finish="length")
    assert again.tokens == writer.tokens
    assert [t for p in one for t in p.tokens] == [t for p in found for t in p.tokens]


@pytest.mark.parametrize("kind", POCKET)
@given(text=completions, sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_numbers_are_given_of_the_answer_alone(kind: str, text: str, sizes: list[int]) -> None:
    tokenizer = made(kind)
    ids = encoded(tokenizer, text)
    writer = Writer(tokenizer, mode="cut", boundary=BOUNDARY)
    found = written(writer, ids, sizes)
    places = [int(-token.logprob) for piece in found for token in piece.tokens]
    answer = without_reasoning(decode(tokenizer, ids), BOUNDARY)
    # The tokens given are the last ones, without a gap, and spell the answer.
    assert bool(places) == bool(answer)
    assert places == list(range(len(ids)))[len(ids) - len(places) :]
    assert decode(tokenizer, [ids[place] for place in places]).strip() == answer


def test_tokens_come_with_the_last_of_their_text(word) -> None:
    ids = encoded(word, "joe has 4 eggs")
    writer = Writer(word, ["has 4 pens"], boundary=BOUNDARY)
    found = written(writer, ids)
    assert [piece.text for piece in found] == ["joe", " ", "", "has 4 eggs", ""]
    assert [[t.id for t in piece.tokens] for piece in found] == [
        [ids[0]],
        [],
        [],
        ids[1:],
        [],
    ]


def test_a_stop_in_a_chunk_ends_it_there(word) -> None:
    ids = encoded(word, "joe has 4 eggs. so joe has 4")
    writer = Writer(word, ["eggs"], boundary=BOUNDARY)
    piece = writer.feed(Chunk(tuple(map(Token, ids)), finish="length"))
    assert (piece.text, piece.finish) == ("joe has 4 ", "stop")
    # joe, has, 4, and the token that completes the stop; the stop's own is not shown.
    assert (piece.consumed, [token.id for token in piece.tokens]) == (4, ids[:3])
    with pytest.raises(ValueError, match="ended with 'stop'"):
        writer.feed(Chunk((Token(ids[0]),)))


@pytest.mark.parametrize("mode", ["cut", "summary"])
def test_hidden_reasoning_has_no_numbers_and_no_stops(word, mode: Mode) -> None:
    ids = encoded(word, TRACE)
    writer = Writer(word, ["doubles"], mode, boundary=BOUNDARY)
    found = written(writer, ids)
    assert found[-1].finish == "stop"
    assert writer.tokens == len(ids)
    assert [token.id for piece in found for token in piece.tokens] == ids[-2:]
    shown = "".join(piece.text for piece in found)
    line = "[2 steps of reasoning are not shown]\n" if mode == "summary" else ""
    assert shown == line + "#### 4"


def test_a_stop_does_not_end_the_line_of_a_summary(word) -> None:
    writer = Writer(word, ["steps", "["], "summary", boundary=BOUNDARY)
    found = written(writer, encoded(word, TRACE))
    assert "".join(piece.text for piece in found).endswith("not shown]\n#### 4")


def test_a_token_across_the_boundary_is_hidden() -> None:
    names = ["<unk>", "2", "2</think>4", "5", "\n", "6\n"]
    tokenizer = wrapped(
        models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"),
        decoders.Fuse(),
        unk_token="<unk>",
    )
    writer = Writer(tokenizer, mode="cut", boundary=BOUNDARY)
    found = written(writer, [1, 2, 3, 4, 3, 4, 5, 4])
    assert "".join(piece.text for piece in found) == "45\n5\n6"
    # Not the first, in part reasoning, nor the last, cut off; the last visible one is shown.
    assert [token.id for piece in found for token in piece.tokens] == [3, 4, 3, 4, 5]


def test_tokens_of_one_character_come_together() -> None:
    tokenizer = made("gpt2")
    alphabet = _gpt2_alphabet()
    ids = [tokenizer.convert_tokens_to_ids(alphabet[byte]) for byte in "a漢".encode()]
    found = written(Writer(tokenizer, boundary=BOUNDARY), ids)
    assert [piece.text for piece in found] == ["a", "", "", "漢", ""]
    assert [len(piece.tokens) for piece in found] == [1, 0, 0, 3, 0]


def test_a_long_completion_without_tags_is_hidden_to_its_end() -> None:
    pieces = made("pieces")
    rng = Random(0)
    plain = [id for token, id in pieces.get_vocab().items() if token.isalpha()]
    ids = rng.choices(plain, k=2000)
    writer = Writer(pieces, ["zzz"], "summary", boundary=BOUNDARY)
    found = written(writer, ids)
    assert writer.tokens == len(ids)
    text = "".join(piece.text for piece in found)
    assert text == "[1 step of reasoning is not shown]"
    assert not any(piece.tokens for piece in found)
