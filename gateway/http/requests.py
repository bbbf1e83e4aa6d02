"""The requests that the gateway knows. What is not written here cannot be asked for.

This is an allow-list: an engine's next release may understand new fields, and none of them passes.
A field is taken, checked and used; nothing of a request's body is handed on.
"""

from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from azeotrope.config import explain, path_text
from azeotrope.tokens import Message
from gateway.errors import ApiError

MOST_STOPS = 4
MOST_BANS = 64
BAN = -100.0
"""The bias that forbids a token, in OpenAI's interface."""


class _Strict(BaseModel):
    # JSON's own types and no others: a number in quotes is a mistake of the client.
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class ChatMessage(_Strict):
    """One turn. Clients send an answer of ours back as it came, with all that was not in it."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None
    type: Literal["text"] | None = Field(default=None, description="some clients write it here")
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None

    def plain(self) -> Message:
        """As chat templates want it."""
        parts = self.content if isinstance(self.content, list) else [self.content]
        text = "".join(part if isinstance(part, str) else part.text for part in parts)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(_Strict):
    include_usage: bool = False


_Stop = Annotated[str, Field(min_length=1, max_length=256)]


class Sampled(_Strict):
    """What both kinds of requests share."""

    model: str = Field(max_length=256)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(default=None, ge=1, le=128)
    stop: _Stop | list[_Stop] | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    logit_bias: dict[str, float] | None = Field(
        default=None, description="-100 forbids a token; no other bias is taken"
    )
    user: str | None = Field(default=None, max_length=512, description="taken and not used")

    @property
    def stops(self) -> tuple[str, ...]:
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(given)

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def most_tokens(self) -> int | None:
        """Tokens of one completion that were asked for."""
        raise TypeError("a request is a chat or a completion")

    @property
    def asked_logprobs(self) -> int | None:
        """Likeliest tokens that were asked for; None asks for no numbers at all."""
        raise TypeError("a request is a chat or a completion")

    @property
    def texts(self) -> tuple[str, ...]:
        """What the client wrote."""
        raise TypeError("a request is a chat or a completion")


class ChatRequest(Sampled):
    """`POST /v1/chat/completions`."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=1024)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)

    @property
    def most_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def asked_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(message.plain()["content"] for message in self.messages)


class CompletionRequest(Sampled):
    """`POST /v1/completions`."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=64)]
    max_tokens: int | None = Field(default=16, ge=1)
    logprobs: int | None = Field(default=None, ge=0, le=20)

    @property
    def texts(self) -> tuple[str, ...]:
        return (self.prompt,) if isinstance(self.prompt, str) else tuple(self.prompt)

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def asked_logprobs(self) -> int | None:
        return self.logprobs


R = TypeVar("R", bound=Sampled)


def parse(kind: type[R], body: bytes) -> R:
    """Read a request's body.

    Raises:
        ApiError: 422 that names every unknown field, wherever it stands; 400 for anything else
            that does not fit.
    """
    try:
        request = kind.model_validate_json(body)
    except ValidationError as error:
        raise _refusal(kind, error) from None
    if len(request.stops) > MOST_STOPS:
        raise invalid("stop", f"at most {MOST_STOPS} stop strings, got {len(request.stops)}")
    if request.stream_options is not None and not request.stream:
        raise invalid("stream_options", "stream_options needs stream to be true")
    if isinstance(request, ChatRequest) and request.top_logprobs and not request.logprobs:
        raise invalid("top_logprobs", "top_logprobs needs logprobs to be true")
    if request.asked_logprobs is not None and request.logit_bias:
        raise invalid(
            "logit_bias",
            "logit_bias is not taken together with logprobs; leave one of them out",
        )
    return request


def invalid(param: str | None, message: str, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def _refusal(kind: type[BaseModel], error: ValidationError) -> ApiError:
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    unknown = [item for item in problems if item["type"] == "extra_forbidden"]
    if unknown:
        names = sorted({path_text(item["loc"]) for item in unknown})
        known = ", ".join(kind.model_fields)
        return ApiError(
            422,
            f"unknown fields: {', '.join(names)[:1000]}; this endpoint takes {known}",
            param=names[0][:200],
            code="unknown_field",
        )
    reasons = explain(error, whole="body", show_values=False)
    return invalid(path_text(problems[0]["loc"])[:200] or None, reasons[:1000])
