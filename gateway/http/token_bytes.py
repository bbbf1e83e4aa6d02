"""The bytes of single tokens.

A decoder cannot give them for a token that holds a part of a character.
"""

import json
import re
from collections.abc import Iterator, Sequence
from functools import cache, cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class TokenBytes:
    """Bytes by token. Joined over the tokens of a text, they are the UTF-8 of that text.

    There is one exception: some decoders drop a space at the start of the text.

    Names in a byte-level alphabet (GPT-2) and names of byte tokens (SentencePiece) are read as
    bytes. SentencePiece's mark is read as a space, which is lost if a token is decoded alone. All
    other tokens have the UTF-8 of their text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def of(self, token: int) -> bytes:
        """The bytes of one token id."""
        name = self._tokenizer.convert_ids_to_tokens(token)
        if isinstance(name, str):
            byte = _BYTE.fullmatch(name) if "ByteFallback" in self._kinds else None
            if byte:
                return bytes([int(byte[1], 16)])
            table = _alphabet()
            # A name with any character outside the alphabet is plain text, as for the decoder.
            if "ByteLevel" in self._kinds:
                plain = not all(letter in table for letter in name)
                return name.encode() if plain else bytes(table[letter] for letter in name)
            if self._space and self._space in name:
                return name.replace(self._space, " ").encode()
        return str(self._tokenizer.decode([token])).encode()

    @cached_property
    def _decoders(self) -> tuple[dict[str, Any], ...]:
        return tuple(_decoders(self._tokenizer))

    @cached_property
    def _kinds(self) -> frozenset[str]:
        return frozenset(step["type"] for step in self._decoders)

    @cached_property
    def _space(self) -> str:
        """The mark for a space in names; empty if there is none."""
        for step in self._decoders:
            if step["type"] == "Metaspace":
                return step["replacement"]
            if step["type"] == "Replace" and step["content"] == " ":
                return step["pattern"].get("String", "")
        return ""


def _decoders(tokenizer: PreTrainedTokenizerBase) -> Iterator[dict[str, Any]]:
    """The steps of a tokenizer's decoder as plain data; none if it is written in Python."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if decoder is None:
        return
    waiting = [json.loads(decoder.__getstate__())]
    while waiting:
        step = waiting.pop(0)
        waiting = [*step.get("decoders", ()), *waiting]
        yield step


@cache
def _alphabet() -> dict[str, int]:
    """The byte for each of GPT-2's printable characters.

    A printable byte has its own character, and the others have the characters from 256 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    moved = {chr(256 + number): byte for number, byte in enumerate(rest)}
    return {chr(byte): byte for byte in printable} | moved


def readable(token: bytes) -> str | None:
    r"""A name for a part of a character, as OpenAI writes it (`bytes:\xe2\x80`); None for text."""
    try:
        token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(
            chr(byte) if 32 <= byte < 127 and byte != ord("\\") else f"\\x{byte:02x}"
            for byte in token
        )
    return None


def token_starts(tokens: Sequence[bytes], text: str) -> tuple[int, ...]:
    """The start of each token that spells a text, in characters.

    A token that begins inside a character starts at that character. If the tokens do not spell the
    text, all of them start at 0.
    """
    if len(tokens) == 1:
        return (0,)
    joined, spelt = b"".join(tokens), text.encode()
    if joined not in (spelt, b" " + spelt):
        return (0,) * len(tokens)
    # Bytes 10xxxxxx continue a character of UTF-8; every other byte starts one.
    characters = [at for at, byte in enumerate(joined) if byte & 0xC0 != 0x80]
    # The space that a decoder drops shifts all characters by one.
    dropped = len(joined) - len(spelt)
    starts: list[int] = []
    at = count = 0
    for token in tokens:
        while count < len(characters) and characters[count] <= at:
            count += 1
        starts.append(max(min(count - 1 - dropped, len(text) - 1), 0))
        at += len(token)
    return tuple(starts)
