"""The bytes that tokens stand for, which a decoder cannot say of a part of a character."""

import json
import re
from collections.abc import Iterator, Sequence
from functools import cache, cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class TokenBytes:
    """Joined over the tokens of a text they are its UTF-8, but for a space in front that some drop.

    Names of byte-level alphabets (GPT-2) and of byte tokens (SentencePiece) are read as bytes, and
    SentencePiece's mark as the space that it is, which is lost where a token is decoded alone.
    Whatever else there is has the UTF-8 of its text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def of(self, token: int) -> bytes:
        name = self._tokenizer.convert_ids_to_tokens(token)
        if isinstance(name, str):
            byte = _BYTE.fullmatch(name) if "ByteFallback" in self._kinds else None
            if byte:
                return bytes([int(byte[1], 16)])
            table = _alphabet()
            # The decoder, too, takes a name with any other character in it for plain text.
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
        return frozenset(item["type"] for item in self._decoders)

    @cached_property
    def _space(self) -> str:
        """What stands for a space in names; empty if nothing does."""
        for item in self._decoders:
            if item["type"] == "Metaspace":
                return item["replacement"]
            if item["type"] == "Replace" and item["content"] == " ":
                return item["pattern"].get("String", "")
        return ""


def _decoders(tokenizer: PreTrainedTokenizerBase) -> Iterator[dict[str, Any]]:
    """The steps of a tokenizer's decoder as plain data; none for one that is written in Python."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if decoder is None:
        return
    waiting = [json.loads(decoder.__getstate__())]
    while waiting:
        item = waiting.pop(0)
        waiting = [*item.get("decoders", ()), *waiting]
        yield item


@cache
def _alphabet() -> dict[str, int]:
    """GPT-2's printable character for each byte: its own where it has one, else one from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    moved = {chr(256 + place): byte for place, byte in enumerate(rest)}
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


def places(tokens: Sequence[bytes], text: str) -> tuple[int, ...]:
    """Where in a text each of the tokens that spell it begins, in characters.

    One that begins inside a character is placed at that character. Tokens that do not spell the
    text all stand at its beginning.
    """
    if len(tokens) == 1:
        return (0,)
    joined, spelt = b"".join(tokens), text.encode()
    if joined not in (spelt, b" " + spelt):
        return (0,) * len(tokens)
    # A character is placed by its first byte.
    starts = [at for at, byte in enumerate(joined) if byte & 0xC0 != 0x80]
    dropped = len(joined) - len(spelt)
    found: list[int] = []
    at = begun = 0
    for token in tokens:
        while begun < len(starts) and starts[begun] <= at:
            begun += 1
        found.append(max(min(begun - 1 - dropped, len(text) - 1), 0))
        at += len(token)
    return tuple(found)
