"""Log-probabilities of tokens that are parts of characters: their bytes, names and offsets."""

from functools import cache

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from azeotrope.engine.protocol import Chunk, Token
from azeotrope.pocket.tokenizer import build
from azeotrope.tokens import decode
from gateway.answers.pieces import AnswerPiece, join
from gateway.answers.reading import ReadingRules
from gateway.answers.reasoning import Mode
from gateway.answers.writing import AnswerWriter
from gateway.http.responses import ChatFormat, CompletionFormat, LogprobFormat, usage
from gateway.http.token_bytes import TokenBytes, readable, token_starts

MIXED = "joe€s 漢字 🙂 <think> é </think> 4"


def byte_level() -> PreTrainedTokenizerFast:
    """As GPT-2's, with tokens of several bytes that are parts of characters, and a tag added."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=264,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["€₤₧", "漢字", "joe joe"] * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.add_tokens(["</think>", "漢字"])
    return tokenizer


def byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama 2's."""
    names = ["<unk>", "▁", "j", "o", "e", "s", "4", *(f"<0x{i:02X}>" for i in range(256))]
    model = models.BPE(
        {n: i for i, n in enumerate(names)}, [], unk_token="<unk>", byte_fallback=True
    )
    backend = Tokenizer(model)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


MADE = {
    "byte_level": byte_level,
    "byte_fallback": byte_fallback,
    "word": lambda: build("word"),
    "pieces": lambda: build("pieces"),
}


@cache
def made(name: str) -> PreTrainedTokenizerFast:
    return MADE[name]()


def encoded(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def answer(tokenizer: PreTrainedTokenizerFast, ids: list[int], mode: Mode = "shown") -> AnswerPiece:
    """A completion whose tokens have different log-probabilities."""
    writer = AnswerWriter(tokenizer, ReadingRules(), mode=mode)
    tokens = [Token(id, -float(number), ((id, -float(number)),)) for number, id in enumerate(ids)]
    chunks = [*(Chunk((token,)) for token in tokens), Chunk((), "stop")]
    return join([writer.feed(chunk) for chunk in chunks])


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
@given(st.text(max_size=20))
@example(MIXED)
def test_bytes_joined_are_the_text(name: str, text: str) -> None:
    tokenizer = made(name)
    # SentencePiece cannot tell its mark from a space.
    text = text.replace("▁", "")
    ids = encoded(tokenizer, text)
    joined = b"".join(TokenBytes(tokenizer).of(id) for id in ids)
    assert joined == text.encode()
    # Some decoders leave out a first space.
    assert joined in (b" " + decode(tokenizer, ids).encode(), decode(tokenizer, ids).encode())


@pytest.mark.parametrize("name", ["word", "pieces"])
def test_words_carry_the_space_before_them(name: str) -> None:
    tokenizer = made(name)
    text = "joe has 4 eggs. <think> so then </think> #### 4"
    joined = b"".join(TokenBytes(tokenizer).of(id) for id in encoded(tokenizer, text))
    assert joined == b" " + text.encode()


def test_the_numbers_of_parts_of_a_character() -> None:
    tokenizer = made("byte_level")
    whole = answer(tokenizer, encoded(tokenizer, "₹ ₿"))
    form = LogprobFormat(tokenizer, 2)
    chat = ChatFormat("id", "m", form).whole([whole], usage(1, 1))
    content = chat["choices"][0]["logprobs"]["content"]
    assert bytes(byte for item in content for byte in item["bytes"]) == "₹ ₿".encode()
    assert [item["top_logprobs"][0]["bytes"] for item in content] == [
        item["bytes"] for item in content
    ]
    text = CompletionFormat("id", "m", form).whole([whole], usage(1, 1))
    logprobs = text["choices"][0]["logprobs"]
    assert all(
        name in top for name, top in zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True)
    )
    assert "\N{REPLACEMENT CHARACTER}" not in str(logprobs)
    assert any(name.startswith(r"bytes:\xe2") for name in logprobs["tokens"])


def test_likeliest_parts_of_characters_do_not_hide_one_another() -> None:
    tokenizer = made("byte_level")
    ids = [id for id in range(256) if TokenBytes(tokenizer).of(id)[0] >= 0x80][:5]
    top = tuple((id, -0.5 * (rank + 1)) for rank, id in enumerate(ids))
    values = LogprobFormat(tokenizer, 2).top(Token(ids[0], -0.5, top))
    assert list(values.values()) == [-0.5, -1.0, -1.5, -2.0, -2.5]
    # If two tokens have the same name, the likelier one counts.
    word = made("word")
    twice = Token(7, -1.0, ((7, -1.0), (7, -2.0)))
    assert LogprobFormat(word, 2).top(twice) == {word.decode([7]): -1.0}


@pytest.mark.parametrize(
    ("token", "name"),
    [
        (b"\xe2\x80", r"bytes:\xe2\x80"),
        (b" \xf0\x9f", r"bytes: \xf0\x9f"),
        (b"\\\xff", r"bytes:\x5c\xff"),
        ("é".encode(), None),
        (b"", None),
    ],
)
def test_names_of_bytes_are_openai_s(token: bytes, name: str | None) -> None:
    assert readable(token) == name


@pytest.mark.parametrize(
    ("tokens", "text", "starts"),
    [
        ([b"a"], "a", (0,)),
        ([b"\xe6\xbc", b"\xa2", b"b"], "漢b", (0, 0, 1)),
        ([b"a\xe6", b"\xbc\xa2b", b"c"], "a漢bc", (0, 1, 3)),
        ([b" ", b"4", b"2"], "42", (0, 0, 1)),
        ([b" ", b"4", b"2"], " 42", (0, 1, 2)),
        ([b"\xe6", b"b"], "\N{REPLACEMENT CHARACTER}b", (0, 0)),
        ([b"", b"b", b""], "b", (0, 0, 0)),
    ],
)
def test_starts_of_tokens_in_a_text(
    tokens: list[bytes], text: str, starts: tuple[int, ...]
) -> None:
    assert token_starts(tokens, text) == starts


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("mode", ["shown", "cut", "summary"])
@given(
    st.lists(
        st.sampled_from(["joe", "4", "é", "漢字", "🙂", "€", "<think>", "</think>", "####"]),
        max_size=10,
    )
)
def test_offsets_are_the_starts_of_tokens(name: str, mode: Mode, words: list[str]) -> None:
    tokenizer = made(name)
    whole = answer(tokenizer, encoded(tokenizer, " ".join(words)), mode)
    assert len(whole.offsets) == len(whole.tokens)
    assert list(whole.offsets) == sorted(whole.offsets)
    ends = [*whole.offsets, len(whole.text)][1:]
    for token, start, end in zip(whole.tokens, whole.offsets, ends, strict=True):
        assert 0 <= start <= end <= len(whole.text)
        own = TokenBytes(tokenizer).of(token.id)
        if readable(own) is None and name.startswith("byte"):
            # A token of whole characters. A space at the start may have been dropped.
            alone = own.decode().strip()
            assert whole.text[start:].lstrip().startswith(alone) or not alone


def test_offsets_by_hand() -> None:
    word = made("word")
    whole = answer(word, encoded(word, "<think> so 2. </think> joe has 4."), "summary")
    line = "[1 step of reasoning is not shown]\n"
    assert whole.text == line + "joe has 4."
    assert [offset - len(line) for offset in whole.offsets] == [0, 3, 7, 9]
    logprobs = CompletionFormat("id", "m", LogprobFormat(word, 2)).part(0, whole, first=True)
    assert logprobs["choices"][0]["logprobs"]["text_offset"] == list(whole.offsets)
