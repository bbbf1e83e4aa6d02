"""Requests to a transformers engine, its answers, and the answers of the reference path."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from azeotrope import models
from azeotrope.engine.protocol import Chunk, EngineRequest, Token
from azeotrope.engine.transformers import TransformersEngine
from azeotrope.generation import Sampling, generate

Answer = tuple[tuple[Token, ...], str | None]
"""Tokens, and why the completion ended."""
Prompts = list[tuple[int, ...]]


def reference_answers(
    loaded: models.Loaded,
    prompts: Prompts,
    sampling: Sampling,
    seeds: list[int] | None = None,
    **more: Any,
) -> list[tuple[tuple[int, ...], str]]:
    """For each prompt: its tokens without the end-of-sequence token, and why it ended."""
    eos, pad = loaded.tokenizer.eos_token_id, loaded.tokenizer.pad_token_id
    completions = generate(
        loaded.model, prompts, sampling, end_ids=(eos,), pad_id=pad, seeds=seeds, **more
    )
    return [(c.ids[:-1], "stop") if c.finished else (c.ids, "length") for c in completions]


def reference_answer(
    loaded: models.Loaded, prompt: tuple[int, ...], max_tokens: int = 40, **more: Any
) -> tuple[tuple[int, ...], str]:
    sampling = Sampling(temperature=0.0, max_new_tokens=max_tokens)
    return reference_answers(loaded, [prompt], sampling, **more)[0]


def request_for(prompt: tuple[int, ...], max_tokens: int = 40, **more: Any) -> EngineRequest:
    more = {"temperature": 0.0, **more}
    return EngineRequest(id="r", prompt=prompt, max_tokens=max_tokens, **more)


async def chunks_of(engine: TransformersEngine, request: EngineRequest) -> list[Chunk]:
    return [chunk async for chunk in engine.generate(request)]


async def answer_of(engine: TransformersEngine, request: EngineRequest) -> Answer:
    chunks = await chunks_of(engine, request)
    assert all(chunk.finish is None and chunk.tokens for chunk in chunks[:-1])
    return tuple(token for chunk in chunks for token in chunk.tokens), chunks[-1].finish


def ids_of(answer: Answer) -> tuple[tuple[int, ...], str | None]:
    return tuple(token.id for token in answer[0]), answer[1]


def answers_of(engine: TransformersEngine, requests: list[EngineRequest]) -> list[Answer]:
    async def run() -> list[Answer]:
        return await asyncio.gather(*(answer_of(engine, request) for request in requests))

    return asyncio.run(run())


@contextmanager
def watched(loaded: models.Loaded, before: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Calls `before` with the arguments of each forward pass."""
    hook = loaded.model.register_forward_pre_hook(
        lambda _module, _args, kwargs: before(kwargs), with_kwargs=True
    )
    try:
        yield
    finally:
        hook.remove()


class Gate:
    """Holds the model before its forward pass number `at`, and the later ones, until opened."""

    def __init__(self, at: int = 0) -> None:
        self.at, self.sizes = at, []
        self.reached, self.opened = threading.Event(), threading.Event()

    def __call__(self, kwargs: dict[str, Any]) -> None:
        self.sizes.append(tuple(kwargs["input_ids"].shape))
        if len(self.sizes) > self.at:
            self.reached.set()
            assert self.opened.wait(timeout=30)


def answers_together(
    engine: TransformersEngine, requests: list[EngineRequest], gate: Gate
) -> list[Answer]:
    """All requests are queued before the first forward pass ends."""

    async def run() -> list[Answer]:
        tasks = [asyncio.create_task(answer_of(engine, request)) for request in requests]
        await asyncio.to_thread(gate.reached.wait, 30)
        gate.opened.set()
        return await asyncio.gather(*tasks)

    return asyncio.run(run())
