"""Answers in OpenAI's shapes, built field by field from tokens, as an allow-list of fields.

Objects of the engine are never passed on or filtered, so an answer contains only the fields that
this module writes. Fields that are not set are not sent.
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

from azeotrope.engine.protocol import Token
from gateway.answers.pieces import AnswerPiece
from gateway.http.token_bytes import TokenBytes, readable

LEAST_LOGPROB = -9999.0
"""Written for minus infinity, which JSON does not have; OpenAI's API does the same."""


@dataclass(frozen=True)
class LogprobFormat:
    """How tokens and their log-probabilities are written.

    Values are rounded to the digits of the tier. Exact ones would make it cheaper to recover the
    output head from them.
    """

    tokenizer: PreTrainedTokenizerBase
    decimals: int

    def text(self, token: int) -> str:
        return self.tokenizer.decode([token])  # type: ignore[return-value]

    def bytes(self, token: int) -> list[int]:
        return list(self._bytes.of(token))

    def name(self, token: int) -> str:
        """The text, or the bytes of a part of a character: a key that is unique in most answers."""
        return readable(self._bytes.of(token)) or self.text(token)

    def top(self, token: Token) -> dict[str, float]:
        """The likeliest tokens by name. Of several with the same name the likeliest counts."""
        values: dict[str, float] = {}
        for id, value in token.top:
            values.setdefault(self.name(id), self.value(value))
        return values

    @cached_property
    def _bytes(self) -> TokenBytes:
        return TokenBytes(self.tokenizer)

    def value(self, logprob: float | None) -> float:
        """The rounded log-probability in nats; adding 0.0 turns -0.0 into 0.0."""
        if logprob is None or not logprob > LEAST_LOGPROB:
            return LEAST_LOGPROB
        return round(min(logprob, 0.0), self.decimals) + 0.0


@runtime_checkable
class AnswerFormat(Protocol):
    """The shape of the answers to one kind of request."""

    def whole(self, answers: Sequence[AnswerPiece], usage: CompletionUsage) -> dict[str, Any]:
        """The answer to a request that does not stream."""
        ...

    def part(self, index: int, piece: AnswerPiece, *, first: bool) -> dict[str, Any]:
        """One event of a stream."""
        ...

    def totals(self, usage: CompletionUsage) -> dict[str, Any]:
        """The last event of a stream whose client requested `include_usage`."""
        ...


@dataclass(frozen=True)
class ChatFormat:
    """`chat.completion` and `chat.completion.chunk`."""

    id: str
    model: str
    logprobs: LogprobFormat | None
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, answers: Sequence[AnswerPiece], usage: CompletionUsage) -> dict[str, Any]:
        choices = [
            chat_completion.Choice(
                index=index,
                message=ChatCompletionMessage(role="assistant", content=answer.text, refusal=None),
                logprobs=self._logprobs(answer, chat_completion.ChoiceLogprobs),
                finish_reason=answer.finish or "length",
            )
            for index, answer in enumerate(answers)
        ]
        return ChatCompletion(
            id=self.id,
            object="chat.completion",
            created=self.created,
            model=self.model,
            choices=choices,
            usage=usage,
        ).model_dump(exclude_unset=True)

    def part(self, index: int, piece: AnswerPiece, *, first: bool) -> dict[str, Any]:
        # The first delta of a choice has the role and a text, even an empty one; others have the
        # text only if there is some.
        delta = chat_completion_chunk.ChoiceDelta()
        if first:
            delta = chat_completion_chunk.ChoiceDelta(role="assistant", content=piece.text)
        elif piece.text:
            delta = chat_completion_chunk.ChoiceDelta(content=piece.text)
        return self._event(
            [
                chat_completion_chunk.Choice(
                    index=index,
                    delta=delta,
                    logprobs=self._logprobs(piece, chat_completion_chunk.ChoiceLogprobs),
                    finish_reason=piece.finish,
                )
            ]
        ).model_dump(exclude_unset=True)

    def totals(self, usage: CompletionUsage) -> dict[str, Any]:
        # OpenAI sends the usage in an event without choices, after all others.
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

    def _logprobs(self, piece: AnswerPiece, kind: type[Any]) -> Any:
        form = self.logprobs
        if form is None:
            return None
        content = [
            ChatCompletionTokenLogprob(
                token=form.text(token.id),
                bytes=form.bytes(token.id),
                logprob=form.value(token.logprob),
                top_logprobs=[
                    TopLogprob(
                        token=form.text(id),
                        bytes=form.bytes(id),
                        logprob=form.value(value),
                    )
                    for id, value in token.top
                ],
            )
            for token in piece.tokens
        ]
        return kind(content=content, refusal=None)


@dataclass(frozen=True)
class CompletionFormat:
    """`text_completion`, whole and as events."""

    id: str
    model: str
    logprobs: LogprobFormat | None
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, answers: Sequence[AnswerPiece], usage: CompletionUsage) -> dict[str, Any]:
        choices = [self._choice(index, answer) for index, answer in enumerate(answers)]
        return self._event(choices, usage=usage).model_dump(exclude_unset=True)

    def part(self, index: int, piece: AnswerPiece, *, first: bool) -> dict[str, Any]:
        return self._event([self._choice(index, piece)]).model_dump(exclude_unset=True)

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

    def _choice(self, index: int, piece: AnswerPiece) -> CompletionChoice:
        # The class requires a reason why the completion ended, and OpenAI's own streams send null
        # before the end. So the object is built without validation.
        return CompletionChoice.model_construct(
            {"index", "text", "logprobs", "finish_reason"},
            index=index,
            text=piece.text,
            logprobs=self._logprobs(piece),
            finish_reason=piece.finish,
        )

    def _logprobs(self, piece: AnswerPiece) -> Logprobs | None:
        form = self.logprobs
        if form is None:
            return None
        # OpenAI counts offsets from the start of the prompt. Here they count from the start of the
        # completion, as in vLLM.
        return Logprobs(
            text_offset=list(piece.offsets),
            tokens=[form.name(token.id) for token in piece.tokens],
            token_logprobs=[form.value(token.logprob) for token in piece.tokens],
            top_logprobs=[form.top(token) for token in piece.tokens],
        )


def usage(prompt: int, completion: int) -> CompletionUsage:
    """Tokens of a request. A prompt counts once, whatever its number of completions."""
    return CompletionUsage(
        prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion
    )
