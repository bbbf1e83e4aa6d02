"""The requests that the gateway accepts, as an allow-list of fields.

New fields of an engine's next release are rejected by default. Each field is read, checked and
used by the gateway itself; no part of a request's body is passed on to the engine.
"""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from azeotrope.config import explain, path_text
from azeotrope.tokens import Message
from gateway.errors import ApiError
from gateway.http.neutral import MESSAGE, REQUEST, without_neutral

MOST_STOPS = 4
MOST_BANS = 64
BAN = -100.0
"""The bias that forbids a token, in OpenAI's interface."""


class _Strict(BaseModel):
    # JSON's own types without conversions, so that a number in quotes is an error. A conversion
    # would be a second spelling of a value that other checks might not expect.
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class ChatMessage(_Strict):
    """One turn of a conversation.

    Clients send earlier answers back as they received them, so the fields that OpenAI's classes
    add to an answer are accepted as long as they are null.
    """

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] = Field(
        description="null is an empty text in an assistant's turn"
    )
    name: str | None = None
    type: Literal["text"] | None = Field(default=None, description="some clients add it")
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None

    @model_validator(mode="before")
    @classmethod
    def _neutral(cls, message: Any) -> Any:
        message = without_neutral(message, cls.model_fields, MESSAGE)
        is_answer = isinstance(message, dict) and message.get("role") == "assistant"
        if is_answer and "content" in message and message["content"] is None:
            return {**message, "content": ""}
        return message

    def plain(self) -> Message:
        """The message in the form that chat templates take."""
        parts = self.content if isinstance(self.content, list) else [self.content]
        text = "".join(part if isinstance(part, str) else part.text for part in parts)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(_Strict):
    include_usage: bool = False


_Stop = Annotated[str, Field(min_length=1, max_length=256)]


class ApiRequest(_Strict):
    """The fields that both kinds of requests share."""

    model: str = Field(max_length=256)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(default=None, ge=1, le=128)
    stop: _Stop | list[_Stop] | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    logit_bias: dict[str, float] | None = Field(
        default=None, description="-100 forbids a token; no other bias is accepted"
    )
    user: str | None = Field(default=None, max_length=512, description="accepted and not used")

    @model_validator(mode="before")
    @classmethod
    def _neutral(cls, body: Any) -> Any:
        return without_neutral(body, cls.model_fields, REQUEST)

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def most_tokens(self) -> int | None:
        """The requested length of one completion; None leaves it to the tier.

        Raises:
            TypeError: if the request is neither a chat nor a completion.
        """
        raise TypeError("a request is a chat or a completion")

    @property
    def asked_logprobs(self) -> int | None:
        """How many of the likeliest tokens are requested; None requests no log-probabilities.

        Raises:
            TypeError: if the request is neither a chat nor a completion.
        """
        raise TypeError("a request is a chat or a completion")

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts that the client wrote.

        Raises:
            TypeError: if the request is neither a chat nor a completion.
        """
        raise TypeError("a request is a chat or a completion")


class ChatRequest(ApiRequest):
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


class CompletionRequest(ApiRequest):
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


RequestT = TypeVar("RequestT", bound=ApiRequest)


def parse(kind: type[RequestT], body: bytes) -> RequestT:
    """Read a request's body.

    Raises:
        ApiError: 422 with the name of every unknown field at any depth; 400 for other errors.
    """
    try:
        request = kind.model_validate_json(body)
    except ValidationError as error:
        raise refusal(kind, error) from None
    if len(request.stops) > MOST_STOPS:
        raise invalid("stop", f"at most {MOST_STOPS} stop strings, got {len(request.stops)}")
    if request.stream_options is not None and not request.stream:
        raise invalid("stream_options", "stream_options needs stream to be true")
    if isinstance(request, ChatRequest) and request.top_logprobs and not request.logprobs:
        raise invalid("top_logprobs", "top_logprobs needs logprobs to be true")
    # Log-probabilities under a bias reveal logits exactly, and from enough of them the output head
    # (Carlini et al. 2024, arXiv:2403.06634).
    if request.asked_logprobs is not None and request.logit_bias:
        raise invalid(
            "logit_bias",
            "logit_bias is not accepted together with logprobs; leave one of them out",
        )
    return request


def invalid(param: str | None, message: str, code: str | None = None) -> ApiError:
    """A refusal of one value of a request."""
    return ApiError(400, message, param=param, code=code)


def refusal(kind: type[BaseModel], error: ValidationError) -> ApiError:
    """The answer to a body that does not fit: 422 for unknown fields, else 400.

    It does not repeat values: they may be prompts, and messages of errors end up in logs.
    """
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    unknown = sorted(
        {path_text(problem["loc"]) for problem in problems if problem["type"] == "extra_forbidden"}
    )
    if unknown:
        return ApiError(
            422,
            f"unknown fields: {', '.join(unknown)[:1000]}; this endpoint takes "
            f"{', '.join(kind.model_fields)}",
            param=unknown[0][:200],
            code="unknown_field",
        )
    reasons = explain(error, whole="body", show_values=False)
    return invalid(path_text(problems[0]["loc"])[:200] or None, reasons[:1000])
