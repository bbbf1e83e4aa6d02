"""Compare two models that cut the same text into different tokens.

Distributions can be compared at positions where both models have read exactly the same characters,
and also inside a token of the teacher. There, the teacher's tokens that begin with the pieces that
the student has already written give, with normalised probabilities, a distribution of the next
piece. Each token is replaced by the pieces with which the student would write it, and the
probabilities of tokens with the same next piece are summed. This is exact if the teacher's tokens
are made of the student's pieces, as with a word vocabulary and its byte pairs, and an approximation
otherwise.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from azeotrope.endings import end_pairs
from azeotrope.tokens import decode

# Texts to put before a token: many tokenizers spell a token differently at the start of a text.
_ANCHORS = (".", "a", "1", "\n")
# If one token has two roles, the later entry wins, and an end wins over all: it often pads too.
_ROLES = ("pad_token", "unk_token", "bos_token")
_BROKEN = "\ufffd"
"""The replacement character, which decoders write for bytes that are not a character."""
_DEPTH = 8
"""Greatest number of pieces that are kept per token; few tokens have more."""


def same_vocabulary(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> bool:
    return student.get_vocab() == teacher.get_vocab()


def spellings(
    teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase, vocab: int
) -> Int[Tensor, "vocab depth"]:
    """The student's pieces for every row of the teacher's head; -1 after the last piece.

    Rows that the student cannot write have -1 throughout. Tokens that begin, end or pad a text
    become the student's token of the same role. Other special tokens, and tokens that are a part of
    a character, become the student's token of the same spelling.

    Args:
        vocab: rows of the teacher's head; rows that pad it have no pieces.

    Raises:
        ValueError: if the student can write none of the teacher's tokens.
    """
    ours = student.get_vocab()
    roles = {getattr(teacher, role): getattr(student, f"{role}_id") for role in _ROLES}
    for end, twin in end_pairs(teacher, student).items():
        roles[teacher.convert_ids_to_tokens(end)] = twin
    special = set(teacher.all_special_tokens)
    before = teacher.tokenize(".")[-1:]
    alone = teacher.convert_tokens_to_string(before)
    pieces_of: dict[int, list[int]] = {}
    unsplit: dict[int, str] = {}
    for token, index in teacher.get_vocab().items():
        text = teacher.convert_tokens_to_string([*before, token]).removeprefix(alone)
        if token in roles:
            pieces_of[index] = [] if roles[token] is None else [roles[token]]
        elif token in special or _BROKEN in text:
            pieces_of[index] = [ours[token]] if token in ours else []
        else:
            unsplit[index] = text
    for anchor in _ANCHORS:
        pieces_of.update(_written_after(student, anchor, unsplit))
        unsplit = {index: text for index, text in unsplit.items() if index not in pieces_of}
    table = torch.full((vocab, _DEPTH), -1, dtype=torch.long)
    for index, pieces in pieces_of.items():
        # Only the teacher's own unknown token may become the student's.
        if index < vocab and (student.unk_token_id not in pieces or index == teacher.unk_token_id):
            table[index, : len(pieces)] = torch.tensor(pieces[:_DEPTH], dtype=torch.long)
    if not bool((table >= 0).any()):
        raise ValueError(
            "the student can write none of the teacher's tokens: nothing can be compared"
        )
    return table


def _written_after(
    student: PreTrainedTokenizerBase, anchor: str, texts: dict[int, str]
) -> dict[int, list[int]]:
    """The pieces of each text after an anchor; texts that merge with the anchor are left out."""
    if not texts:
        return {}
    alone: list[int] = student(anchor, add_special_tokens=False)["input_ids"]  # type: ignore[assignment]
    joined = student([anchor + text for text in texts.values()], add_special_tokens=False)
    size = len(alone)
    return {
        index: ids[size:]
        for index, ids in zip(texts, joined["input_ids"], strict=True)  # type: ignore[arg-type]
        if len(ids) > size and ids[:size] == alone
    }


def next_pieces(
    table: Int[Tensor, "vocab depth"], prefix: Int[Tensor, " pieces"]
) -> tuple[Int[Tensor, " vocab"], Bool[Tensor, " vocab"]]:
    """The piece that each of the teacher's tokens predicts after the pieces of `prefix`.

    Returns:
        The next piece of every token that begins with the prefix, and -1 for other tokens; and the
        tokens that end with the prefix, after which any piece may follow.
    """
    depth = len(prefix)
    fits = (table[:, :depth] == prefix).all(-1)
    following = table[:, depth]
    complete = fits & (following < 0) if depth else torch.zeros_like(fits)
    return following.where(fits, -1), complete


class Meeting(NamedTuple):
    """A position of the student at which it can be compared with a position of the teacher."""

    ours: int
    theirs: int
    prefix: tuple[int, ...]
    """Pieces of the teacher's token that the student has already written."""


def meetings(
    text: str,
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    table: Int[Tensor, "vocab depth"],
    *,
    finished: bool,
    written: Sequence[int] | None = None,
) -> list[Meeting]:
    """The positions at which two models' completion tokens meet, in the student's order.

    Args:
        table: `spellings` of the teacher's tokens.
        finished: whether both models also predict the end of the sequence, after the last token.
        written: the teacher's tokens of the text; None takes those that its tokenizer chooses.

    Raises:
        ValueError: if `written` does not spell the text.
    """
    pieces, ours = _encoded(student, text)
    words, theirs = _encoded(teacher, text)
    if written is not None and list(written) != words:
        words, theirs = list(written), _spelled(teacher, written, text)
    starts = _first_after(theirs)
    compared: list[Meeting] = []
    for read, index in _first_after(ours).items():
        if read not in starts:
            continue
        token = starts[read]
        compared.append(Meeting(index, token, ()))
        spelling = [piece for piece in table[words[token]].tolist() if piece >= 0]
        for depth in range(1, len(spelling)):
            if pieces[index : index + depth] != spelling[:depth]:
                break
            if index + depth < len(pieces):
                compared.append(Meeting(index + depth, token, tuple(spelling[:depth])))
    if finished:
        compared.append(Meeting(len(pieces), len(words), ()))
    return compared


def _encoded(
    tokenizer: PreTrainedTokenizerBase, text: str
) -> tuple[list[int], list[tuple[int, int]]]:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return list(encoded["input_ids"]), list(encoded["offset_mapping"])  # type: ignore[arg-type]


def _spelled(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], text: str
) -> list[tuple[int, int]]:
    """Offsets of tokens that a model chose itself.

    Raises:
        ValueError: if the tokens do not spell the text.
    """
    prefixes = [decode(tokenizer, ids[: count + 1]) for count in range(len(ids))]
    if (prefixes[-1] if prefixes else "") != text:
        raise ValueError("the tokens do not spell the text")
    # A character of which only some bytes were written does not count as read.
    ends = [len(prefix.rstrip(_BROKEN)) for prefix in prefixes]
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _first_after(offsets: Sequence[tuple[int, int]]) -> dict[int, int]:
    """Number of characters read -> the first token after them.

    The end of the preceding token says what has been read, not the token's own start: in some
    tokenizers the white space in front of a word belongs to the word's token, but not to its
    offsets.
    """
    first: dict[int, int] = {}
    read = 0
    for index, (start, end) in enumerate(offsets):
        # A token that starts before `read` continues a character that was written in part.
        if start >= read:
            first.setdefault(read, index)
        read = max(read, end)
    return first
