"""The transformers engine's queue and streams: slow and absent readers, failures, shared steps."""

import asyncio
from contextlib import aclosing, closing
from typing import Any

import pytest
import torch
from engine_answers import (
    Gate,
    answer_of,
    answers_of,
    answers_together,
    chunks_of,
    ids_of,
    reference_answer,
    request_for,
    watched,
)

from azeotrope.defenses import base
from azeotrope.engine.protocol import Chunk, EngineBusyError, EngineError
from azeotrope.engine.transformers import PREFILL_TOKENS, TransformersEngine


def test_a_slow_consumer_gets_everything_in_one_chunk(teacher, prompts) -> None:
    gate = Gate(at=1)

    async def run() -> list[Chunk]:
        stream = engine.generate(request_for(prompts[0], 96))
        found = [await anext(stream)]
        gate.opened.set()
        while engine._writing:
            await asyncio.sleep(0.01)
        return [*found, *[chunk async for chunk in stream]]

    with watched(teacher, gate), closing(TransformersEngine(teacher)) as engine:
        first, second = asyncio.run(run())
    written, finish = reference_answer(teacher, prompts[0], 96)
    assert (first.finish, second.finish) == (None, finish)
    assert [token.id for token in first.tokens] == [written[0]]
    assert [token.id for token in second.tokens] == list(written[1:])


@pytest.mark.parametrize("how", ["aclose", "cancel"])
def test_a_row_that_nobody_reads_frees_its_place(teacher, prompts, how) -> None:
    gate = Gate(at=1)

    async def run() -> tuple[tuple[int, ...], str | None]:
        stream = engine.generate(request_for(prompts[0], 10_000, banned=(eos,)))
        assert (await anext(stream)).tokens
        if how == "aclose":
            await stream.aclose()
        else:
            task = asyncio.create_task(anext(stream))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        gate.opened.set()
        answer = await answer_of(engine, request_for(prompts[1]))
        # Nothing is left to do: the thread waits, and holds no cache.
        async with asyncio.timeout(10):
            while engine._batch.rows:
                await asyncio.sleep(0.001)
        return ids_of(answer)

    eos = teacher.tokenizer.eos_token_id
    with watched(teacher, gate), closing(TransformersEngine(teacher, rows=1)) as engine:
        answer = asyncio.run(run())
    assert answer == reference_answer(teacher, prompts[1])
    assert {rows for rows, _ in gate.sizes} == {1}
    # The first row took the step that was under way, and could have gone on for hundreds.
    assert len(gate.sizes) - len(answer[0]) - (answer[1] == "stop") in (1, 2)


def test_a_full_queue_refuses_and_a_place_that_is_left_is_given_again(teacher, prompts) -> None:
    gate = Gate()

    async def run() -> None:
        tasks = [
            asyncio.create_task(answer_of(engine, request_for(prompts[i], 5))) for i in range(3)
        ]
        await asyncio.to_thread(gate.reached.wait, 30)
        with pytest.raises(EngineBusyError, match="1 requests are being written and 2 wait"):
            await chunks_of(engine, request_for(prompts[3], 5))
        tasks[2].cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        tasks[2] = asyncio.create_task(answer_of(engine, request_for(prompts[4], 5)))
        await asyncio.sleep(0)
        gate.opened.set()
        answers = [ids_of(answer) for answer in await asyncio.gather(*tasks)]
        assert answers == [reference_answer(teacher, prompts[i], 5) for i in (0, 1, 4)]

    with (
        watched(teacher, gate),
        closing(TransformersEngine(teacher, rows=1, queue=2)) as engine,
    ):
        asyncio.run(run())


def test_a_model_that_fails_ends_every_stream(teacher, prompts, caplog) -> None:
    calls: list[int] = []

    def fail(_kwargs: dict[str, Any]) -> None:
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("out of memory")

    async def run() -> list[Any]:
        return await asyncio.gather(
            *(answer_of(engine, request_for(prompt)) for prompt in prompts), return_exceptions=True
        )

    with watched(teacher, fail), closing(TransformersEngine(teacher, rows=4)) as engine:
        assert engine.healthy
        found = asyncio.run(run())
        assert not engine.healthy
        again = asyncio.run(run())
    assert len(calls) == 5
    for error in found + again:
        assert isinstance(error, EngineError)
        assert "out of memory" in str(error)
    assert "the model failed" in caplog.text


