"""Answers of a gateway compared with the model itself, for the tests of leaks.

The reference is computed from the model's logits and the list of green tokens. It shares no step
with the engine: prompt and completion are in one forward pass, without a cache and without batches.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch

from azeotrope import tasks
from azeotrope.defenses.watermark import green_list
from azeotrope.engine.protocol import Chunk, Engine, EngineRequest
from azeotrope.models import Loaded
from gateway.http.app import create_app
from gateway.policy import Tier
from gateway.records.audit_log import AuditLog, AuditLogError
from gateway.service import Gateway

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
WATERMARK = {"name": "watermark", "strength": 4.0, "context": 1, "key": "the operator's own key"}
"""A context of one token changes all log-probabilities but the first of a completion."""
FLOAT_ERROR = 2e-4
"""The difference in nats between two ways to compute a log-probability in float32."""


class FullLog(AuditLog):
    """A log on a disk with space for a few lines."""

    def __init__(self, folder: Path, *, room: int) -> None:
        super().__init__(folder)
        self.room = room

    def write(self, *args: Any, **values: Any) -> None:
        self.room -= 1
        if self.room < 0:
            raise AuditLogError("the audit log cannot be written (no space left on device)")
        super().write(*args, **values)


class Recording(Engine):
    """An engine that passes requests on and records them and the tokens written."""

    def __init__(self, inner: Engine) -> None:
        self.inner = inner
        self.asked: dict[str, EngineRequest] = {}
        self.wrote: dict[str, list[int]] = {}

    async def generate(self, request: EngineRequest) -> AsyncGenerator[Chunk]:
        self.asked[request.id] = request
        wrote = self.wrote.setdefault(request.id, [])
        async with contextlib.aclosing(self.inner.generate(request)) as chunks:
            async for chunk in chunks:
                wrote.extend(token.id for token in chunk.tokens)
                yield chunk


@dataclass
class Choice:
    """One completion as a client received it, whole or from its events."""

    text: str = ""
    finish: str | None = None
    tokens: list[str] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    """Log-probabilities of the tokens written."""
    top: list[dict[str, float]] = field(default_factory=list)


def events(body: str) -> list[dict[str, Any]]:
    """The events of a stream, which must end with `[DONE]`."""
    lines = [line for line in body.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]", body[-300:]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def choices(answer: httpx.Response) -> dict[int, Choice]:
    """The completions of an answer by their index; the events of a stream are joined."""
    assert answer.status_code == 200, answer.text
    streams = answer.headers["content-type"].startswith("text/event-stream")
    completions: dict[int, Choice] = {}
    for part in events(answer.text) if streams else [answer.json()]:
        for item in part["choices"]:
            _add(completions.setdefault(item["index"], Choice()), item)
    return completions


def _add(choice: Choice, item: dict[str, Any]) -> None:
    message = item.get("message") or item.get("delta") or item
    choice.text += message.get("content" if message is not item else "text") or ""
    choice.finish = item["finish_reason"] or choice.finish
    numbers = item.get("logprobs") or {}
    for token in numbers.get("content", ()):
        choice.tokens.append(token["token"])
        choice.values.append(token["logprob"])
        choice.top.append({likely["token"]: likely["logprob"] for likely in token["top_logprobs"]})
    choice.tokens += numbers.get("tokens", ())
    choice.values += numbers.get("token_logprobs", ())
    choice.top += numbers.get("top_logprobs", ()) if "tokens" in numbers else ()


@dataclass(frozen=True)
class Number:
    """A log-probability that a client received, and its reference with and without the defense."""

    shown: float
    defended: float
    undefended: float


class Reference:
    """The teacher's log-probabilities, with the watermark of these tests and without it."""

    def __init__(self, loaded: Loaded) -> None:
        self.loaded = loaded
        tokenizer = loaded.tokenizer
        size = int(loaded.model.config.get_text_config().vocab_size)
        names = [str(tokenizer.decode([id])) for id in range(size)]
        assert len(set(names)) == size, "a token's text must tell which one it is"
        self.ids = {name: id for id, name in enumerate(names)}

    @torch.inference_mode()
    def undefended(self, prompt: Sequence[int], written: Sequence[int]) -> torch.Tensor:
        """The logits before each token of a completion: [tokens, vocab], float64."""
        ids = torch.tensor([[*prompt, *written]])
        logits = self.loaded.model(input_ids=ids, use_cache=False).logits[0].double()
        return logits[len(prompt) - 1 : -1]

    def numbers(
        self, request: EngineRequest, wrote: Sequence[int], choice: Choice, *, defended: bool = True
    ) -> list[Number]:
        """Every number of a choice with its reference.

        Args:
            wrote: the tokens of the engine; the choice has a part of them.
            defended: False for tokens of the undefended engine.
        """
        if not choice.tokens:
            return []
        visible = [self.ids[name] for name in choice.tokens]
        start = _start_of(visible, wrote)
        logits = self.undefended(request.prompt, wrote[: start + len(visible)])
        moved = logits + self._green(request, wrote[: len(logits)]) if defended else logits
        before, after = logits.log_softmax(-1), moved.log_softmax(-1)
        numbers: list[Number] = []
        for row, own, value, top in zip(
            range(start, len(logits)), visible, choice.values, choice.top or [{}] * len(visible),
            strict=True,
        ):  # fmt: skip
            pairs = [(own, value), *((self.ids[name], number) for name, number in top.items())]
            numbers += [
                Number(number, float(after[row, id]), float(before[row, id]))
                for id, number in pairs
            ]
        return numbers

    def _green(self, request: EngineRequest, wrote: Sequence[int]) -> torch.Tensor:
        strength = WATERMARK["strength"] if request.strength is None else request.strength
        assert request.watermark_key is not None
        # The context is one token, and the first one's is the prompt's last.
        before = [request.prompt[-1], *wrote[:-1]]
        rows = [
            green_list([token], len(self.ids), key=request.watermark_key)
            for token in before[: len(wrote)]
        ]
        return strength * torch.tensor([list(row) for row in rows], dtype=torch.float64)


