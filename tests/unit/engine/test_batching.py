"""Continuous batching: the reference path's tokens, whoever joins or leaves beside a row."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import aclosing, closing, contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from azeotrope import models
from azeotrope.defenses import base
from azeotrope.engine.protocol import Chunk, EngineBusyError, EngineError, EngineRequest, Token
from azeotrope.engine.row_batch import Row, RowBatch
from azeotrope.engine.transformers import PREFILL_TOKENS, TransformersEngine
from azeotrope.generation import Sampling, choose, generate, uniforms
from azeotrope.tasks import PocketConfig, build
from azeotrope.tokens import encode_prompt

Prompts = list[tuple[int, ...]]


@pytest.fixture(scope="module")
def teacher() -> models.Loaded:
    return models.load("pocket/teacher")


@pytest.fixture(scope="module")
def prompts(teacher) -> Prompts:
    task = build(PocketConfig())
    return [
        encode_prompt(teacher.tokenizer, task.messages(problem.question))
        for problem in task.problems("test", 16)
    ]


def references(
    loaded: models.Loaded,
    prompts: Prompts,
    sampling: Sampling,
    seeds: list[int] | None = None,
    **more: Any,
) -> list[tuple[tuple[int, ...], str]]:
    """Of each prompt: tokens without the end-of-sequence token, and why it ended."""
    eos, pad = loaded.tokenizer.eos_token_id, loaded.tokenizer.pad_token_id
    found = generate(loaded.model, prompts, sampling, eos_id=eos, pad_id=pad, seeds=seeds, **more)
    return [(c.ids[:-1], "stop") if c.finished else (c.ids, "length") for c in found]


def reference(
    loaded: models.Loaded, prompt: tuple[int, ...], max_tokens: int = 40, **more: Any
) -> tuple[tuple[int, ...], str]:
    sampling = Sampling(temperature=0.0, max_new_tokens=max_tokens)
    return references(loaded, [prompt], sampling, **more)[0]


def asked(prompt: tuple[int, ...], max_tokens: int = 40, **more: Any) -> EngineRequest:
    more = {"temperature": 0.0, **more}
    return EngineRequest(id="r", prompt=prompt, max_tokens=max_tokens, **more)


async def chunks(engine: TransformersEngine, request: EngineRequest) -> list[Chunk]:
    return [chunk async for chunk in engine.generate(request)]


async def told(
    engine: TransformersEngine, request: EngineRequest
) -> tuple[tuple[Token, ...], str | None]:
    found = await chunks(engine, request)
    assert all(chunk.finish is None and chunk.tokens for chunk in found[:-1])
    return tuple(token for chunk in found for token in chunk.tokens), found[-1].finish


def ids(answer: tuple[tuple[Token, ...], str | None]) -> tuple[tuple[int, ...], str | None]:
    return tuple(token.id for token in answer[0]), answer[1]


def ask_all(engine: TransformersEngine, requests: list[EngineRequest]) -> list[Any]:
    async def run() -> list[Any]:
        return await asyncio.gather(*(told(engine, request) for request in requests))

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


def ask_together(engine: TransformersEngine, requests: list[EngineRequest], gate: Gate) -> Any:
    """All requests are queued before the first forward pass ends."""

    async def run() -> list[Any]:
        tasks = [asyncio.create_task(told(engine, request)) for request in requests]
        await asyncio.to_thread(gate.reached.wait, 30)
        gate.opened.set()
        return await asyncio.gather(*tasks)

    return asyncio.run(run())


class Raise(base.Defense):
    """A test defense: even tokens are likelier, those of the last token's half more so."""

    stage = "decoding"

    def adjust_logits(self, logits, prefixes):
        if self.is_identity:
            return logits
        gain = torch.zeros_like(logits)
        for index, prefix in enumerate(prefixes):
            gain[index, ::2] += self.config.strength
            gain[index, : 1 + (prefix[-1] if prefix else 0)] += ord(self.config.key[0]) / 50
        return logits + gain


class RaiseConfig(base.DefenseConfig):
    key: str = "a"


@pytest.fixture
def raise_defense(monkeypatch) -> Callable[..., Raise]:
    def make(data: dict[str, Any]) -> Raise:
        return Raise(RaiseConfig.model_validate(data))

    monkeypatch.setattr(base, "resolve", make)
    return make


