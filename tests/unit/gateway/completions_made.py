"""Tokenizers of several kinds, random divisions of texts, and completions written from ids."""

from collections.abc import Sequence
from functools import cache

from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from azeotrope.engine.protocol import Chunk, Finish, Token
from azeotrope.pocket.tokenizer import build
from azeotrope.tokens import Boundary
from gateway.answers.pieces import AnswerPiece
from gateway.answers.reading import ReadingRules
from gateway.answers.writing import AnswerWriter

BOUNDARY = Boundary()
RULES = ReadingRules(BOUNDARY)
TRACE = "<think> at first 2. 2 doubles to 4. </think> #### 4"
INSIDE = "so 2 doubles. maybe the answer is \\boxed{4} #### 4. no, wait"
"""Reasoning in which a part looks like an answer."""
POCKET = ("word", "pieces")
FRAGMENTS = ["<think>", "</think>", "<thi", "nk>", "</", "####", " ", "\n", "a.", "4", "Answer:"]
ODD_BOUNDARIES = [
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
texts = st.lists(st.sampled_from(FRAGMENTS), max_size=10).map("".join)
boundaries = st.sampled_from(ODD_BOUNDARIES)
completions = st.lists(
    st.sampled_from("<think> </think> #### 4 2 joe has eggs . so then".split()), max_size=14
).map(" ".join)


def wrapped(model, decoder, **more) -> PreTrainedTokenizerFast:
    backend = Tokenizer(model)
    backend.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=backend, **more)


def gpt2_tokenizer() -> PreTrainedTokenizerFast:
    names = sorted(pre_tokenizers.ByteLevel.alphabet())
    return wrapped(models.BPE({c: i for i, c in enumerate(names)}, []), decoders.ByteLevel())


def llama2_tokenizer() -> PreTrainedTokenizerFast:
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


def word_piece_tokenizer(*, clean: bool) -> PreTrainedTokenizerFast:
    names = ["[UNK]", "a", "##b", ".", "'", "n't", "c", "'s", "do", "not", "##."]
    return wrapped(
        models.WordPiece({name: i for i, name in enumerate(names)}, unk_token="[UNK]"),
        decoders.WordPiece(cleanup=not clean),
        unk_token="[UNK]",
        clean_up_tokenization_spaces=clean,
    )


BUILDERS = {
    "word": lambda: build("word"),
    "pieces": lambda: build("pieces"),
    "gpt2": gpt2_tokenizer,
    "llama2": llama2_tokenizer,
    "word_pieces": lambda: word_piece_tokenizer(clean=False),
    "cleaning": lambda: word_piece_tokenizer(clean=True),
}


@cache
def tokenizer_named(name: str) -> PreTrainedTokenizerFast:
    """A tokenizer by its name; hypothesis does not let fixtures vary within one test."""
    return BUILDERS[name]()


def random_parts(data: st.DataObject, text: str) -> list[str]:
    """The text, divided at random."""
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def encoded(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def gpt2_alphabet() -> dict[int, str]:
    """The printable character for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {byte: chr(byte) for byte in printable}
    rest = [byte for byte in range(256) if byte not in table]
    return table | {byte: chr(256 + number) for number, byte in enumerate(rest)}


def write(
    writer: AnswerWriter, ids: Sequence[int], sizes: Sequence[int] = (1,), finish: Finish = "stop"
) -> list[AnswerPiece]:
    """The pieces of a completion whose chunks have these sizes, in turn."""
    tokens = [Token(id, logprob=-float(number)) for number, id in enumerate(ids)]
    pieces: list[AnswerPiece] = []
    start = turn = 0
    while start < len(tokens) and pieces_continue(pieces):
        size = sizes[turn % len(sizes)]
        pieces.append(writer.feed(Chunk(tuple(tokens[start : start + size]))))
        start, turn = start + size, turn + 1
    if pieces_continue(pieces):
        pieces.append(writer.feed(Chunk((), finish)))
    return pieces


def pieces_continue(pieces: Sequence[AnswerPiece]) -> bool:
    return not pieces or pieces[-1].finish is None


def engine_tokens(pieces: Sequence[AnswerPiece]) -> int:
    return sum(piece.engine_tokens for piece in pieces)


def text_of(pieces: Sequence[AnswerPiece]) -> str:
    return "".join(piece.text for piece in pieces)


def visible_tokens(pieces: Sequence[AnswerPiece]) -> list[Token]:
    return [token for piece in pieces for token in piece.tokens]
