"""What the page at `/` can ask: a few problems of the task, of one teacher or of both.

In a demonstration the undefended teacher answers beside the defended one. It can be asked the
task's own problems only, always with the same seed. So this page reveals one completion of the
undefended teacher per problem, and no more.
"""

import asyncio
import contextlib
import dataclasses
import logging
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request

from azeotrope import tasks
from azeotrope.engine.protocol import Engine, Finish
from azeotrope.tasks import Problem, Task, TaskConfig
from gateway.accounts.key_records import KeyRecord
from gateway.admitted import Admitted
from gateway.answers.pieces import AnswerPiece
from gateway.errors import ApiError
from gateway.http.requests import ChatMessage, ChatRequest
from gateway.policy import Tier
from gateway.refusals import overloaded
from gateway.service import Gateway

MOST_PROBLEMS = 12
QUESTIONS_PER_MINUTE = 30
"""For each side of a demonstration, which has no keys and therefore no quotas."""

logger = logging.getLogger(__name__)
Side = Literal["defended", "undefended"]


class PageQuestion(BaseModel):
    """One question of the page: the number of a problem, and the teacher that answers it."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    problem: int = Field(ge=0)
    side: Side


@dataclass(frozen=True)
class CheckedAnswer:
    """The result of the task's checker for an answer, as the visitor saw it."""

    correct: bool
    answer: str | None
    tokens: int
    finish: Finish | None


class Throttle:
    """Limits the questions of all visitors together, in this process."""

    def __init__(self, per_minute: int) -> None:
        self._per_minute = per_minute
        self._times: deque[float] = deque()

    def take(self) -> None:
        """Count one more question.

        Raises:
            ApiError: 429 if the limit was reached in the last 60 s.
        """
        now = time.monotonic()
        while self._times and self._times[0] <= now - 60:
            self._times.popleft()
        if len(self._times) >= self._per_minute:
            wait = max(1, round(self._times[0] + 60 - now))
            raise ApiError(
                429,
                f"the demonstration answers {self._per_minute} times per minute; try again in "
                f"{wait} s",
                kind="rate_limit_error",
                code="rate_limit_exceeded",
                headers={"retry-after": str(wait)},
            )
        self._times.append(now)