def test_rows_that_join_at_any_time_write_the_reference_tokens(teacher, prompts) -> None:
    """Joins, leaves and growing columns: three rows more after every fourth step."""
    kinds = [
        Sampling(temperature=0.0, max_new_tokens=96),
        Sampling(temperature=1.1, top_p=0.9, max_new_tokens=96),
        Sampling(temperature=1.5, max_new_tokens=3),
    ]
    expected, rows = {}, []
    for number, how in enumerate(kinds):
        mine = list(range(number, len(prompts), len(kinds)))
        answers = references(teacher, [prompts[i] for i in mine], how, seeds=mine)
        expected.update(zip(mine, answers, strict=True))
    for index, prompt in enumerate(prompts):
        how = kinds[index % len(kinds)]
        draws = uniforms(index, how.max_new_tokens).tolist()
        rows.append(Row(prompt, how.max_new_tokens, how.temperature, how.top_p, draws))
    batch = RowBatch(teacher.model, eos_id=teacher.tokenizer.eos_token_id, pad_id=0)
    late, step, widths = list(rows), 0, []
    with watched(teacher, lambda kwargs: widths.append(kwargs["attention_mask"].shape[1])):
        while late or batch.rows:
            joining, late = (late[:3], late[3:]) if step % 4 == 0 else ([], late)
            batch.step(joining)
            step += 1
    found = {index: (tuple(row.written), row.finish) for index, row in enumerate(rows)}
    assert found == expected
    assert {row.finish for row in rows} == {"stop", "length"}
    # Columns of long rows that left are trimmed.
    assert max(widths) <= max(len(row.prompt) + len(row.written) for row in rows)
    assert any(after < before - 1 for before, after in pairwise(widths))


def test_streams_write_the_reference_tokens_whatever_stands_beside_them(teacher, prompts) -> None:
    warm = {"temperature": 1.3, "top_p": 0.95}
    requests = [
        asked(prompt, 25, seed=index, **(warm if index % 2 else {}))
        for index, prompt in enumerate(prompts[:6])
    ]
    with closing(TransformersEngine(teacher, rows=3)) as engine:
        together = [ids(answer) for answer in ask_all(engine, requests)]
        alone = [ids(ask_all(engine, [request])[0]) for request in requests[:4]]
    assert together[:4] == alone
    greedy = Sampling(temperature=0.0, max_new_tokens=25)
    sampled = Sampling(**warm, max_new_tokens=25)
    assert together[::2] == references(teacher, prompts[0:6:2], greedy)
    assert together[1::2] == references(teacher, prompts[1:6:2], sampled, seeds=[1, 3, 5])


def test_seeds_decide_what_is_sampled(teacher, prompts) -> None:
    requests = [asked(prompts[0], temperature=2.0, seed=seed) for seed in (1, 1, 2)]
    with closing(TransformersEngine(teacher)) as engine:
        first, again, other = ask_all(engine, requests)
    assert ids(first) == ids(again) != ids(other)


def test_log_probabilities_are_those_of_the_defended_forward_pass(
    teacher, prompts, raise_defense
) -> None:
    config = {"name": "raise", "strength": 1.5}
    defense = raise_defense(config)
    requests = [
        asked(prompts[0], 12, logprobs=4),
        asked(prompts[1], 12),
        asked(prompts[2], 12, logprobs=0, temperature=1.2, seed=3),
    ]
    for configs in ([], [config]):
        with closing(TransformersEngine(teacher, decoding=configs)) as engine:
            answers = ask_all(engine, requests)
        assert all(token.logprob is None and not token.top for token in answers[1][0])
        for answer, request in zip(answers, requests, strict=True):
            written = [token.id for token in answer[0]]
            if request.logprobs is None:
                continue
            for step, token in enumerate(answer[0]):
                whole = torch.tensor([[*request.prompt, *written[:step]]])
                with torch.inference_mode():
                    logits = teacher.model(whole, use_cache=False).logits[:, -1]
                if configs:
                    logits = defense.adjust_logits(logits, [written[:step]])
                logs = logits.log_softmax(-1)[0]
                assert token.logprob == pytest.approx(logs[token.id].item(), abs=1e-4)
                values, best = logs.topk(request.logprobs)
                assert [id for id, _ in token.top] == best.tolist()
                assert [value for _, value in token.top] == pytest.approx(values.tolist(), abs=1e-4)
        assert answers[0][0][0].top[0][0] == answers[0][0][0].id


