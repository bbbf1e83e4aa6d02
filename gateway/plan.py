"""From a request to engine requests: every rule of a tier is applied here."""

import hmac
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from azeotrope.endings import end_ids
from azeotrope.engine.protocol import EngineRequest
from azeotrope.tokens import encode_prompt
from gateway.coarse import coarse_limit, coarse_top_p, length_shift
from gateway.http.requests import (
    BAN,
    MOST_BANS,
    ApiRequest,
    ChatRequest,
    CompletionRequest,
    invalid,
)
from gateway.policy import Tier

LEAST_TEMPERATURE = 1e-3
MOST_COMPLETIONS = 64
"""The most completions of one request, for all its prompts together."""


@dataclass(frozen=True)
class Plan:
    """The completions of one request, and the most that they can cost."""

    identity: str
    requests: tuple[EngineRequest, ...]
    prompt_tokens: int
    """Tokens of all prompts. Each prompt counts once, whatever its number of completions."""
    completion_tokens: int
    """The largest number of tokens of all completions together."""
    usage_shift: int = 0
    """Where the cells of hidden lengths begin for these prompts, in tokens."""


@dataclass(frozen=True)
class ModelLimits:
    """What the model can read and write."""

    tokenizer: PreTrainedTokenizerBase
    context: int
    """The most tokens of prompt and completion together."""
    vocabulary: int
    """The number of token ids."""


def plan(
    request: ApiRequest,
    tier: Tier,
    model: ModelLimits,
    *,
    identity: str,
    seed_key: bytes,
    watermark_key: str | None = None,
) -> Plan:
    """Check a request against its tier and turn it into engine requests.

    Args:
        identity: of the request.
        seed_key: a secret of the account, mixed into the seeds that clients give.
        watermark_key: of the API key, for decoding defenses that mark each customer's text.

    Raises:
        ApiError: 400, with the requested value and what the tier allows.
    """
    logprobs = _logprobs(request, tier)
    banned = _banned(request, tier, model)
    temperature = _temperature(request, tier)
    n, longest = _completions(request, tier), _longest(request, tier)
    prompts = _prompts(request, model.tokenizer)
    if n * len(prompts) > MOST_COMPLETIONS:
        raise invalid(
            "n", f"{len(prompts)} prompts of {n} completions are more than {MOST_COMPLETIONS}"
        )
    shift = 0
    if tier.reasoning != "shown":
        shift = length_shift(prompts, seed_key)
        longest = coarse_limit(longest, shift)
    knobs = f"{temperature!r} {request.top_p!r} {banned} {n} {longest} {logprobs} {tier.strength}"

    requests = [
        EngineRequest(
            id=f"{identity}-{row * n + number}",
            prompt=ids,
            max_tokens=min(longest, room),
            temperature=temperature,
            top_p=_nucleus(request, tier, ids, seed_key),
            seed=_seed(request.seed, f"{row * n + number} {knobs} {ids}", seed_key),
            logprobs=logprobs,
            banned=banned,
            strength=tier.strength,
            watermark_key=watermark_key,
        )
        for row, (ids, room) in enumerate((ids, _room(ids, model.context)) for ids in prompts)
        for number in range(n)
    ]
    return Plan(
        identity,
        tuple(requests),
        sum(map(len, prompts)),
        sum(completion.max_tokens for completion in requests),
        shift,
    )


def _completions(request: ApiRequest, tier: Tier) -> int:
    n = request.n or 1
    if n > tier.n:
        raise invalid("n", f"n is at most {tier.n} for this key, got {n}")
    return n


def _longest(request: ApiRequest, tier: Tier) -> int:
    """The most tokens of one completion."""
    requested = request.most_tokens
    if requested is not None and requested > tier.max_tokens:
        raise invalid(
            "max_tokens", f"max_tokens is at most {tier.max_tokens} for this key, got {requested}"
        )
    return requested or tier.max_tokens


