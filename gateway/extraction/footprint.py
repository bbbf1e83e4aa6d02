"""What a gateway remembers of a request for the extraction score: numbers and hashes, no words."""

import hashlib
import re
import secrets
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from gateway.extraction.elicitation import asks_for_reasoning

EDGE = 8
"""Words at either end of a prompt that make a template if several prompts share them."""

SEARCHED = 4000
"""Characters at either end of a prompt that are searched for templates and phrases. The work per
request must have a bound, and instructions are usually at the ends. The hash covers the whole
prompt."""

# The key of the hashes is drawn when the process starts and never leaves it. Without a secret key,
# an address or a short prompt could be recovered from its hash by trying all of them. Observations
# never leave the process either, so the hashes need not agree between replicas or restarts.
_SECRET = secrets.token_bytes(32)
_WORD = re.compile(r"[^\W\d_]+|\d+(?:[.,]\d+)*|[^\w\s]")


@dataclass(frozen=True, slots=True)
class RequestFacts:
    """What the extraction score reads of one request; only its `Observation` is remembered."""

    text: str
    """What the client asks now: best the last message of the user alone. With the history of the
    conversation before it, two equal requests would look different."""
    at: float
    """Seconds since 1970."""
    max_tokens: int | None
    """None if the client did not set it."""
    temperature: float
    logprobs: bool = False
    bans: bool = False
    address: str = ""
    user_agent: str = ""
    instructions: str = ""
    """A system message or the history, which is searched for requests for reasoning."""
    refused: bool = False
    """Whether the key's tier does not allow the request; it was not answered."""


@dataclass(frozen=True, slots=True)
class Observation:
    """What is remembered of one request: 64-bit keyed hashes and numbers, no text."""

    at: float
    """Seconds since 1970."""
    prompt: int
    """Hash of the text, without regard to case and white space."""
    template: int | None
    """Hash of the text with numbers and capitalised words masked; None below four words."""
    head: int | None
    """Hash of the masked text's first words; None if it has no more than `EDGE`."""
    tail: int | None
    """Hash of its last words, likewise."""
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


def observe(request: RequestFacts) -> Observation:
    """What is remembered of a request."""
    masked = _masked(_ends(request.text))

    return Observation(
        at=request.at,
        prompt=_hashed("prompt", request.text.casefold().split()),
        template=_hashed("template", masked) if len(masked) >= 4 else None,
        head=_hashed("head", masked[:EDGE]) if len(masked) > EDGE else None,
        tail=_hashed("tail", masked[-EDGE:]) if len(masked) > EDGE else None,
        length=len(request.text),
        max_tokens=request.max_tokens,
        temperature=request.temperature,
        asked_logprobs=request.logprobs,
        used_bans=request.bans,
        elicits_reasoning=asks_for_reasoning(
            f"{_ends(request.instructions)}\n{_ends(request.text)}"
        ),
        ip_hash=_hashed("address", [request.address]),
        user_agent_hash=_hashed("agent", [request.user_agent]),
        refused=request.refused,
    )


def _hashed(kind: str, words: Sequence[str]) -> int:
    """A 64-bit hash of words. Equal words of two kinds have different hashes."""
    encoded = " ".join(words).encode(errors="replace")
    # BLAKE2b's own key makes this a MAC; `person` separates the kinds.
    digest = hashlib.blake2b(encoded, digest_size=8, key=_SECRET, person=kind.encode())
    return int.from_bytes(digest.digest(), "big")


def _ends(text: str) -> str:
    if len(text) <= 2 * SEARCHED:
        return text
    return f"{text[:SEARCHED]}\n{text[-SEARCHED:]}"


def _masked(text: str) -> list[str]:
    """Words and signs, with 0 for each number and N for each capitalised word.

    Two prompts that fill one template with other numbers and names are equal after this.
    """
    return [
        "0" if word[0].isdigit() else "N" if word[0].isupper() else word
        for word in _WORD.findall(unicodedata.normalize("NFKC", text))
    ]
