"""From an engine's chunks to visible pieces, for one completion and for several side by side."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable, Sequence

from azeotrope.defenses.base import Defense, FinishedText, RewriteContext
from azeotrope.engine.protocol import Chunk, Engine, EngineBusyError, EngineError, EngineRequest
from azeotrope.tokens import Boundary
from gateway.admitted import Admitted, Model
from gateway.answers.pieces import AnswerPiece
from gateway.answers.reading import ReadingRules, opening_of_ids, without_pattern
from gateway.answers.reasoning import Mode, ReasoningFilter
from gateway.answers.stops import StopStrings
from gateway.answers.writing import AnswerWriter

logger = logging.getLogger(__name__)
ATTEMPTS = 2
"""If an engine dies before a completion's first token, the completion is requested once more."""


def completions(
    admitted: Admitted, model: Model, on_tokens: Callable[[int], None]
) -> list[AsyncGenerator[AnswerPiece]]:
    """One stream of pieces for each completion of a request.

    Args:
        on_tokens: called with the number of tokens the engine has just written, hidden or not.
    """
    requests = admitted.plan.requests
    # A prompt may be long and may have several completions, so each is looked at once. The bans
    # are those of the whole request.
    prompts = {request.prompt for request in requests}
    openings = {prompt: _opening(admitted, model, prompt) for prompt in prompts}
    boundary = without_pattern(model.tokenizer, requests[0].banned, model.boundary)
    return [
        _completion(
            admitted, model, request, ReadingRules(boundary, openings[request.prompt]), on_tokens
        )
        for request in requests
    ]


def _opening(admitted: Admitted, model: Model, prompt: tuple[int, ...]) -> str:
    # Text defenses need to know where the reasoning begins even if the tier shows it.
    if admitted.tier.reasoning == "shown" and not model.rewriting:
        return ""
    return opening_of_ids(model.tokenizer, prompt, model.boundary)


def _completion(
    admitted: Admitted,
    model: Model,
    request: EngineRequest,
    rules: ReadingRules,
    on_tokens: Callable[[int], None],
) -> AsyncGenerator[AnswerPiece]:
    mode, stops = admitted.tier.reasoning, admitted.stops
    is_rewritten = bool(model.rewriting) and not admitted.undefended
    # A text defense gets the whole completion, so its reasoning and its stop strings are dealt with
    # after it.
    writer = AnswerWriter(
        model.tokenizer,
        rules,
        stops=() if is_rewritten else stops,
        mode="shown" if is_rewritten else mode,
    )
    pieces = complete(
        admitted.engine, request, writer, deadline=admitted.deadline, on_tokens=on_tokens
    )
    if not is_rewritten:
        return pieces
    return rewritten(pieces, model.rewriting, model.boundary, rules, mode=mode, stops=stops)


async def complete(
    engine: Engine,
    request: EngineRequest,
    writer: AnswerWriter,
    *,
    deadline: float,
    on_tokens: Callable[[int], None],
) -> AsyncGenerator[AnswerPiece]:
    """The pieces of one completion.

    Args:
        deadline: on the event loop's clock, in seconds.
        on_tokens: called with the number of tokens the engine has just written, hidden or not.

    Raises:
        EngineError: if the engine fails, after a second attempt if no token was written yet.
        TimeoutError: if the deadline passes.
    """
    written = 0
    for attempt in range(ATTEMPTS):
        chunks = engine.generate(request)
        try:
            while True:
                piece = writer.feed(await _next(chunks, deadline))
                written += piece.engine_tokens
                # Counted before the piece is handed on: a client that disconnects while it waits
                # for this piece is billed for it.
                on_tokens(piece.engine_tokens)
                yield piece
                if piece.finish is not None:
                    return
        except EngineError as error:
            # A second attempt would repeat tokens that the writer already has, and a busy engine
            # must be relieved.
            if isinstance(error, EngineBusyError) or written or attempt + 1 == ATTEMPTS:
                raise
            logger.info("completion %s is requested again: %s", request.id, error)
        finally:
            # Without this the engine would go on writing a completion that is no longer read.
            await chunks.aclose()


async def _next(chunks: AsyncGenerator[Chunk], deadline: float) -> Chunk:
    async with asyncio.timeout_at(deadline):
        chunk = await anext(chunks, None)
    if chunk is None:
        raise EngineError("the engine ended the completion without a reason")
    return chunk


async def rewritten(
    pieces: AsyncGenerator[AnswerPiece],
    rewriting: Sequence[Defense],
    boundary: Boundary,
    rules: ReadingRules,
    *,
    mode: Mode,
    stops: Sequence[str],
) -> AsyncGenerator[AnswerPiece]:
    """The same completion as one piece whose text was rewritten by text defenses.

    It has no log-probabilities: those of the engine belong to a text that is no longer visible.

    Args:
        boundary: of the model, which the defenses get.
        rules: by which the completion before rewriting is read.
    """
    text, finish, count = "", None, 0
    async with contextlib.aclosing(pieces):
        async for piece in pieces:
            text += piece.text
            finish = piece.finish
            count += piece.engine_tokens
    stop = StopStrings(stops)
    answer, stopped = stop.feed(_rewrite(text, rewriting, boundary, rules, mode))
    if not stopped:
        answer += stop.flush()
    yield AnswerPiece(answer, finish="stop" if stopped else finish, engine_tokens=count)


def _rewrite(
    text: str, rewriting: Sequence[Defense], boundary: Boundary, rules: ReadingRules, mode: Mode
) -> str:
    """The text rewritten, without its reasoning where the tier hides it."""
    line, answer = ReasoningFilter(mode, rules).advance(text, final=True)
    if not answer:
        # A defense may drop the tag that marks reasoning. A completion that had no answer before
        # rewriting must not get one from it.
        return line
    text = rules.opening + text
    context = RewriteContext(boundary)
    for defense in rewriting:
        [result] = defense.rewrite([FinishedText(text)], context)
        text = result.text
    # A defense may also have dropped the opening, which is the prompt's and not part of the answer.
    opening = rules.opening if text.startswith(rules.opening) else ""
    reasoning = ReasoningFilter(mode, ReadingRules(boundary, opening))
    return "".join(reasoning.advance(text.removeprefix(opening), final=True))


async def merge(
    streams: Sequence[AsyncGenerator[AnswerPiece]],
) -> AsyncGenerator[tuple[int, AnswerPiece]]:
    """Pieces of several completions as they come, each with the number of its completion.

    A completion that fails ends all of them.

    Raises:
        EngineError: the first error of a completion.
        TimeoutError: if the deadline passes.
    """
    if len(streams) == 1:
        async with contextlib.aclosing(streams[0]) as only:
            async for piece in only:
                yield 0, piece
        return
    queue: asyncio.Queue[tuple[int, AnswerPiece] | Exception | None] = asyncio.Queue()

    async def pump(number: int, stream: AsyncGenerator[AnswerPiece]) -> None:
        try:
            async for piece in stream:
                queue.put_nowait((number, piece))
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.create_task(pump(number, stream)) for number, stream in enumerate(streams)]
    try:
        running = len(streams)
        while running:
            message = await queue.get()
            if message is None:
                running -= 1
            elif isinstance(message, Exception):
                raise message
            else:
                yield message
    finally:
        # Cancelling a pump closes its stream and so stops the row in the engine. The gathering
        # waits for that, so that no row goes on after its request was settled.
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
