"""What a gateway asks of an engine, whichever it is: token ids in, token ids out.

Engines speak no protocol of the outside. A request holds what the gateway has decided, and an
answer holds tokens, so there is no field through which an engine could be asked for more.
"""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

Finish = Literal["stop", "length"]


class EngineError(RuntimeError):
    """The engine broke, died, or was too slow; the request may be sent again."""


class EngineBusyError(EngineError):
    """The engine's queue is full; nothing was computed."""


@dataclass(frozen=True)
class EngineRequest:
    """One completion. Two engines given the same request write the same tokens greedily."""

    id: str
    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float = 1.0
    """0 takes the most likely token."""
    top_p: float = 1.0
    seed: int = 0
    logprobs: int | None = None
    """How many of the likeliest tokens to show beside the one written; None shows no numbers."""
    banned: tuple[int, ...] = ()
    """Token ids that may not be written."""
    strength: float | None = None
    """Of decoding defenses, in place of the configured one; None leaves that."""
    watermark_key: str | None = None
    """For decoding defenses that mark each customer's text; None takes the configured one."""


@dataclass(frozen=True)
class Token:
    """One token written; the end-of-sequence token is never among them.

    Log-probabilities are in nats and of the *defended* distribution: after decoding defenses,
    before temperature and nucleus.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    """Likeliest first."""


@dataclass(frozen=True)
class Chunk:
    """What was written since the last chunk; the last one says why it ended."""

    tokens: tuple[Token, ...]
    finish: Finish | None = None


@runtime_checkable
class Engine(Protocol):
    """Closing the iterator (`aclose`) before its end stops the row and frees its place."""

    def generate(self, request: EngineRequest) -> AsyncGenerator[Chunk]:
        """Chunks of one completion, as they are written.

        Raises:
            EngineBusyError: before the first chunk, if the queue is full.
            EngineError: if the engine fails.
        """
        ...
