"""What the page at `/` can ask: a few problems of the task, of one teacher or of both.

In a demonstration the undefended teacher writes beside the defended one. Nobody can ask it at will:
there are only the task's own problems, always with the same seed, so all that can be learned of it
here is one completion of each.
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
from gateway.errors import ApiError
from gateway.http.requests import ChatMessage, ChatRequest
from gateway.http.responses import Said
from gateway.policy import Tier
from gateway.refusals import overloaded
from gateway.service import Gateway

MOST_PROBLEMS = 12
ASKS_A_MINUTE = 30
"""Of each side in a demonstration, where no key has a quota."""

logger = logging.getLogger(__name__)
Side = Literal["defended", "undefended"]


class Ask(BaseModel):
    """One question of the page: a problem by its number, and who shall answer."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    problem: int = Field(ge=0)
    side: Side


@dataclass(frozen=True)
class Verdict:
    """What the task's checker finds in an answer, as it was shown."""

    correct: bool
    answer: str | None
    tokens: int
    finish: Finish | None


class Throttle:
    """So many a minute in this process, whoever asks."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._taken: deque[float] = deque()

    def take(self) -> None:
        """Count one more.

        Raises:
            ApiError: 429, where there were too many in the last 60 s.
        """
        now = time.monotonic()
        while self._taken and self._taken[0] <= now - 60:
            self._taken.popleft()
        if len(self._taken) >= self._most:
            wait = max(1, round(self._taken[0] + 60 - now))
            raise ApiError(
                429,
                f"the demonstration answers {self._most} times a minute; try again in {wait} s",
                kind="rate_limit_error",
                code="rate_limit_exceeded",
                headers={"retry-after": str(wait)},
            )
        self._taken.append(now)


class Showcase:
    """The problems, and the teachers that can be asked about them.

    If the problems cannot be read the log says why, and there are none: the rest of the gateway
    does not depend on them.
    """

    def __init__(self, gateway: Gateway, task: TaskConfig, *, demo: bool) -> None:
        self._gateway, self._demo = gateway, demo
        self._throttles = {side: Throttle(ASKS_A_MINUTE) for side in get_args(Side)}
        self._visitor = _visitor()
        self._task: Task | None = None
        self._problems: Sequence[Problem] = ()
        try:
            self._task = tasks.build(task)
            self._problems = first_problems(self._task)
        except (OSError, ValueError):
            logger.exception("the page has no problems: the task %s cannot be read", task.name)

    def listing(self) -> dict[str, Any]:
        """What is shown before anything is asked. Answers are not in it."""
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

    async def answer(self, ask: Ask, request: Request) -> AsyncIterator[str | Verdict]:
        """Let a question in and wait for its first token; then its text, and the verdict on it.

        Outside demonstrations it is a chat request of the key in the headers, like any other.

        Raises:
            ApiError: at once if it is not let in or the engine fails, and from the iterator later.
        """
        if ask.side == "undefended" and self._clean is None:
            raise ApiError(404, "there is no undefended teacher here", code="model_not_found")
        if self._task is None or ask.problem >= len(self._problems):
            raise ApiError(
                400,
                f"there is no problem {ask.problem}; there are {len(self._problems)}, from 0 on",
                param="problem",
            )
        problem = self._problems[ask.problem]
        if self._demo:
            admitted = await self._visit(ask, self._task)
        else:
            admitted = await self._bill(ask, self._task, request)
        pieces = self._gateway.answer(admitted)
        first = await anext(pieces)
        return self._told(admitted, first, pieces, self._task, problem)

    async def _bill(self, ask: Ask, task: Task, request: Request) -> Admitted:
        gateway = self._gateway
        key = await gateway.authenticate(request.headers, "chat")
        chat = self._request(ask, task, gateway.policy.tiers[key.tier])

        async def read(_: int) -> bytes:
            return chat.model_dump_json(exclude_none=True).encode()

        address = request.client.host if request.client else ""
        return await gateway.admit(ChatRequest, request.headers, read, address)

    async def _visit(self, ask: Ask, task: Task) -> Admitted:
        """Let in somebody without a key, by the rules of the tier that new keys get."""
        gateway = self._gateway
        if len(gateway.open) >= gateway.policy.in_flight:
            raise overloaded()
        self._throttles[ask.side].take()
        tiers = gateway.policy.tiers
        name = self._visitor.tier if self._visitor.tier in tiers else next(iter(tiers))
        key, tier = dataclasses.replace(self._visitor, tier=name), tiers[name]
        chat = self._request(ask, task, tier)
        planned = await gateway.plan(key, chat)
        if ask.side == "defended":
            return await gateway.reserve(key, chat, planned, gateway.model.engine)
        assert self._clean is not None
        admitted = await gateway.reserve(key, chat, planned, self._clean)
        # Hidden reasoning is a defense too.
        shown = tier.model_copy(update={"reasoning": "shown"})
        return dataclasses.replace(admitted, tier=shown)

    def _request(self, ask: Ask, task: Task, tier: Tier) -> ChatRequest:
        """Both sides get the same one, so they differ by the defenses alone."""
        messages = task.messages(self._problems[ask.problem].question)
        return ChatRequest(
            model=self._gateway.model.name,
            messages=[ChatMessage.model_validate(message) for message in messages],
            temperature=tier.temperature[0],
            seed=ask.problem,
            stream=True,
        )

    async def _told(
        self,
        admitted: Admitted,
        first: tuple[int, Said],
        pieces: AsyncIterator[tuple[int, Said]],
        task: Task,
        problem: Problem,
    ) -> AsyncIterator[str | Verdict]:
        text, finish = first[1].text, first[1].finish
        async with contextlib.aclosing(pieces):  # type: ignore[type-var]
            tokens = self._gateway.written(admitted)
            yield text
            async for _, said in pieces:
                tokens = self._gateway.written(admitted)
                text, finish = text + said.text, said.finish
                if said.text:
                    yield said.text
        # Some checkers compare expressions, which may take a while.
        correct = await asyncio.to_thread(task.check, text, problem.answer)
        yield Verdict(correct, task.extract(text), tokens, finish)


def first_problems(task: Task) -> Sequence[Problem]:
    """The first test problems, as many as there are up to MOST_PROBLEMS.

    Raises:
        ValueError: if there are none.
    """
    for count in range(MOST_PROBLEMS, 1, -1):
        # Tasks do not say how many they have, but refuse to give more.
        with contextlib.suppress(ValueError):
            return task.problems("test", count)
    return task.problems("test", 1)


def _visitor() -> KeyRecord:
    """Stands for whoever opens the page of a demonstration: no real key, on nobody's bill."""
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
