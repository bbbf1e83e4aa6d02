"""Unusual requests for the gateway: drawn from its own description, then damaged.

Everything comes from one seed, so a request that fails is the same in the next run.
"""

import copy
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from witness import Call

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
QUESTIONS = (
    "joe has 2 eggs . he drops 1 . how many eggs does joe have ?",
    "tom has 3 books . he buys 2 more . how many books does tom have ?",
)
MODELS = ("teacher",) * 40 + ("teacher:undefended", "undefended", "", "Teacher", "teacher\x00")
"""Mostly the existing model, so that most requests reach the checks of their other fields."""
STRINGS = ("", " ", "\x00", "\u202e\ufeff", "é" * 40, "<think>", "</think> ####", "a" * 3000, "-1")
INTEGERS = (0, -1, 1, 2**31, 2**63 - 1, 2**63, -(2**63), 10**30)
NUMBERS = (0.0, -0.0, 5e-324, 1e-300, 1e-9, 0.5, 1.0, 2.0, 1e308, -100, 100)
VALUES = (*STRINGS, *INTEGERS, *NUMBERS, None, True, False, [], {}, [[]], [None], {"": None})
IDENTITIES = (
    "5",
    "6",
    "0",
    "00000000000000005",
    "000000000000999999",
    "9" * 5000,
    "-5",
    "5.0",
    "٣",
)
"""Token ids, as keys of a logit bias."""
HEADERS = (
    (b"content-type", b"text/plain; charset=utf-7"),
    (b"content-encoding", b"gzip"),
    (b"x-http-method-override", b"GET"),
    (b"openai-model", b"teacher:undefended"),
    (b"user-agent", b"\xff\xfe"),
    (b"user-agent", b"u" * 5000),
    (b"accept", b"application/xml"),
)
SCHEMES = (b"", b"Bearer", b"Bearer ", b"Bearer \xff\xfe", b"Bearer az-" + b"A" * 43, b"Basic YTpi")
QUERIES = ("", "", "", "?echo=1", "?model=teacher:undefended", "?strength=0", "?%00=%ff")
ROUTES = (
    "/", "/v1", "/v1/", "/v1/models", "/v1/models/teacher", "/v1/models/teacher:undefended",
    "/v1/models/%00", "/v1/models/%ff", "/v1//models", "/healthz", "/readyz", "/metrics", "/docs",
    "/openapi.json", "/v1/chat/completions/", "/v1/chat", "/v1/embeddings", "/tokenize", CHAT, TEXT,
)  # fmt: skip
METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "UNDEFENDED")