def _start_of(visible: Sequence[int], wrote: Sequence[int]) -> int:
    """The last start of these tokens in a completion, because hidden tokens come first."""
    for start in range(len(wrote) - len(visible), -1, -1):
        if list(wrote[start : start + len(visible)]) == list(visible):
            return start
    raise AssertionError(f"{visible} was sent, but {list(wrote)} was written")


def check(numbers: Sequence[Number], decimals: int) -> int:
    """Every number is the defended one, rounded; returns how many could have been a leak.

    If both distributions give the same value within rounding and floating-point error, the number
    reveals neither.
    """
    step = 10.0**-decimals
    telling = 0
    for number in numbers:
        assert abs(number.shown - number.defended) <= step / 2 + FLOAT_ERROR, number
        assert abs(number.shown - round(number.shown, decimals)) < 1e-9, number
        if abs(number.defended - number.undefended) > step + 2 * FLOAT_ERROR:
            telling += 1
            assert abs(number.shown - number.defended) < abs(number.shown - number.undefended)
    return telling


@dataclass(frozen=True)
class Call:
    """One request to a gateway in this process."""

    path: str
    token: str | None = None
    body: Any = None
    """Sent as JSON; bytes as they are."""
    method: str = "POST"
    headers: tuple[tuple[bytes, bytes], ...] = ()

    @property
    def arguments(self) -> dict[str, Any]:
        headers = [*self.headers]
        if self.token is not None:
            headers.append((b"authorization", f"Bearer {self.token}".encode()))
        content = self.body
        if content is not None and not isinstance(content, bytes):
            content = json.dumps(content).encode()
        return {"method": self.method, "url": self.path, "headers": headers, "content": content}


def send(gateway: Gateway, calls: Sequence[Call], *, at_once: int = 64) -> list[httpx.Response]:
    """Answers in order. Many requests run at once, so that the engine has full batches."""

    async def go() -> list[httpx.Response]:
        # The application answers its own exceptions, as behind a server.
        transport = httpx.ASGITransport(create_app(gateway), raise_app_exceptions=False)
        gate = asyncio.Semaphore(at_once)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:

            async def one(call: Call) -> httpx.Response:
                async with gate:
                    return await client.request(**call.arguments)

            answers = await asyncio.gather(*map(one, calls))
        # The loop must not end before the bills are written.
        await gateway.open.close()
        return list(answers)

    return asyncio.run(go())


def check_refusal(answer: httpx.Response) -> None:
    """A refusal in OpenAI's shape, and nothing else in it."""
    body = answer.json()
    assert set(body) == {"error"}, body
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}, error
    assert isinstance(error["message"], str)
    assert error["message"]
    assert isinstance(error["type"], str)
    assert error["param"] is None or isinstance(error["param"], str)
    assert error["code"] is None or isinstance(error["code"], str)


def decisions(gateway: Gateway, event: str) -> list[dict[str, Any]]:
    """Lines of the audit log about one kind of event."""
    lines = [
        json.loads(line)
        for path in sorted(gateway.log.folder.iterdir())
        for line in path.read_text().splitlines()
    ]
    return [line for line in lines if line["event"] == event]


def questions(count: int) -> list[str]:
    task = tasks.build(tasks.PocketConfig())
    return [task.messages(item.question)[0]["content"] for item in task.problems("test", count)]


def body(path: str, question: str, **more: Any) -> dict[str, Any]:
    prompt = {"prompt": question} if path == TEXT else {"messages": [user(question)]}
    return {"model": "teacher", "max_tokens": 64, "temperature": 0, **prompt, **more}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def wide(**more: Any) -> Tier:
    """A tier whose quotas no test reaches."""
    limits = {"requests_per_minute": 10**6, "tokens_per_minute": 10**9, "tokens_per_day": 10**9}
    return Tier(**{**limits, "concurrency": 10**6, **more})


@dataclass(frozen=True)
class Guarded:
    """A gateway whose engines record their requests, and one key per tier."""

    gateway: Gateway
    defended: Recording
    undefended: Recording
    keys: Mapping[str, str]
