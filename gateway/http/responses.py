"""Answers in OpenAI's shapes, built field by field from tokens: the allow-list of what leaves.

The engine's own objects are never passed on or filtered, so a field that nobody put here cannot
appear. Fields that are not set are not sent.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

from openai.types import Completion, CompletionChoice, CompletionUsage
from openai.types.chat import (
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionMessage,
    ChatCompletionTokenLogprob,
    chat_completion,
    chat_completion_chunk,
)
from openai.types.chat.chat_completion_token_logprob import TopLogprob
from openai.types.completion_choice import Logprobs
from transformers import PreTrainedTokenizerBase

from azeotrope.engine.protocol import Finish, Token
from gateway.http.token_bytes import TokenBytes, readable

LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON does not have; OpenAI's API does the same."""


@dataclass(frozen=True)
class Said:
    """What one completion has said, or a part of it."""

    text: str = ""
    tokens: tuple[Token, ...] = ()
    finish: Finish | None = None
    offsets: tuple[int, ...] = ()
    """Where each token begins, in characters of the whole completion."""


@dataclass(frozen=True)
class Numbers:
    """How log-probabilities are shown."""

    tokenizer: PreTrainedTokenizerBase
    decimals: int

    def text(self, token: int) -> str:
        return self.tokenizer.decode([token])  # type: ignore[return-value]

    def bytes(self, token: int) -> list[int]:
        return list(self._bytes.of(token))

    def name(self, token: int) -> str:
        """The text, or the bytes where they are a part of a character: a key in a dictionary."""
        return readable(self._bytes.of(token)) or self.text(token)

    def top(self, token: Token) -> dict[str, float]:
        """The likeliest by name; of names that are the same the likelier one counts."""
        found: dict[str, float] = {}
        for other, value in token.top:
            found.setdefault(self.name(other), self.value(value))
        return found

    @cached_property
    def _bytes(self) -> TokenBytes:
        return TokenBytes(self.tokenizer)

    def value(self, logprob: float | None) -> float:
        if logprob is None or not logprob > LEAST_LOGPROB:
            return LEAST_LOGPROB
        return round(min(logprob, 0.0), self.decimals) + 0.0


@runtime_checkable
class Format(Protocol):
    """How one kind of request is answered."""

    def whole(self, said: Sequence[Said], usage: CompletionUsage) -> dict[str, Any]:
        """The answer to a request that does not stream."""
        ...

    def part(self, index: int, said: Said, *, first: bool) -> dict[str, Any]:
        """One event of a stream."""
        ...

    def totals(self, usage: CompletionUsage) -> dict[str, Any]:
        """The event that ends a stream whose client asked for its usage."""
        ...


@dataclass(frozen=True)
class ChatFormat:
    """`chat.completion` and `chat.completion.chunk`."""

    id: str
    model: str
    numbers: Numbers | None
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, said: Sequence[Said], usage: CompletionUsage) -> dict[str, Any]:
        choices = [
            chat_completion.Choice(
                index=index,
                message=ChatCompletionMessage(role="assistant", content=item.text, refusal=None),
                logprobs=self._logprobs(item, chat_completion.ChoiceLogprobs),
                finish_reason=item.finish or "length",
            )
            for index, item in enumerate(said)
        ]
        return ChatCompletion(
            id=self.id,
            object="chat.completion",
            created=self.created,
            model=self.model,
            choices=choices,
            usage=usage,
        ).model_dump(exclude_unset=True)

    def part(self, index: int, said: Said, *, first: bool) -> dict[str, Any]:
        delta = chat_completion_chunk.ChoiceDelta()
        if first:
            delta = chat_completion_chunk.ChoiceDelta(role="assistant", content=said.text)
        elif said.text:
            delta = chat_completion_chunk.ChoiceDelta(content=said.text)
        return self._event(
            [
                chat_completion_chunk.Choice(
                    index=index,
                    delta=delta,
                    logprobs=self._logprobs(said, chat_completion_chunk.ChoiceLogprobs),
                    finish_reason=said.finish,
                )
            ]
        ).model_dump(exclude_unset=True)

    def totals(self, usage: CompletionUsage) -> dict[str, Any]:
        return self._event([], usage=usage).model_dump(exclude_unset=True)

    def _event(
        self, choices: list[chat_completion_chunk.Choice], **more: Any
    ) -> ChatCompletionChunk:
        return ChatCompletionChunk(
            id=self.id,
            object="chat.completion.chunk",
            created=self.created,
            model=self.model,
            choices=choices,
            **more,
        )

    def _logprobs(self, said: Said, kind: type[Any]) -> Any:
        numbers = self.numbers
        if numbers is None:
            return None
        content = [
            ChatCompletionTokenLogprob(
                token=numbers.text(token.id),
                bytes=numbers.bytes(token.id),
                logprob=numbers.value(token.logprob),
                top_logprobs=[
                    TopLogprob(
                        token=numbers.text(other),
                        bytes=numbers.bytes(other),
                        logprob=numbers.value(value),
                    )
                    for other, value in token.top
                ],
            )
            for token in said.tokens
        ]
        return kind(content=content, refusal=None)


@dataclass(frozen=True)
class CompletionFormat:
    """`text_completion`, whole and as events."""

    id: str
    model: str
    numbers: Numbers | None
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, said: Sequence[Said], usage: CompletionUsage) -> dict[str, Any]:
        choices = [self._choice(index, item) for index, item in enumerate(said)]
        return self._event(choices, usage=usage).model_dump(exclude_unset=True)

    def part(self, index: int, said: Said, *, first: bool) -> dict[str, Any]:
        return self._event([self._choice(index, said)]).model_dump(exclude_unset=True)

    def totals(self, usage: CompletionUsage) -> dict[str, Any]:
        return self._event([], usage=usage).model_dump(exclude_unset=True)

    def _event(self, choices: list[CompletionChoice], **more: Any) -> Completion:
        return Completion(
            id=self.id,
            object="text_completion",
            created=self.created,
            model=self.model,
            choices=choices,
            **more,
        )

    def _choice(self, index: int, said: Said) -> CompletionChoice:
        # A part of a stream has not ended yet, for which the class has no value.
        return CompletionChoice.model_construct(
            {"index", "text", "logprobs", "finish_reason"},
            index=index,
            text=said.text,
            logprobs=self._logprobs(said),
            finish_reason=said.finish,
        )

    def _logprobs(self, said: Said) -> Logprobs | None:
        numbers = self.numbers
        if numbers is None:
            return None
        # OpenAI counts offsets from the prompt's beginning; here, as vLLM does, the completion's.
        return Logprobs(
            text_offset=list(said.offsets),
            tokens=[numbers.name(token.id) for token in said.tokens],
            token_logprobs=[numbers.value(token.logprob) for token in said.tokens],
            top_logprobs=[numbers.top(token) for token in said.tokens],
        )


def usage(prompt: int, completion: int) -> CompletionUsage:
    return CompletionUsage(
        prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion
    )