def test_a_row_without_a_distribution_ends_alone(teacher, prompts, monkeypatch) -> None:
    class Broken(base.Defense):
        stage = "decoding"

        def adjust_logits(self, logits, prefixes):
            value = torch.nan if self.config.strength < 5 else -torch.inf
            written = torch.tensor([len(prefix) for prefix in prefixes])
            return torch.where((written == 2).unsqueeze(-1), value, logits)

    monkeypatch.setattr(base, "resolve", lambda data: Broken(base.DefenseConfig(**data)))

    async def run() -> list[Any]:
        requests = [
            request_for(prompts[i], strength=strength) for i, strength in enumerate((0.0, 1.0, 9.0))
        ]
        return await asyncio.gather(
            *(answer_of(engine, request) for request in requests), return_exceptions=True
        )

    with closing(TransformersEngine(teacher, decoding=[{"name": "broken"}])) as engine:
        whole, *broken = asyncio.run(run())
        assert engine.healthy
    assert ids_of(whole) == reference_answer(teacher, prompts[0])
    for error in broken:
        assert isinstance(error, EngineError)
        assert "token 2 of a row has no distribution" in str(error)


def test_closing_ends_streams_and_refuses_more(teacher, prompts) -> None:
    async def run() -> None:
        engine = TransformersEngine(teacher)
        async with aclosing(
            engine.generate(request_for(prompts[0], 10_000, banned=(eos,)))
        ) as stream:  # type: ignore[type-var]
            await anext(stream)
            await asyncio.to_thread(engine.close)
            with pytest.raises(EngineError, match="was closed"):
                async for _ in stream:
                    pass
        engine.close()
        assert not engine.healthy
        with pytest.raises(EngineError, match="was closed"):
            await chunks_of(engine, request_for(prompts[0]))

    eos = teacher.tokenizer.eos_token_id
    asyncio.run(run())


def test_a_loop_that_is_gone_does_not_stop_the_others(teacher, prompts) -> None:
    loop = asyncio.new_event_loop()
    with closing(TransformersEngine(teacher, rows=1)) as engine:
        stream = engine.generate(request_for(prompts[0], 10_000, banned=(2,)))
        loop.run_until_complete(anext(stream))
        loop.close()
        [answer] = answers_of(engine, [request_for(prompts[1])])
        assert engine.healthy
    assert ids_of(answer) == reference_answer(teacher, prompts[1])


def test_sixteen_streams_take_the_steps_of_the_longest(teacher, prompts) -> None:
    gate = Gate()
    requests = [request_for(prompt, 12) for prompt in prompts]
    with watched(teacher, gate), closing(TransformersEngine(teacher, rows=16)) as engine:
        answers_together(engine, requests, gate)
        together = list(gate.sizes)
        gate.sizes.clear()
        for request in requests:
            answers_of(engine, [request])
    assert len(gate.sizes) == 16 * 12
    assert max(rows for rows, _ in together) >= 15
    # Those that came during the first pass have one of their own, and are a step behind.
    assert len(together) <= 12 + 2


def test_prompts_of_one_step_are_bounded(teacher, prompts) -> None:
    gate = Gate()
    long = tuple(prompts[0][i % len(prompts[0])] for i in range(250))
    requests = [request_for(long, 2, banned=(2,)) for _ in range(20)]
    with watched(teacher, gate), closing(TransformersEngine(teacher, rows=20)) as engine:
        answers = answers_together(engine, requests, gate)
    prefills = [rows * width for rows, width in gate.sizes if width > 1]
    assert sum(prefills) == 20 * 250
    assert max(prefills) == 8 * 250 <= PREFILL_TOKENS
    assert set(map(ids_of, answers)) == {ids_of(answers[0])}
