"""Fields that clients send without meaning anything by them.

Libraries fill in every field of OpenAI's interface and send back what they received. A value that
changes nothing is taken and left out; any other value of the same field is refused by its name.
"""

from collections.abc import Callable, Mapping
from typing import Any

_IGNORED_TEXT = 512


def _is(*values: Any) -> Callable[[Any], bool]:
    # `0 == False` in Python, and a client that sends the wrong type should hear of it.
    return lambda value: any(type(value) is type(one) and value == one for one in values)


def _text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= _IGNORED_TEXT


def _labels(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(item, str) for item in value.values())


REQUEST: dict[str, Callable[[Any], bool]] = {
    "frequency_penalty": _is(0, 0.0),
    "presence_penalty": _is(0, 0.0),
    "repetition_penalty": _is(1, 1.0),
    "tools": _is([]),
    "functions": _is([]),
    "tool_choice": _is("none", "auto"),
    "function_call": _is("none", "auto"),
    "response_format": _is({"type": "text"}),
    "modalities": _is(["text"]),
    "store": _is(False),
    "echo": _is(False),
    "suffix": _is(""),
    "best_of": _is(1),
    "service_tier": _is("auto", "default"),
    "parallel_tool_calls": _is(True, False),
    "metadata": _labels,
    "safety_identifier": _text,
    "prompt_cache_key": _text,
}
"""Fields of a request, and whether a value of one changes nothing."""
MESSAGE: dict[str, Callable[[Any], bool]] = {
    "tool_calls": _is([]),
    "annotations": _is([]),
    # An earlier answer's reasoning is no part of the conversation that the model reads.
    "reasoning_content": lambda value: isinstance(value, str),
    "reasoning": lambda value: isinstance(value, str),
    "parsed": lambda value: isinstance(value, dict | str),
}
"""The same for one message of a conversation."""


def without_neutral(
    body: Any, known: Mapping[str, Any], neutral: Mapping[str, Callable[[Any], bool]]
) -> Any:
    """A JSON object without unknown fields that are null or neutral; the rest is left as it is."""
    if not isinstance(body, dict):
        return body
    kept: dict[str, Any] = {}
    for name, value in body.items():
        # A null in a field of ours is judged by its own type.
        if name in known and (value is not None or known[name].is_required()):
            if name not in neutral or not neutral[name](value):
                kept[name] = value
        elif value is not None and not (name in neutral and neutral[name](value)):
            kept[name] = value
    return kept