def test_strength_and_key_of_a_request_choose_its_defense(teacher, prompts, raise_defense) -> None:
    config = {"name": "raise", "strength": 1.5, "key": "z"}
    variants = [(None, None), (0.0, None), (3.0, None), (None, "q"), (3.0, "q"), (3.0, None)]
    requests = [
        asked(prompts[index], 20, strength=strength, watermark_key=key)
        for index, (strength, key) in enumerate(variants)
    ]
    with closing(TransformersEngine(teacher, decoding=[config])) as engine:
        together = [ids(answer) for answer in ask_all(engine, requests)]
    for index, (strength, key) in enumerate(variants):
        changed = {**config, "strength": 1.5 if strength is None else strength, "key": key or "z"}
        adjust = raise_defense(changed).adjust_logits
        expected = reference(teacher, prompts[index], 20, adjust_logits=adjust)
        assert together[index] == expected
    assert together[1] == reference(teacher, prompts[1], 20)


def test_a_defense_sees_all_of_its_rows_in_every_step(teacher, prompts, monkeypatch) -> None:
    seen: list[list[list[int]]] = []

    class Watch(base.Defense):
        stage = "decoding"

        def adjust_logits(self, logits, prefixes):
            seen.append(prefixes)
            return logits

    monkeypatch.setattr(base, "resolve", lambda data: Watch(base.DefenseConfig(**data)))
    defenses = (base.resolve({"name": "watch"}),)
    batch = RowBatch(teacher.model, eos_id=None, pad_id=0)
    first, second = (Row(prompt, 3, defenses=defenses) for prompt in prompts[:2])
    batch.step([first])
    batch.step([second])
    batch.step()
    batch.step()
    assert [len(prefixes) for prefixes in seen] == [1, 2, 2, 1]
    # The same list from the first step to the last.
    assert all(prefixes[0] is first.written for prefixes in seen[:3])
    assert seen[3][0] is second.written
    assert batch.rows == []


def test_banned_tokens_are_not_written(teacher, prompts) -> None:
    with closing(TransformersEngine(teacher)) as engine:
        [plain] = ask_all(engine, [asked(prompts[0])])
        used = tuple({token.id for token in plain[0]})
        [answer] = ask_all(engine, [asked(prompts[0], banned=used, logprobs=3)])
    assert answer[0]
    for token in answer[0]:
        assert token.id not in used
        assert token.logprob is not None
        assert {id for id, _ in token.top}.isdisjoint(used)
        assert token.top[0] == (token.id, token.logprob)


def test_a_slow_consumer_gets_everything_in_one_chunk(teacher, prompts) -> None:
    gate = Gate(at=1)

    async def run() -> list[Chunk]:
        stream = engine.generate(asked(prompts[0], 96))
        found = [await anext(stream)]
        gate.opened.set()
        while engine._writing:
            await asyncio.sleep(0.01)
        return [*found, *[chunk async for chunk in stream]]

    with watched(teacher, gate), closing(TransformersEngine(teacher)) as engine:
        first, second = asyncio.run(run())
    written, finish = reference(teacher, prompts[0], 96)
    assert (first.finish, second.finish) == (None, finish)
    assert [token.id for token in first.tokens] == [written[0]]
    assert [token.id for token in second.tokens] == list(written[1:])


@pytest.mark.parametrize("how", ["aclose", "cancel"])
def test_a_row_that_nobody_reads_frees_its_place(teacher, prompts, how) -> None:
    gate = Gate(at=1)

    async def run() -> tuple[tuple[int, ...], str | None]:
        stream = engine.generate(asked(prompts[0], 10_000, banned=(eos,)))
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
        answer = await told(engine, asked(prompts[1]))
        # Nothing is left to do: the thread waits, and holds no cache.
        async with asyncio.timeout(10):
            while engine._batch.rows:
                await asyncio.sleep(0.001)
        return ids(answer)

    eos = teacher.tokenizer.eos_token_id
    with watched(teacher, gate), closing(TransformersEngine(teacher, rows=1)) as engine:
        answer = asyncio.run(run())
    assert answer == reference(teacher, prompts[1])
    assert {rows for rows, _ in gate.sizes} == {1}
    # The first row took the step that was under way, and could have gone on for hundreds.
    assert len(gate.sizes) - len(answer[0]) - (answer[1] == "stop") in (1, 2)


