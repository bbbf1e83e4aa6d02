"""The engine without vLLM: a thread that owns the model, and streams for asyncio.

Everything that a request may not ask is refused before it is queued; what then fails is the
engine's fault, and ends every request that is open.
"""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from azeotrope.defenses.base import Defense
from azeotrope.endings import end_ids
from azeotrope.engine.protocol import (
    Chunk,
    Engine,
    EngineBusyError,
    EngineError,
    EngineRequest,
    check_request,
)
from azeotrope.engine.row_batch import BatchRow, RowBatch
from azeotrope.engine.variants import DefenseVariants
from azeotrope.generation import context_of, uniforms
from azeotrope.models import Loaded

PREFILL_TOKENS = 2048
"""Of prompts that are read in one step, padding included, unless a single prompt is longer: rows
that are writing wait for it."""

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class _Stream:
    """A row and who waits for it."""

    row: BatchRow
    loop: asyncio.AbstractEventLoop
    news: asyncio.Event = field(default_factory=asyncio.Event)


class TransformersEngine(Engine):
    """Continuous batching on one device with transformers alone; see `row_batch`.

    A request whose prompt and `max_tokens` do not fit the context ends with `length` where the
    context does. Call `close` when it is no longer needed: the thread holds the model.
    """

    def __init__(
        self,
        loaded: Loaded,
        *,
        decoding: Sequence[dict[str, Any]] = (),
        rows: int = 32,
        queue: int = 256,
    ) -> None:
        """
        Args:
            decoding: plain configurations of decoding-stage defenses, in the order they act.
            rows: completions that are written at once; their cache is as wide as the longest.
            queue: requests that wait for a place; more are refused.

        Raises:
            ValueError: if rows or queue are below 1, a defense is not of stage `decoding`, or the
                model's cache is not one of full attention.
            ConfigError: if a defense's configuration does not fit.
        """
        if rows < 1 or queue < 1:
            raise ValueError(f"rows and queue must be at least 1, got rows={rows}, queue={queue}")
        model, tokenizer = loaded.model, loaded.tokenizer
        self._batch = RowBatch(
            model,
            end_ids=end_ids(tokenizer),
            pad_id=tokenizer.pad_token_id or 0,  # type: ignore[arg-type]
        )
        self._variants = DefenseVariants(decoding)
        self._context = context_of(model)
        self._vocabulary = int(model.config.get_text_config().vocab_size)
        self._rows, self._queue = rows, queue
        # Guards everything below, and is notified when there is something to do.
        self._changed = threading.Condition()
        self._waiting: deque[_Stream] = deque()
        self._writing: list[_Stream] = []
        self._ended: str | None = None
        self._thread = threading.Thread(target=self._run, name="transformers-engine", daemon=True)
        self._thread.start()

    @property
    def healthy(self) -> bool:
        """Whether requests are served; an engine that failed does not come back."""
        return self._ended is None and self._thread.is_alive()

    def close(self) -> None:
        """Stop after the step under way; requests that still wait get an `EngineError`."""
        self._end("the engine was closed; send the request to another one")
        self._thread.join()

    async def generate(self, request: EngineRequest) -> AsyncGenerator[Chunk]:
        """What the row wrote since the consumer last looked, in one chunk each time.

        Raises:
            ValueError: before anything is queued, if the request does not fit the model.
            EngineBusyError: before the first chunk, if the queue is full.
            EngineError: if the engine failed or was closed.
        """
        check_request(request, context=self._context, vocabulary=self._vocabulary)
        defenses = await self._variants.of(request.strength, request.watermark_key)
        stream = _Stream(self._row(request, defenses), asyncio.get_running_loop())
        self._enqueue(stream)
        row = stream.row
        try:
            while True:
                await stream.news.wait()
                stream.news.clear()
                # The end is read before the tokens: they were put there before it.
                finish, error = row.finish, row.error
                tokens = tuple(row.outbox.popleft() for _ in range(len(row.outbox)))
                if tokens or finish is not None:
                    yield Chunk(tokens, finish)
                if finish is not None:
                    return
                if error is not None:
                    raise error
        finally:
            self._leave(stream)

    def _row(self, request: EngineRequest, defenses: tuple[Defense, ...]) -> BatchRow:
        limit = min(request.max_tokens, self._context - len(request.prompt))
        drawn = request.temperature > 0
        return BatchRow(
            prompt=request.prompt,
            limit=limit,
            temperature=request.temperature,
            top_p=request.top_p,
            draws=uniforms(request.seed, limit).tolist() if drawn else (),
            logprobs=request.logprobs,
            banned=request.banned,
            hooks=defenses,
        )

    def _enqueue(self, stream: _Stream) -> None:
        with self._changed:
            if self._ended is not None:
                raise EngineError(self._ended)
            # Counted together: a place that is free now may be taken by one that waits already.
            if len(self._waiting) + len(self._writing) >= self._rows + self._queue:
                raise EngineBusyError(
                    f"{len(self._writing)} requests are being written and {len(self._waiting)} "
                    "wait, which is all that the engine takes; try again later"
                )
            self._waiting.append(stream)
            self._changed.notify()

    def _leave(self, stream: _Stream) -> None:
        stream.row.cancelled = True
        with self._changed:
            if stream in self._waiting:
                self._waiting.remove(stream)

    def _run(self) -> None:
        try:
            while (joining := self._next()) is not None:
                self._batch.step([stream.row for stream in joining])
                self._wake(self._writing)
        except BaseException as error:
            # Whatever it was, nobody may wait for ever.
            logger.exception("the model failed; no more requests are taken")
            self._end(f"the model failed ({type(error).__name__}: {error}); restart the engine")
        finally:
            self._batch.close()

    def _next(self) -> list[_Stream] | None:
        """Rows that join the next step; waits while there is nothing to write. None at the end."""
        with self._changed:
            self._writing = [stream for stream in self._writing if not stream.row.is_done]
            # Rows that were cancelled are in the batch, and hold memory, until one more step.
            while not (self._waiting or self._batch.rows or self._ended):
                self._changed.wait()
            if self._ended is not None:
                return None
            joining: list[_Stream] = []
            widest = 0
            while self._waiting and len(self._writing) + len(joining) < self._rows:
                widest = max(widest, len(self._waiting[0].row.prompt))
                if joining and widest * (len(joining) + 1) > PREFILL_TOKENS:
                    break
                joining.append(self._waiting.popleft())
            self._writing += joining
            return joining

    def _end(self, why: str) -> None:
        """Take no more requests and end those that are open."""
        with self._changed:
            self._ended = self._ended or why
            streams = [*self._waiting, *self._writing]
            self._waiting.clear()
            self._writing = []
            for stream in streams:
                if not stream.row.is_done:
                    stream.row.error = EngineError(why)
            self._changed.notify()
        self._wake(streams)

    def _wake(self, streams: Iterable[_Stream]) -> None:
        """Tell who waits: one call for each event loop, however many rows it has."""
        loops: dict[asyncio.AbstractEventLoop, list[_Stream]] = {}
        for stream in streams:
            loops.setdefault(stream.loop, []).append(stream)
        for loop, members in loops.items():
            try:
                loop.call_soon_threadsafe(_tell, members)
            except RuntimeError:
                # The loop is closed: nobody is left to read, and nobody could have cancelled.
                for stream in members:
                    stream.row.cancelled = True


def _tell(streams: Sequence[_Stream]) -> None:
    for stream in streams:
        stream.news.set()
