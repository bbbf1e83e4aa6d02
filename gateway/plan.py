"""From a request and a tier to what the engine is asked: every rule of a tier is applied here."""

import hmac
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from azeotrope.engine.protocol import EngineRequest
from azeotrope.tokens import encode_prompt
from gateway.http.requests import BAN, MOST_BANS, ChatRequest, CompletionRequest, Sampled, invalid
from gateway.policy import Tier

LEAST_TEMPERATURE = 1e-3
MOST_COMPLETIONS = 64
"""Of one request, all its prompts together."""


@dataclass(frozen=True)
class Plan:
    """The completions of one request, and what they may cost."""

    identity: str
    requests: tuple[EngineRequest, ...]
    prompt_tokens: int
    """Of all prompts, each counted once however many completions it has."""
    completion_tokens: int
    """The most that all completions together can have."""


def plan(
    request: Sampled,
    tier: Tier,
    tokenizer: PreTrainedTokenizerBase,
    *,
    identity: str,
    context: int,
    vocabulary: int,
    seed_key: bytes,
    watermark_key: str | None = None,
) -> Plan:
    """Check a request against its tier and turn it into engine requests.

    Args:
        identity: of the request; seeds of completions without a given one do not depend on it.
        context: tokens that prompt and completion may have together.
        vocabulary: how many token ids there are.
        seed_key: mixed into the seeds that clients give; a secret, and another for each customer.
        watermark_key: of the key that asks.

    Raises:
        ApiError: 400, with what was asked and what the tier allows.
    """
    shown = _logprobs(request, tier)
    banned = _banned(request, tier, vocabulary)
    temperature, top_p = _temperature(request, tier), _within("top_p", request.top_p, tier.top_p)
    n = request.n or 1
    if n > tier.n:
        raise invalid("n", f"n is at most {tier.n} for this key, got {n}")
    asked = request.most_tokens
    if asked is not None and asked > tier.max_tokens:
        raise invalid(
            "max_tokens", f"max_tokens is at most {tier.max_tokens} for this key, got {asked}"
        )
    prompts = _prompts(request, tokenizer)
    if n * len(prompts) > MOST_COMPLETIONS:
        raise invalid(
            "n", f"{len(prompts)} prompts of {n} completions are more than {MOST_COMPLETIONS}"
        )
    found: list[EngineRequest] = []
    for row, ids in enumerate(prompts):
        room = _room(ids, context)
        for number in range(n):
            place = row * n + number
            found.append(
                EngineRequest(
                    id=f"{identity}-{place}",
                    prompt=ids,
                    max_tokens=min(asked or tier.max_tokens, tier.max_tokens, room),
                    temperature=temperature,
                    top_p=top_p,
                    seed=_seed(request.seed, place, seed_key),
                    logprobs=shown,
                    banned=banned,
                    strength=tier.strength,
                    watermark_key=watermark_key,
                )
            )
    return Plan(
        identity, tuple(found), sum(map(len, prompts)), sum(item.max_tokens for item in found)
    )


def _logprobs(request: Sampled, tier: Tier) -> int | None:
    asked = request.asked_logprobs
    if asked is None:
        return None
    allowed = {"none": -1, "top1": 1, "topk": tier.top_k}[tier.logprobs]
    if allowed < 0:
        raise invalid("logprobs", "this key gets no log-probabilities", "logprobs_not_allowed")
    if asked > allowed:
        raise invalid(
            "logprobs",
            f"this key gets log-probabilities of at most {allowed} tokens, got {asked}",
            "logprobs_not_allowed",
        )
    return asked


def _banned(request: Sampled, tier: Tier, vocabulary: int) -> tuple[int, ...]:
    bias = request.logit_bias
    if not bias:
        return ()
    if not tier.bans:
        raise invalid("logit_bias", "this key may not use logit_bias", "logit_bias_not_allowed")
    if any(value != BAN for value in bias.values()):
        raise invalid("logit_bias", f"logit_bias may forbid tokens with {BAN:g} and nothing else")
    if len(bias) > MOST_BANS:
        raise invalid("logit_bias", f"at most {MOST_BANS} tokens can be forbidden, got {len(bias)}")
    for name in bias:
        # The length comes first: Python refuses to read numbers of thousands of digits.
        fits = name.isascii() and name.isdigit() and len(name) <= 12 and int(name) < vocabulary
        if not fits:
            raise invalid("logit_bias", f"{name[:40]!r} is no token id below {vocabulary}")
    return tuple(sorted({int(name) for name in bias}))


def _temperature(request: Sampled, tier: Tier) -> float:
    given = _within("temperature", request.temperature, tier.temperature)
    # Dividing by less would overflow, and the likeliest token has all the mass long before.
    return given if given >= LEAST_TEMPERATURE else 0.0


def _within(name: str, given: float | None, bounds: tuple[float, float]) -> float:
    """What was asked for, if the tier allows it; else as near to 1 as the tier allows."""
    least, greatest = bounds
    if given is None:
        return min(max(1.0, least), greatest)
    if not least <= given <= greatest:
        raise invalid(
            name,
            f"{name} must be between {least:g} and {greatest:g} for this key, got {given:g}",
        )
    return given


def _prompts(request: Sampled, tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, ...]]:
    if isinstance(request, ChatRequest):
        messages = [message.plain() for message in request.messages]
        try:
            return [encode_prompt(tokenizer, messages)]
        except Exception as error:
            # Templates raise what they like when the roles do not alternate as they want.
            raise invalid("messages", f"the chat template refuses this: {error}"[:500]) from None
    assert isinstance(request, CompletionRequest)
    return [tuple(tokenizer(text)["input_ids"]) for text in request.texts]  # type: ignore[arg-type]


def _room(ids: Sequence[int], context: int) -> int:
    if not ids:
        raise invalid("prompt", "the prompt is empty")
    room = context - len(ids)
    if room < 1:
        raise invalid(
            "messages",
            f"the prompt has {len(ids)} tokens, and the model's context is {context}; shorten it",
            "context_length_exceeded",
        )
    return room


def _seed(given: int | None, place: int, key: bytes) -> int:
    """A seed for each completion: the same for the same request, different within it.

    Draws from a seed are public arithmetic. Who could choose it would know each draw beforehand,
    and read the distribution off the tokens by halving, as finely as he likes.
    """
    if given is None:
        return secrets.randbits(63)
    mixed = hmac.digest(key, f"{given}:{place}".encode(), "sha256")
    return int.from_bytes(mixed[:8], "big") >> 1
