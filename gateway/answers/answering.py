"""From an engine's chunks to what is shown, for one completion and for several side by side."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable, Sequence

from azeotrope.defenses.base import Defense, FinishedText, RewriteContext
from azeotrope.engine.protocol import Chunk, Engine, EngineBusyError, EngineError, EngineRequest
from azeotrope.tokens import Boundary
from gateway.answers.writing import Mode, ReasoningFilter, StopStrings, Writer
from gateway.http.responses import Said

logger = logging.getLogger(__name__)
ATTEMPTS = 2
"""An engine that dies before a completion's first token is asked again, once."""


async def complete(
    engine: Engine,
    request: EngineRequest,
    writer: Writer,
    *,
    deadline: float,
    on_tokens: Callable[[int], None],
) -> AsyncGenerator[Said]:
    """What one completion says, piece by piece.

    Args:
        deadline: on the event loop's clock.
        on_tokens: told of tokens as they are written, shown or not.

    Raises:
        EngineError: if the engine fails, after one more attempt where nothing was written yet.
        TimeoutError: if the deadline passes.
    """
    for attempt in range(ATTEMPTS):
        chunks = engine.generate(request)
        try:
            while True:
                before = writer.tokens
                piece = writer.feed(await _next(chunks, deadline))
                on_tokens(writer.tokens - before)
                yield Said(piece.text, piece.tokens, piece.finish, piece.offsets)
                if piece.finish is not None:
                    return
        except EngineError as error:
            if isinstance(error, EngineBusyError) or writer.tokens or attempt + 1 == ATTEMPTS:
                raise
            logger.info("completion %s is asked for again: %s", request.id, error)
        finally:
            # An engine goes on writing for nobody unless it is told to stop.
            await chunks.aclose()


async def _next(chunks: AsyncGenerator[Chunk], deadline: float) -> Chunk:
    async with asyncio.timeout_at(deadline):
        chunk = await anext(chunks, None)
    if chunk is None:
        raise EngineError("the engine ended without saying why")
    return chunk


async def rewritten(
    pieces: AsyncGenerator[Said],
    rewriting: Sequence[Defense],
    boundary: Boundary,
    mode: Mode,
    stops: Sequence[str],
    *,
    opening: str = "",
    judged: Boundary | None = None,
) -> AsyncGenerator[Said]:
    """The same completion once its text was rewritten, which needs the whole of it first.

    Log-probabilities belong to a text that is not shown any more, so there are none.

    Args:
        opening: see `ReasoningFilter`; defenses find it in front of the text.
        judged: the boundary by which a text has an answer, if not the one that defenses get.
    """
    text, finish = "", None
    async with contextlib.aclosing(pieces):
        async for piece in pieces:
            text += piece.text
            finish = piece.finish
    answer = _rewrite(text, mode, boundary, judged or boundary, opening, rewriting)
    stop = StopStrings(stops)
    shown, stopped = stop.feed(answer)
    yield Said(shown if stopped else shown + stop.flush(), (), "stop" if stopped else finish)


def _rewrite(
    text: str,
    mode: Mode,
    boundary: Boundary,
    judged: Boundary,
    opening: str,
    rewriting: Sequence[Defense],
) -> str:
    """A text rewritten, and its reasoning taken out where the tier hides it."""
    before = ReasoningFilter(mode, judged, opening=opening)
    line, answer = before.advance(text, final=True)
    if not answer:
        # A defense may lose the tag that says so; what had no answer before has none after.
        return line
    text = opening + text
    context = RewriteContext(boundary)
    for defense in rewriting:
        [result] = defense.rewrite([FinishedText(text)], context)
        text = result.text
    kept = text.startswith(opening)
    reasoning = ReasoningFilter(mode, boundary, opening=opening if kept else "")
    return "".join(reasoning.advance(text.removeprefix(opening), final=True))


async def merge(parts: Sequence[AsyncGenerator[Said]]) -> AsyncGenerator[tuple[int, Said]]:
    """Pieces of several completions as they come, with their numbers; a failure ends them all."""
    if len(parts) == 1:
        async with contextlib.aclosing(parts[0]) as only:
            async for said in only:
                yield 0, said
        return
    queue: asyncio.Queue[tuple[int, Said] | Exception | None] = asyncio.Queue()

    async def pump(number: int, part: AsyncGenerator[Said]) -> None:
        try:
            async for said in part:
                queue.put_nowait((number, said))
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.create_task(pump(number, part)) for number, part in enumerate(parts)]
    try:
        left = len(parts)
        while left:
            item = await queue.get()
            if item is None:
                left -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