def _logprobs(request: ApiRequest, tier: Tier) -> int | None:
    requested = request.asked_logprobs
    if requested is None:
        return None
    allowed = {"none": -1, "top1": 1, "topk": tier.top_k}[tier.logprobs]
    if allowed < 0:
        raise invalid("logprobs", "this key gets no log-probabilities", "logprobs_not_allowed")
    if requested > allowed:
        raise invalid(
            "logprobs",
            f"this key gets log-probabilities of at most {allowed} tokens, got {requested}",
            "logprobs_not_allowed",
        )
    return requested


def _banned(request: ApiRequest, tier: Tier, model: ModelLimits) -> tuple[int, ...]:
    vocabulary = model.vocabulary
    bias = request.logit_bias
    if not bias:
        return ()
    if not tier.bans:
        raise invalid("logit_bias", "this key may not use logit_bias", "logit_bias_not_allowed")
    # A bias that moves a token without banning it measures the distance between two logits by
    # bisection, without any log-probabilities.
    if any(value != BAN for value in bias.values()):
        raise invalid("logit_bias", f"logit_bias may forbid tokens with {BAN:g} and nothing else")
    if len(bias) > MOST_BANS:
        raise invalid("logit_bias", f"at most {MOST_BANS} tokens can be forbidden, got {len(bias)}")
    for name in bias:
        # The length is checked first, because `int` raises for thousands of digits.
        fits = name.isascii() and name.isdigit() and len(name) <= 12 and int(name) < vocabulary
        if not fits:
            raise invalid("logit_bias", f"{name[:40]!r} is no token id below {vocabulary}")
    banned = {int(name) for name in bias}
    ends = banned & end_ids(model.tokenizer)
    if ends and tier.reasoning != "shown":
        # Without an end, the length of what is hidden could be read off what is shown.
        raise invalid(
            "logit_bias",
            f"token {min(ends)} ends a completion; this key, whose reasoning is hidden, may not "
            "forbid it",
            "logit_bias_not_allowed",
        )
    return tuple(sorted(banned))


def _temperature(request: ApiRequest, tier: Tier) -> float:
    temperature = _within("temperature", request.temperature, tier.temperature)
    # Dividing logits by less may overflow float32. The likeliest token has all the mass well above
    # this value, so the result is greedy decoding either way.
    return temperature if temperature >= LEAST_TEMPERATURE else 0.0


def _nucleus(request: ApiRequest, tier: Tier, prompt: Sequence[int], key: bytes) -> float:
    """The nucleus of one prompt: coarse if the client chose it."""
    top_p = _within("top_p", request.top_p, tier.top_p)
    return top_p if request.top_p is None else coarse_top_p(top_p, prompt, key, tier.top_p)


def _within(name: str, value: float | None, bounds: tuple[float, float]) -> float:
    """The requested value if the tier allows it; without one, the allowed value nearest to 1."""
    least, greatest = bounds
    if value is None:
        return min(max(1.0, least), greatest)
    if not least <= value <= greatest:
        raise invalid(
            name,
            f"{name} must be between {least:g} and {greatest:g} for this key, got {value:g}",
        )
    return value


def _prompts(request: ApiRequest, tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, ...]]:
    if isinstance(request, ChatRequest):
        messages = [message.plain() for message in request.messages]
        try:
            return [encode_prompt(tokenizer, messages)]
        except Exception as error:
            # Templates are Jinja programs: they raise errors of any kind, for example if the roles
            # do not alternate.
            raise invalid("messages", f"the chat template rejects this: {error}"[:500]) from None
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


def _seed(seed: int | None, purpose: str, key: bytes) -> int:
    """A seed for each completion: the same for the same request, different for any other.

    The draws of a seed are public arithmetic. A client that could choose the seed itself would know
    each draw in advance. It could then measure the distribution by bisection over seeds, as exactly
    as it likes, from the tokens alone. So the seed is a keyed hash of the client's number and of
    everything else in the request: two requests that differ in one setting share no draw.
    """
    if seed is None:
        return secrets.randbits(63)
    mixed = hmac.digest(key, f"{seed}:{purpose}".encode(), "sha256")
    return int.from_bytes(mixed[:8], "big") >> 1