def test_a_full_queue_refuses_and_a_place_that_is_left_is_given_again(teacher, prompts) -> None:
    gate = Gate()

    async def run() -> None:
        tasks = [asyncio.create_task(told(engine, asked(prompts[i], 5))) for i in range(3)]
        await asyncio.to_thread(gate.reached.wait, 30)
        with pytest.raises(EngineBusyError, match="1 requests are being written and 2 wait"):
            await chunks(engine, asked(prompts[3], 5))
        tasks[2].cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        tasks[2] = asyncio.create_task(told(engine, asked(prompts[4], 5)))
        await asyncio.sleep(0)
        gate.opened.set()
        answers = [ids(answer) for answer in await asyncio.gather(*tasks)]
        assert answers == [reference(teacher, prompts[i], 5) for i in (0, 1, 4)]

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
            *(told(engine, asked(prompt)) for prompt in prompts), return_exceptions=True
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
            asked(prompts[i], strength=strength) for i, strength in enumerate((0.0, 1.0, 9.0))
        ]
        return await asyncio.gather(
            *(told(engine, request) for request in requests), return_exceptions=True
        )

    with closing(TransformersEngine(teacher, decoding=[{"name": "broken"}])) as engine:
        whole, *broken = asyncio.run(run())
        assert engine.healthy
    assert ids(whole) == reference(teacher, prompts[0])
    for error in broken:
        assert isinstance(error, EngineError)
        assert "token 2 of a row has no distribution" in str(error)


def test_closing_ends_streams_and_refuses_more(teacher, prompts) -> None:
    async def run() -> None:
        engine = TransformersEngine(teacher)
        async with aclosing(engine.generate(asked(prompts[0], 10_000, banned=(eos,)))) as stream:  # type: ignore[type-var]
            await anext(stream)
            await asyncio.to_thread(engine.close)
            with pytest.raises(EngineError, match="was closed"):
                async for _ in stream:
                    pass
        engine.close()
        assert not engine.healthy
        with pytest.raises(EngineError, match="was closed"):
            await chunks(engine, asked(prompts[0]))

    eos = teacher.tokenizer.eos_token_id
    asyncio.run(run())


def test_a_loop_that_is_gone_does_not_stop_the_others(teacher, prompts) -> None:
    loop = asyncio.new_event_loop()
    with closing(TransformersEngine(teacher, rows=1)) as engine:
        stream = engine.generate(asked(prompts[0], 10_000, banned=(2,)))
        loop.run_until_complete(anext(stream))
        loop.close()
        [answer] = ask_all(engine, [asked(prompts[1])])
        assert engine.healthy
    assert ids(answer) == reference(teacher, prompts[1])


def test_sixteen_streams_take_the_steps_of_the_longest(teacher, prompts) -> None:
    gate = Gate()
    requests = [asked(prompt, 12) for prompt in prompts]
    with watched(teacher, gate), closing(TransformersEngine(teacher, rows=16)) as engine:
        ask_together(engine, requests, gate)
        together = list(gate.sizes)
        gate.sizes.clear()
        for request in requests:
            ask_all(engine, [request])
    assert len(gate.sizes) == 16 * 12
    assert max(rows for rows, _ in together) >= 15
    # Those that came during the first pass have one of their own, and are a step behind.
    assert len(together) <= 12 + 2


def test_prompts_of_one_step_are_bounded(teacher, prompts) -> None:
    gate = Gate()
    long = tuple(prompts[0][i % len(prompts[0])] for i in range(250))
    requests = [asked(long, 2, banned=(2,)) for _ in range(20)]
    with watched(teacher, gate), closing(TransformersEngine(teacher, rows=20)) as engine:
        answers = ask_together(engine, requests, gate)
    prefills = [rows * width for rows, width in gate.sizes if width > 1]
    assert sum(prefills) == 20 * 250
    assert max(prefills) == 8 * 250 <= PREFILL_TOKENS
    assert set(map(ids, answers)) == {ids(answers[0])}