class Fuzzer:
    """Draws calls.

    Args:
        description: the gateway's OpenAPI document.
        tokens: keys to ask with.
        fields: names that the gateway must not know.
    """

    def __init__(
        self, description: Mapping[str, Any], tokens: Sequence[str], fields: Sequence[str]
    ) -> None:
        self._random = random.Random("azeotrope")
        self._schemas = description["components"]["schemas"]
        self._tokens, self._fields = tokens, fields

    def calls(self, count: int) -> Iterator[Call]:
        for _ in range(count):
            yield self._call()

    def _call(self) -> Call:
        draw = self._random
        token = draw.choice(self._tokens)
        headers = [draw.choice(HEADERS)] if draw.random() < 0.1 else []
        if draw.random() < 0.03:
            headers.append((b"authorization", draw.choice(SCHEMES)))
            token = None
        if draw.random() < 0.08:
            method = draw.choice(METHODS)
            return Call(draw.choice(ROUTES), token, b"{}", method=method, headers=tuple(headers))
        path = draw.choice((CHAT, TEXT))
        body = self._object(self._schemas[f"{'Chat' if path == CHAT else 'Completion'}Request"])
        for _ in range(draw.choice((0, 0, 0, 0, 1, 2))):
            self._spoil(body)
        content: Any = body
        if draw.random() < 0.08:
            content = self._broken(json.dumps(body).encode())
        return Call(path + draw.choice(QUERIES), token, content, headers=tuple(headers))

    def _object(self, schema: Mapping[str, Any]) -> dict[str, Any]:
        required = schema.get("required", ())
        found = {
            name: self._value(name, inner)
            for name, inner in schema["properties"].items()
            if name in required or self._random.random() < 0.2
        }
        # Most requests would otherwise break a rule between two fields, which hides other errors.
        if self._random.random() < 0.9:
            if "stream_options" in found:
                found["stream"] = True
            if found.get("top_logprobs"):
                found["logprobs"] = True
            if "logprobs" in found:
                found.pop("logit_bias", None)
        return found

    def _value(self, name: str, schema: Mapping[str, Any]) -> Any:
        draw = self._random
        if "$ref" in schema:
            return self._object(self._schemas[schema["$ref"].rpartition("/")[2]])
        if "anyOf" in schema:
            return self._value(name, draw.choice(schema["anyOf"]))
        if "const" in schema:
            return schema["const"]
        if "enum" in schema:
            return draw.choice(schema["enum"])
        if name == "logit_bias" and schema["type"] == "object":
            return {draw.choice(IDENTITIES): draw.choice((-100, -100.0, 5)) for _ in range(2)}
        return {
            "string": lambda: self._string(name),
            "integer": lambda: self._integer(schema),
            "number": lambda: draw.choice((0.0, 1e-320, 1e-9, 0.5, 1.0, 1.0, 1.5, 2.0)),
            "boolean": lambda: draw.random() < 0.7,
            "null": lambda: None,
            "array": lambda: self._array(name, schema),
        }[schema["type"]]()

    def _string(self, name: str) -> str:
        if name == "model":
            return self._random.choice(MODELS)
        if name == "stop":
            return self._random.choice(("####", "so", "</think>", " ", "\n"))
        return self._random.choice(QUESTIONS) if self._random.random() < 0.8 else self._odd()

    def _odd(self) -> str:
        return self._random.choice(STRINGS)

    def _integer(self, schema: Mapping[str, Any]) -> int:
        least = schema.get("minimum", 0)
        if self._random.random() < 0.1:
            return self._random.choice((least, schema.get("maximum", 2**40)))
        return max(0, least) + self._random.randrange(5)

    def _array(self, name: str, schema: Mapping[str, Any]) -> list[Any]:
        many = schema.get("minItems", 0) + self._random.choice((0, 0, 0, 1, 2))
        return [self._value(name, schema["items"]) for _ in range(many)]

    def _spoil(self, body: dict[str, Any]) -> None:
        """Change one value of a body, at any depth."""
        draw = self._random
        place = draw.choice(list(_containers(body)))
        kind = draw.randrange(4)
        if isinstance(place, list):
            place.append(copy.deepcopy(draw.choice(VALUES)))
        elif kind == 0 or not place:
            place[draw.choice(self._fields)] = copy.deepcopy(draw.choice(VALUES))
        elif kind == 1:
            place[draw.choice(list(place))] = copy.deepcopy(draw.choice(VALUES))
        elif kind == 2:
            place.pop(draw.choice(list(place)))
        else:
            name = draw.choice(list(place))
            place[draw.choice((name.upper(), f"{name} ", f"{name}\x00"))] = copy.deepcopy(
                place[name]
            )

    def _broken(self, body: bytes) -> bytes:
        """The body as bytes that are mostly not JSON."""
        draw = self._random
        cut = draw.randrange(len(body) + 1)
        return draw.choice(
            (
                b"",
                body[:cut],
                body + body,
                body[:cut] + bytes([draw.randrange(256)]) + body[cut:],
                b"\xef\xbb\xbf" + body,
                body.decode().encode("utf-16"),
                body[:-1] + b', "seed": ' + b"9" * 5000 + b"}",
                body[:-1] + b', "temperature": NaN}',
                body[:-1] + b', "temperature": 1e999}',
                body[:-1] + b', "user": "\\ud800"}',
                body[:-1] + b', "model": "teacher:undefended"}',
                b'{"messages":' + b"[" * 3000,
                b"[" + body + b"]",
            )
        )


def _containers(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list):
        yield value
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _containers(inner)