class Showcase:
    """The problems of the page, and the teachers that answer them.

    If the problems cannot be read, the log says why and the page has none. The rest of the gateway
    does not depend on them.
    """

    def __init__(self, gateway: Gateway, task: TaskConfig, *, demo: bool) -> None:
        self._gateway, self._demo = gateway, demo
        self._throttles = {side: Throttle(QUESTIONS_PER_MINUTE) for side in get_args(Side)}
        self._visitor = _visitor()
        self._task: Task | None = None
        self._problems: Sequence[Problem] = ()
        try:
            self._task = tasks.build(task)
            self._problems = first_problems(self._task)
        except (OSError, ValueError):
            logger.exception("the page has no problems: the task %s cannot be read", task.name)

    def listing(self) -> dict[str, Any]:
        """The content of the page before the first question. It does not include answers."""
        return {
            "model": self._gateway.model.name,
            "demo": self._demo,
            "sides": ["undefended", "defended"] if self._clean is not None else ["defended"],
            "problems": [
                {"index": index, "question": problem.question}
                for index, problem in enumerate(self._problems)
            ],
        }

    @property
    def _clean(self) -> Engine | None:
        return self._gateway.model.undefended if self._demo else None

    async def answer(
        self, question: PageQuestion, request: Request
    ) -> AsyncIterator[str | CheckedAnswer]:
        """Admit a question, wait for the first token, and return the text and its check.

        Outside demonstrations this is a chat request of the key in the headers, like any other.

        Raises:
            ApiError: at once if the question is refused or the engine fails before its first token;
                later from the iterator.
        """
        if question.side == "undefended" and self._clean is None:
            raise ApiError(404, "there is no undefended teacher here", code="model_not_found")
        if self._task is None or question.problem >= len(self._problems):
            raise ApiError(
                400,
                f"there is no problem {question.problem}; there are {len(self._problems)}, "
                "counted from 0",
                param="problem",
            )
        if self._demo:
            admitted = await self._admit_visitor(question, self._task)
        else:
            admitted = await self._admit_key(question, self._task, request)
        pieces = self._gateway.answer(admitted)
        first = await anext(pieces)
        return self._checked(first, pieces, self._task, self._problems[question.problem])

    async def _admit_key(self, question: PageQuestion, task: Task, request: Request) -> Admitted:
        """Send the question through every check of the API, as the body of a chat request."""
        gateway = self._gateway
        key = await gateway.authenticate(request.headers, "chat")
        chat = self._chat_request(question, task, gateway.policy.tiers[key.tier])

        async def read(_: int) -> bytes:
            return chat.model_dump_json(exclude_none=True).encode()

        address = request.client.host if request.client else ""
        return await gateway.admit(ChatRequest, request.headers, read, address)

    async def _admit_visitor(self, question: PageQuestion, task: Task) -> Admitted:
        """Admit a visitor without a key, by the rules of the tier that new keys get."""
        gateway = self._gateway
        if len(gateway.open) >= gateway.policy.in_flight:
            raise overloaded()
        self._throttles[question.side].take()
        tiers = gateway.policy.tiers
        name = self._visitor.tier if self._visitor.tier in tiers else next(iter(tiers))
        key, tier = dataclasses.replace(self._visitor, tier=name), tiers[name]
        chat = self._chat_request(question, task, tier)
        planned = await gateway.plan(key, chat)
        if question.side == "defended":
            return await gateway.reserve(key, chat, planned, gateway.model.engine)
        assert self._clean is not None
        admitted = await gateway.reserve(key, chat, planned, self._clean)
        # Hiding the reasoning is a defense too, so the undefended side shows it.
        visible = tier.model_copy(update={"reasoning": "shown"})
        return dataclasses.replace(admitted, tier=visible)

    def _chat_request(self, question: PageQuestion, task: Task, tier: Tier) -> ChatRequest:
        """The same request for both sides, so that their answers differ by the defenses alone."""
        messages = task.messages(self._problems[question.problem].question)
        return ChatRequest(
            model=self._gateway.model.name,
            messages=[ChatMessage.model_validate(message) for message in messages],
            temperature=tier.temperature[0],
            seed=question.problem,
            stream=True,
        )

    async def _checked(
        self,
        first: tuple[int, AnswerPiece],
        pieces: AsyncIterator[tuple[int, AnswerPiece]],
        task: Task,
        problem: Problem,
    ) -> AsyncIterator[str | CheckedAnswer]:
        piece = first[1]
        text, finish, tokens = piece.text, piece.finish, piece.engine_tokens
        async with contextlib.aclosing(pieces):  # type: ignore[type-var]
            yield text
            async for _, piece in pieces:
                text, finish = text + piece.text, piece.finish
                tokens += piece.engine_tokens
                if piece.text:
                    yield piece.text
        # Some checkers compare expressions, which may take a while, and other streams must go on.
        correct = await asyncio.to_thread(task.check, text, problem.answer)
        yield CheckedAnswer(correct, task.extract(text), tokens, finish)


def first_problems(task: Task) -> Sequence[Problem]:
    """The first test problems, as many as there are up to MOST_PROBLEMS.

    Raises:
        ValueError: if there are none.
    """
    for count in range(MOST_PROBLEMS, 1, -1):
        # Tasks do not tell how many problems they have, but raise if asked for more.
        with contextlib.suppress(ValueError):
            return task.problems("test", count)
    return task.problems("test", 1)


def _visitor() -> KeyRecord:
    """The record under which visitors of a demonstration are admitted. No key store has it."""
    return KeyRecord(
        id="demo",
        account="demo",
        name="the page in demo mode",
        tier="standard",
        licence="usage",
        models=(),
        features=("chat",),
        created=time.time(),
        expires=None,
        revoked=None,
        watermark_key=secrets.token_hex(32),
    )
