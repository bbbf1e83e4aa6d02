"""Compare two models that cut the same text into different tokens.

Distributions can be compared where both models have read exactly the same characters, and inside
a token of the teacher too: of the tokens that begin with the pieces which the student has written,
the teacher's probabilities, normalised, are those of the piece to come. Each token is taken for the
pieces by which the student would write it, and tokens with the same next piece are summed. This is
exact when the teacher's tokens are made of the student's pieces, as with a word vocabulary and its
byte pairs, and an approximation otherwise.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from azeotrope.tokens import decode

# Text put before a token, so that the student does not take it for the start of a text.
_ANCHORS = (".", "a", "1", "\n")
# Later ones win where one token has two roles: what ends a text often pads it too.
_ROLES = ("pad_token", "unk_token", "bos_token", "eos_token")
_BROKEN = "\ufffd"
"""What a decoder makes of bytes that are no character."""
_DEPTH = 8
"""Pieces of a token that are looked at; few tokens have more."""


def same_vocabulary(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    return one.get_vocab() == other.get_vocab()


def spellings(
    teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase, vocab: int
) -> Int[Tensor, "vocab depth"]:
    """The student's pieces for every row of the teacher's head; -1 after the last, or throughout.

    Tokens that begin, end or pad a text are those of the same role, whatever their spelling. Other
    special tokens, and tokens that are a part of a character, are those of the same spelling.

    Args:
        vocab: rows of the teacher's head; rows that pad it have no pieces.

    Raises:
        ValueError: if the student can write none of the teacher's tokens.
    """
    ours = student.get_vocab()
    roles = {getattr(teacher, role): getattr(student, f"{role}_id") for role in _ROLES}
    special = set(teacher.all_special_tokens)
    before = teacher.tokenize(".")[-1:]
    alone = teacher.convert_tokens_to_string(before)
    found: dict[int, list[int]] = {}
    waiting: dict[int, str] = {}
    for token, index in teacher.get_vocab().items():
        text = teacher.convert_tokens_to_string([*before, token]).removeprefix(alone)
        if token in roles:
            found[index] = [] if roles[token] is None else [roles[token]]
        elif token in special or _BROKEN in text:
            found[index] = [ours[token]] if token in ours else []
        else:
            waiting[index] = text
    for anchor in _ANCHORS:
        found.update(_written_after(student, anchor, waiting))
        waiting = {index: text for index, text in waiting.items() if index not in found}
    table = torch.full((vocab, _DEPTH), -1, dtype=torch.long)
    for index, pieces in found.items():
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
    """The pieces of each text after an anchor, where the two do not grow together."""
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
    """What each of the teacher's tokens says about the piece that comes after those `prefix`.

    Returns:
        The next piece of every token that begins so, and -1 for the others; and the tokens that
        are complete, after which the student may write anything else.
    """
    depth = len(prefix)
    fits = (table[:, :depth] == prefix).all(-1)
    following = table[:, depth]
    complete = fits & (following < 0) if depth else torch.zeros_like(fits)
    return following.where(fits, -1), complete


class Meeting(NamedTuple):
    """A token of the student's that can be compared with one of the teacher's."""

    ours: int
    theirs: int
    prefix: tuple[int, ...]
    """Pieces of the teacher's token that the student has written already."""


def meetings(
    text: str,
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    table: Int[Tensor, "vocab depth"],
    *,
    finished: bool,
    written: Sequence[int] | None = None,
) -> list[Meeting]:
    """Where the completion tokens of two models meet, in the student's order.

    Args:
        table: `spellings` of the teacher's tokens.
        finished: both models also predict the end of the sequence, after the last token.
        written: the teacher's tokens of the text, which need not be those that its tokenizer
            would choose.

    Raises:
        ValueError: if `written` does not spell the text.
    """
    pieces, ours = _encoded(student, text)
    words, theirs = _encoded(teacher, text)
    if written is not None and list(written) != words:
        words, theirs = list(written), _spelled(teacher, written, text)
    starts = _reads(theirs)
    found: list[Meeting] = []
    for read, index in _reads(ours).items():
        if read not in starts:
            continue
        token = starts[read]
        found.append(Meeting(index, token, ()))
        spelling = [piece for piece in table[words[token]].tolist() if piece >= 0]
        for depth in range(1, len(spelling)):
            if pieces[index : index + depth] != spelling[:depth]:
                break
            if index + depth < len(pieces):
                found.append(Meeting(index + depth, token, tuple(spelling[:depth])))
    if finished:
        found.append(Meeting(len(pieces), len(words), ()))
    return found


def _encoded(
    tokenizer: PreTrainedTokenizerBase, text: str
) -> tuple[list[int], list[tuple[int, int]]]:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return list(encoded["input_ids"]), list(encoded["offset_mapping"])  # type: ignore[arg-type]


def _spelled(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], text: str
) -> list[tuple[int, int]]:
    """Offsets of tokens that a model chose itself."""
    spelled = [decode(tokenizer, ids[: count + 1]) for count in range(len(ids))]
    if (spelled[-1] if spelled else "") != text:
        raise ValueError("the tokens do not spell the text")
    # A part of a character has not been read as the text has it.
    ends = [len(part.rstrip(_BROKEN)) for part in spelled]
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _reads(offsets: Sequence[tuple[int, int]]) -> dict[int, int]:
    """Number of characters read -> the first token after them.

    What has been read is told by where the token before ends: in some tokenizers the white space
    in front of a word belongs to the word's token, but not to its offsets.
    """
    found: dict[int, int] = {}
    read = 0
    for index, (start, end) in enumerate(offsets):
        # A token that starts earlier continues a character of which a part has been written.
        if start >= read:
            found.setdefault(read, index)
        read = max(read, end)
    return found
