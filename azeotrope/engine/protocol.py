"""What a gateway asks of an engine, whichever it is: token ids in, token ids out.

Engines speak no protocol of the outside. A request holds what the gateway has decided, and an
answer holds tokens, so there is no field through which an engine could be asked for more.
"""

import math
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
    """Computes completions, several at a time."""

    @property
    def healthy(self) -> bool:
        """Whether requests are served; an engine that failed does not recover."""
        ...

    def close(self) -> None:
        """Serve no more requests and free the model; open requests get an `EngineError`."""
        ...

    def generate(self, request: EngineRequest) -> AsyncGenerator[Chunk]:
        """Chunks of one completion, as they are written.

        Closing the iterator (`aclose`) before its end stops the completion and frees its place.

        Raises:
            EngineBusyError: before the first chunk, if the queue is full.
            EngineError: if the engine fails.
        """
        ...


def check_request(request: EngineRequest, *, context: int, vocabulary: int) -> None:
    """Refuse what no engine can compute, before it is queued.

    Args:
        context: tokens that prompt and completion may have together.
        vocabulary: how many token ids there are.

    Raises:
        ValueError: with what was given and what is allowed.
    """
    prompt = len(request.prompt)
    if prompt == 0:
        raise ValueError("the prompt has no tokens; it needs at least one")
    if prompt > context - 1:
        raise ValueError(
            f"a prompt of {prompt} tokens leaves no room in the model's context of "
            f"{context}; give at most {context - 1}"
        )
    for name, ids in (("prompt", request.prompt), ("banned", request.banned)):
        wrong = [id for id in ids if not 0 <= id < vocabulary]
        if wrong:
            raise ValueError(f"{name} holds token id {wrong[0]}; ids go from 0 to {vocabulary - 1}")
    if len(set(request.banned)) == vocabulary:
        raise ValueError(f"all {vocabulary} tokens are banned; leave at least one")
    if request.max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {request.max_tokens}")
    if not (request.temperature >= 0 and math.isfinite(request.temperature)):
        raise ValueError(f"temperature must be 0 or greater, got {request.temperature}")
    if not 0 < request.top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {request.top_p}")
    if request.logprobs is not None and not 0 <= request.logprobs <= vocabulary:
        raise ValueError(f"logprobs must be from 0 to {vocabulary}, got {request.logprobs}")
    if not -(2**63) <= request.seed < 2**64:
        raise ValueError(f"seed must fit 64 bits, got {request.seed}")