def test_the_context_ends_a_row(teacher, prompts) -> None:
    long = tuple(prompts[0][i % len(prompts[0])] for i in range(250))
    with closing(TransformersEngine(teacher)) as engine:
        [answer, last] = ask_all(
            engine,
            [asked(long, 10_000, banned=(2,)), asked((*long, *long[:5]), 50, banned=(2,))],
        )
    assert (len(answer[0]), answer[1]) == (6, "length")
    assert (len(last[0]), last[1]) == (1, "length")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": ()}, "the prompt has no tokens"),
        ({"prompt": (1,) * 256}, "a prompt of 256 tokens leaves no room in the model's context"),
        ({"prompt": (1, 129)}, "prompt holds token id 129; ids go from 0 to 128"),
        ({"prompt": (1, -1)}, "prompt holds token id -1"),
        ({"banned": (500,)}, "banned holds token id 500"),
        ({"banned": tuple(range(129))}, "all 129 tokens are banned"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"temperature": -0.5}, "temperature must be 0 or greater, got -0.5"),
        ({"temperature": float("nan")}, "temperature must be 0 or greater, got nan"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"logprobs": 130}, "logprobs must be from 0 to 129, got 130"),
        ({"seed": 2**64}, "seed must fit 64 bits"),
    ],
)
def test_requests_that_do_not_fit_are_refused_before_the_queue(teacher, change, message) -> None:
    request = EngineRequest(**{"id": "r", "prompt": (5,), "max_tokens": 3, **change})
    with closing(TransformersEngine(teacher)) as engine:
        with pytest.raises(ValueError, match=message):
            asyncio.run(chunks(engine, request))
        assert ask_all(engine, [asked((5,), 1)])[0][1] in ("stop", "length")


def test_what_the_engine_cannot_serve_is_refused_when_it_is_made(teacher) -> None:
    config = MistralConfig(
        vocab_size=17,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        sliding_window=8,
    )
    sliding = models.Loaded(MistralForCausalLM(config), teacher.tokenizer)
    with pytest.raises(ValueError, match="MistralForCausalLM keeps DynamicSlidingWindowLayer"):
        TransformersEngine(sliding)
    with pytest.raises(ValueError, match="rows and queue must be at least 1, got rows=0"):
        TransformersEngine(teacher, rows=0)
    with pytest.raises(ValueError, match="'answers_only' is of stage 'text'"):
        TransformersEngine(teacher, decoding=[{"name": "answers_only"}])


def test_other_architectures_write_the_reference_tokens() -> None:
    """OLMo 2, with another tokenizer."""
    other = models.load("pocket/other")
    task = build(PocketConfig())
    prompts = [
        encode_prompt(other.tokenizer, task.messages(problem.question))
        for problem in task.problems("test", 4)
    ]
    with closing(TransformersEngine(other, rows=2)) as engine:
        answers = ask_all(engine, [asked(prompt, 30) for prompt in prompts])
    greedy = Sampling(temperature=0.0, max_new_tokens=30)
    assert [ids(answer) for answer in answers] == references(other, prompts, greedy)


def test_rows_with_different_rules_are_chosen_as_if_alone() -> None:
    torch.manual_seed(0)
    logits, draws = torch.randn(6, 11) * 3, torch.rand(6, dtype=torch.float64)
    temperatures = torch.tensor([0.0, 1.0, 0.5, 2.0, 1.0, 0.0], dtype=torch.float64)
    top_p = torch.tensor([0.3, 1.0, 0.6, 0.9, 0.1, 1.0], dtype=torch.float64)
    together = choose(logits, temperatures, top_p, draws)
    alone = [
        choose(logits[i : i + 1], temperatures[i : i + 1], top_p[i : i + 1], draws[i : i + 1])
        for i in range(6)
    ]
    assert together.tolist() == torch.cat(alone).tolist()
    likeliest = logits.argmax(-1)
    # Temperature 0, and a nucleus of one token.
    assert together[[0, 4, 5]].tolist() == likeliest[[0, 4, 5]].tolist()
    # By hand: half of the mass lies before the second token.
    quarter = torch.tensor([[0.5, 0.25, 0.25]]).log()
    for draw, token in ((0.49, 0), (0.51, 1), (0.76, 2)):
        one = torch.ones(1, dtype=torch.float64)
        assert choose(quarter, one, one, one * draw).tolist() == [token]
