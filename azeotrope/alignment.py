"""Compare two models that cut the same text into different tokens.

Distributions can be compared where both models have read exactly the same characters. There, each
teacher token is taken for the first piece by which the student would write it, and the
probabilities of tokens with the same first piece are summed. This is exact when the teacher's
tokens are made of the student's pieces, as with a word vocabulary and its byte pairs, and an
approximation otherwise. What the teacher knows of a token's later pieces is not used.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from azeotrope.tokens import decode

# Text put before a token, so that the student does not take it for the start of a text.
_ANCHORS = (".", "a", "1", "\n")
# Later ones win where one token has two roles: what ends a text often pads it too.
_ROLES = ("pad_token", "unk_token", "bos_token", "eos_token")
_BROKEN = "\ufffd"
"""What a decoder makes of bytes that are no character."""


def same_vocabulary(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    return one.get_vocab() == other.get_vocab()


def first_pieces(
    teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase, vocab: int
) -> Int[Tensor, " vocab"]:
    """The student's first piece for every row of the teacher's head; -1 where it has none.

    Tokens that begin, end or pad a text are those of the same role, whatever their spelling. Other
    special tokens, and tokens that are a part of a character, are those of the same spelling.

    Args:
        vocab: rows of the teacher's head, rows that pad it included.
    """
    pieces = torch.full((vocab,), -1, dtype=torch.long)
    ours = student.get_vocab()
    roles = {getattr(teacher, role): getattr(student, f"{role}_id") for role in _ROLES}
    special = set(teacher.all_special_tokens)
    waiting: dict[int, str] = {}
    for token, index in teacher.get_vocab().items():
        text = _text(teacher, token)
        if index >= vocab:
            continue
        if token in roles:
            pieces[index] = -1 if roles[token] is None else roles[token]
        elif token in special or _BROKEN in text:
            pieces[index] = ours.get(token, -1)
        elif text:
            waiting[index] = text
    for anchor in _ANCHORS:
        found = _after(student, anchor, waiting)
        for index, piece in found.items():
            pieces[index] = -1 if piece == student.unk_token_id else piece
            del waiting[index]
    return pieces


def _text(tokenizer: PreTrainedTokenizerBase, token: str) -> str:
    """What a token writes in the middle of a text, white space included."""
    before = tokenizer.tokenize(".")[-1:]
    alone = tokenizer.convert_tokens_to_string(before)
    joined = tokenizer.convert_tokens_to_string([*before, token])
    return joined.removeprefix(alone)


def _after(student: PreTrainedTokenizerBase, anchor: str, texts: dict[int, str]) -> dict[int, int]:
    """The first piece of each text after an anchor, where the two do not grow together."""
    if not texts:
        return {}
    alone = student(anchor, add_special_tokens=False)["input_ids"]
    joined = student([anchor + text for text in texts.values()], add_special_tokens=False)
    size = len(alone)  # type: ignore[arg-type]
    return {
        index: ids[size]
        for index, ids in zip(texts, joined["input_ids"], strict=True)  # type: ignore[arg-type]
        if len(ids) > size and ids[:size] == alone
    }


def common_starts(
    text: str,
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    *,
    finished: bool,
    written: Sequence[int] | None = None,
) -> tuple[list[int], list[int]]:
    """Indices of the completion tokens before which both have read the same characters.

    Args:
        finished: both models also predict the end of the sequence, after the last token.
        written: the teacher's tokens of the text, which need not be those that its tokenizer
            would choose.

    Returns:
        The student's and the teacher's indices, one pair a position.

    Raises:
        ValueError: if `written` does not spell the text.
    """
    ours = _reads(_offsets(student, text))
    encoded = teacher(text, add_special_tokens=False)["input_ids"]
    if written is None or list(written) == encoded:
        spans = _offsets(teacher, text)
    else:
        spans = _spelled(teacher, written, text)
    theirs = _reads(spans)
    shared = [characters for characters in ours if characters in theirs]
    pairs = [(ours[characters], theirs[characters]) for characters in shared]
    if finished:
        pairs.append((len(_offsets(student, text)), len(spans)))
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def _offsets(tokenizer: PreTrainedTokenizerBase, text: str) -> list[tuple[int, int]]:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return list(encoded["offset_mapping"])  # type: ignore[arg-type]


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
