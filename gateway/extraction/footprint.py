"""What a gateway remembers of a request: figures and keyed hashes, never its words."""

import hashlib
import re
import secrets
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from gateway.extraction.elicitation import asks_for_reasoning

EDGE = 8
"""Words at either end of a prompt that make a template, if prompts share them."""

SEARCHED = 4000
"""Characters at either end that are searched for forms and phrases: the work of one request must
be bounded, and instructions stand at the ends. The hash of the prompt is of the whole."""

# Footprints never leave the process, so hashes need not agree between replicas or restarts, and
# with a key that nobody knows addresses and short prompts cannot be found by trying them all.
_SECRET = secrets.token_bytes(32)
_WORD = re.compile(r"[^\W\d_]+|\d+(?:[.,]\d+)*|[^\w\s]")


@dataclass(frozen=True, slots=True)
class Observation:
    """What is kept of one request: 64-bit keyed hashes and figures, no text."""

    at: float
    """Seconds since 1970."""
    prompt: int
    """Of the text, without regard to case and white space."""
    template: int | None
    """Of the text with numbers and capitalised words masked; None below four words."""
    head: int | None
    """Of the masked text's first words; None if it has no more than `EDGE`."""
    tail: int | None
    length: int
    """Characters of the prompt."""
    max_tokens: int | None
    """None if the client did not set it."""
    temperature: float
    asked_logprobs: bool
    used_bans: bool
    elicits_reasoning: bool
    ip_hash: int
    user_agent_hash: int
    refused: bool = False
    """Whether the key's tier does not allow it; it was not answered."""


def observe(
    text: str,
    *,
    at: float,
    max_tokens: int | None,
    temperature: float,
    logprobs: bool = False,
    bans: bool = False,
    address: str = "",
    user_agent: str = "",
    instructions: str = "",
    refused: bool = False,
    secret: bytes = _SECRET,
) -> Observation:
    """What is remembered of a request.

    Args:
        text: what the client asks now, best the last message of the user alone. The history of a
            conversation before it hides that two requests are the same.
        instructions: a system message or history, searched for phrases that ask for reasoning.
        secret: key of the BLAKE2b hashes, 16 to 64 bytes. The default is drawn when the process
            starts: hashes of two replicas then cannot be compared, nor need they be. Give all
            replicas the same one to score their observations together.

    Raises:
        ValueError: if the secret is too short or too long.
    """
    if not 16 <= len(secret) <= 64:
        raise ValueError(f"the secret must have 16 to 64 bytes, got {len(secret)}")
    masked = _masked(_ends(text))

    return Observation(
        at=at,
        prompt=_hashed(secret, "prompt", text.casefold().split()),
        template=_hashed(secret, "template", masked) if len(masked) >= 4 else None,
        head=_hashed(secret, "head", masked[:EDGE]) if len(masked) > EDGE else None,
        tail=_hashed(secret, "tail", masked[-EDGE:]) if len(masked) > EDGE else None,
        length=len(text),
        max_tokens=max_tokens,
        temperature=temperature,
        asked_logprobs=logprobs,
        used_bans=bans,
        elicits_reasoning=asks_for_reasoning(f"{_ends(instructions)}\n{_ends(text)}"),
        ip_hash=_hashed(secret, "address", [address]),
        user_agent_hash=_hashed(secret, "agent", [user_agent]),
        refused=refused,
    )


def _hashed(secret: bytes, kind: str, words: Sequence[str]) -> int:
    """64 bits of words; equal words of two kinds have different ones."""
    data = " ".join(words).encode(errors="replace")
    found = hashlib.blake2b(data, digest_size=8, key=secret, person=kind.encode())
    return int.from_bytes(found.digest(), "big")


def _ends(text: str) -> str:
    if len(text) <= 2 * SEARCHED:
        return text
    return f"{text[:SEARCHED]}\n{text[-SEARCHED:]}"


def _masked(text: str) -> list[str]:
    """Words and signs, with 0 for a number and N for a word with a capital first letter."""
    return [
        "0" if word[0].isdigit() else "N" if word[0].isupper() else word
        for word in _WORD.findall(unicodedata.normalize("NFKC", text))
    ]
