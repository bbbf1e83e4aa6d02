"""Requests that are known to leak on some servers, and the check that finds the leak.

A probe is an ordinary request with one addition, so that a refusal is about the addition.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

CHAT, TEXT = "/chat/completions", "/completions"
PROMPT = "joe has 2 eggs . he drops 1 . how many eggs does joe have ?"
MOST_LOGPROBS = 5
"""The most that any tier of this gateway shows. The token that was written may come in addition."""
MOST_DECIMALS = 4


@dataclass(frozen=True)
class LeakProbe:
    """One request, and the check of its answer."""

    name: str
    path: str
    body: Mapping[str, Any]
    leaks: Callable[[dict[str, Any]], str]
    """What an accepted answer reveals, in words; empty if it reveals nothing."""


def messages() -> list[dict[str, Any]]:
    """The conversation of all chat probes."""
    return [{"role": "user", "content": PROMPT}]


def probes() -> Iterator[LeakProbe]:
    """Every probe whose answer is not a stream."""
    chat, text = {"messages": messages()}, {"prompt": PROMPT}
    for value in (0, 1, -1):
        yield LeakProbe(
            f"prompt_logprobs={value}", CHAT, chat | {"prompt_logprobs": value}, _prompt
        )
    # Log-probabilities of a prompt score any text that a client chooses, one request per text.
    yield LeakProbe("completions: prompt_logprobs", TEXT, text | {"prompt_logprobs": 1}, _prompt)
    yield LeakProbe("echo", TEXT, text | {"echo": True}, _echoes)
    yield LeakProbe("echo and logprobs", TEXT, text | {"echo": True, "logprobs": 1}, _echoes)
    yield LeakProbe("echo, no tokens", TEXT, text | {"echo": True, "max_tokens": 0}, _echoes)
    numbers = {"logprobs": True, "top_logprobs": 5}
    ids = {"logprob_token_ids": list(range(64))}
    yield LeakProbe("logprob_token_ids", CHAT, chat | {"logprobs": True} | ids, _chosen)
    yield LeakProbe("completions: logprob_token_ids", TEXT, text | {"logprobs": 1} | ids, _chosen)
    # A bias lifts any token into the visible ones, so that all logits can be read one by one.
    bias = {"logit_bias": {"5": 100, "6": 100}}
    yield LeakProbe("logit_bias and logprobs", CHAT, chat | numbers | bias, _has_numbers)
    yield LeakProbe("completions: the same", TEXT, text | {"logprobs": 5} | bias, _has_numbers)
    yield LeakProbe(
        "ban and logprobs", CHAT, chat | numbers | {"logit_bias": {"5": -100}}, _has_numbers
    )
    yield LeakProbe("a bias that is no ban", CHAT, chat | {"logit_bias": {"5": 7.5}}, _accepted)
    yield LeakProbe(
        "top_logprobs=20", CHAT, chat | {"logprobs": True, "top_logprobs": 20}, _too_many
    )
    yield LeakProbe("logprobs=20", TEXT, text | {"logprobs": 20}, _too_many)
    yield LeakProbe("precision", CHAT, chat | numbers, _too_exact)
    # Many samples of one distribution measure it without any log-probabilities.
    yield LeakProbe("n=128", CHAT, chat | {"n": 128, "seed": 1, "max_tokens": 1}, _accepted)
    for field, value in SWITCHES.items():
        yield LeakProbe(f"chat: {field}", CHAT, chat | {field: value}, _accepted)
    for field, value in TEXT_SWITCHES.items():
        yield LeakProbe(f"completions: {field}", TEXT, text | {field: value}, _accepted)
    stray = [{"role": "user", "content": PROMPT, "stray": 1}]
    yield LeakProbe("stray field", CHAT, chat | {"stray": 1}, _accepted)
    yield LeakProbe("stray field in a message", CHAT, {"messages": stray}, _accepted)
    part = [{"type": "text", "text": PROMPT, "stray": 1}]
    yield LeakProbe(
        "stray field in a part", CHAT, {"messages": [{"role": "user", "content": part}]}, _accepted
    )
    options = {"stream": True, "stream_options": {"include_usage": True, "stray": 1}}
    yield LeakProbe("stray field in stream_options", CHAT, chat | options, _accepted)


SWITCHES: dict[str, Any] = {
    "vllm_xargs": {"strength": 0, "ads_lambda": 0},
    "watermarking": False,
    "use_beam_search": True,
    "allowed_token_ids": [5, 6, 7],
    "bad_words": ["a"],
    "structured_outputs": {"choice": ["a", "b"]},
    "response_format": {"type": "json_object"},
    "guided_regex": "a|b",
    "guided_choice": ["a", "b"],
    "return_token_ids": True,
    "return_tokens_as_token_ids": True,
    "return_prompt_text": True,
    "chat_template": "{{ messages[0]['content'] }}",
    "chat_template_kwargs": {"enable_thinking": False},
    "add_generation_prompt": False,
    "continue_final_message": True,
    "add_special_tokens": True,
    "documents": [{"title": "a", "text": "b"}],
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
    "include_reasoning": True,
    "reasoning_effort": "high",
    "echo": True,
    "ignore_eos": True,
    "min_tokens": 4,
    "min_p": 0.1,
    "top_k": 1,
    "repetition_penalty": 1.2,
    "length_penalty": 2.0,
    "stop_token_ids": [5],
    "include_stop_str_in_output": True,
    "skip_special_tokens": False,
    "spaces_between_special_tokens": False,
    "truncate_prompt_tokens": 4,
    "priority": -10,
    "cache_salt": "mine",
    "kv_transfer_params": {"do_remote_decode": True},
    "mm_processor_kwargs": {},
    "prompt_embeds": "AAAA",
    "lora": "base",
    "undefended": True,
    "strength": 0,
    "licence": "distillation",
}
"""Fields that control an engine and that clients should not set, each with a valid value."""

TEXT_SWITCHES: dict[str, Any] = {
    "best_of": 4,
    "suffix": " end",
    "prompt_embeds": "AAAA",
    "use_beam_search": True,
    "allowed_token_ids": [5, 6, 7],
    "vllm_xargs": {"strength": 0},
    "watermarking": False,
    "return_token_ids": True,
    "structured_outputs": {"choice": ["a", "b"]},
    "stray": 1,
}

ROUTES = tuple(
    ("POST", route)
    for route in (
        "/v1/responses",
        "/v1/messages",
        "/v1/embeddings",
        "/v1/score",
        "/v1/rerank",
        "/v1/audio/transcriptions",
        "/v1/load_lora_adapter",
        "/v1/chat/completions/render",
        "/v1/completions/render",
        "/generative_scoring",
        "/inference/v1/generate",
        "/invocations",
        "/tokenize",
        "/detokenize",
        "/score",
        "/rerank",
        "/pooling",
        "/classify",
        "/collective_rpc",
        "/sleep",
        "/pause",
        "/reset_prefix_cache",
        "/update_weights",
        "/init_weight_transfer_engine",
        "/start_profile",
    )
) + tuple(
    ("GET", route)
    for route in (
        "/version",
        "/server_info",
        "/load",
        "/docs",
        "/redoc",
        "/metrics",
        "/tokenizer_info",
    )
)

INVALID_KEYS = (
    ("no key", {}),
    ("an empty key", {"authorization": "Bearer"}),
    ("another key", {"authorization": "Bearer az-" + "A" * 43}),
    ("another scheme", {"authorization": "Basic YTpi"}),
)

STREAMS = (
    LeakProbe("stream", CHAT, {"messages": messages(), "stream": True}, lambda _: ""),
    LeakProbe(
        "stream with logprobs",
        CHAT,
        {"messages": messages(), "stream": True, "logprobs": True, "top_logprobs": 5},
        lambda event: _too_exact(event) or _too_many(event),
    ),
    LeakProbe("completions: stream", TEXT, {"prompt": PROMPT, "stream": True}, lambda _: ""),
)


ACCEPTED = "a field that clients should not set was accepted"
"""Whether it had an effect cannot be seen from outside."""


def _accepted(_: dict[str, Any]) -> str:
    return ACCEPTED


def _chosen(answer: dict[str, Any]) -> str:
    return _too_many(answer) or ACCEPTED


def _prompt(answer: dict[str, Any]) -> str:
    values = [value for key, value in _fields(answer) if key == "prompt_logprobs" and value]
    return "log-probabilities of the prompt" if values else ""


def _echoes(answer: dict[str, Any]) -> str:
    texts = [str(value) for key, value in _fields(answer) if key == "text"]
    return "the prompt is echoed" if any(PROMPT[:12] in text for text in texts) else ""


def _has_numbers(answer: dict[str, Any]) -> str:
    return "log-probabilities under a bias" if _numbers(answer) else ""


def _too_many(answer: dict[str, Any]) -> str:
    lists = [value for key, value in _fields(answer) if key == "top_logprobs" and value]
    widths = [
        len(mapping) if isinstance(mapping, dict) else 0
        for value in lists
        for mapping in (value if isinstance(value, list) else [])
    ]
    # Chat answers have one list per token, completions have one mapping per token.
    chat = [len(value) for value in lists if isinstance(value, list) and "token" in str(value[0])]
    most = max([*widths, *chat], default=0)
    return f"{most} log-probabilities per token" if most > MOST_LOGPROBS + 1 else ""


def _too_exact(answer: dict[str, Any]) -> str:
    exact = [
        number
        for number in _numbers(answer)
        if math.isfinite(number) and abs(number - round(number, MOST_DECIMALS)) > 1e-9
    ]
    return f"unrounded log-probabilities, such as {exact[0]!r}" if exact else ""


def _numbers(answer: dict[str, Any]) -> list[float]:
    numbers: list[float] = []
    for key, value in _fields(answer):
        if key == "logprob" and isinstance(value, int | float):
            numbers.append(float(value))
        if key == "token_logprobs" and isinstance(value, list):
            numbers += [float(number) for number in value if number is not None]
        if key == "top_logprobs" and isinstance(value, list):
            numbers += [
                float(number)
                for mapping in value
                if isinstance(mapping, dict) and "token" not in mapping
                for number in mapping.values()
            ]
    return numbers


UNWANTED = (
    "prompt_logprobs",
    "prompt_token_ids",
    "token_ids",
    "kv_transfer_params",
    "system_fingerprint",
    "stop_reason",
    "hidden_states",
    "routed_experts",
)
"""Fields of engines' answers that clients do not need; a value in one of them is a leak."""


def unwanted(answer: dict[str, Any]) -> str:
    """The fields of an answer that reveal an engine's internals, in words; empty if none."""
    names = sorted({key for key, value in _fields(answer) if key in UNWANTED and value is not None})
    return f"fields {', '.join(names)}" if names else ""


def _fields(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, at any depth."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key, inner
            yield from _fields(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _fields(inner)
