"""A decoding defense that keeps something for each row works in every engine.

The defense is a new module that no engine knows. It needs the prompts, and it records which rows
begin, which are adjusted, and which end.
"""

import asyncio
import importlib
import importlib.util
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from contributing import added

from azeotrope import models
from azeotrope.decoding import DecodingHooks
from azeotrope.defenses import base as defenses
from azeotrope.engine.protocol import EngineError, EngineRequest
from azeotrope.engine.row_batch import BatchRow, RowBatch
from azeotrope.engine.transformers import TransformersEngine
from azeotrope.generation import Completion, Sampling, generate

ECHO = '''
"""Echo: makes every completion repeat its prompt, and records the rows that it sees."""

from typing import Literal

import torch

from azeotrope.defenses.base import Defense, DefenseConfig

EVENTS = []


class Config(DefenseConfig):
    name: Literal["echo"] = "echo"
    end: int = 2


class Echo(Defense):
    stage = "decoding"

    def __init__(self, config):
        super().__init__(config)
        self.rest = {}

    def add_rows(self, rows):
        for row in rows:
            assert row not in self.rest, "a row is added once"
            self.rest[row] = (*row.prompt, self.config.end)
            EVENTS.append(("add", row.prompt))

    def adjust_rows(self, logits, rows):
        EVENTS.append(("call", len(rows)))
        if self.is_identity:
            return logits
        forced = torch.full_like(logits, -torch.inf)
        for index, row in enumerate(rows):
            EVENTS.append(("adjust", row.prompt, len(row.written)))
            forced[index, self.rest[row][len(row.written)]] = 0.0
        return forced

    def drop_rows(self, rows):
        for row in rows:
            del self.rest[row]
            EVENTS.append(("drop", row.prompt))


def build(config):
    return Echo(config)
'''
SETTINGS = {"name": "echo", "end": 2}
END = 2
PROMPTS = [(5, 6, 7), (8,), (9, 10), (11, 12, 13, 14)]


@pytest.fixture(scope="module")
def teacher() -> models.Loaded:
    return models.load("pocket/teacher")


@pytest.fixture
def echo(tmp_path: Path) -> Iterator[ModuleType]:
    with added("azeotrope.defenses", "echo", tmp_path / "modules", ECHO):
        yield importlib.import_module("azeotrope.defenses.echo")


def check_rows_begin_and_end_once(echo: ModuleType, prompts: list[tuple[int, ...]]) -> None:
    """Each prompt is added once, then adjusted at each token once, then dropped once."""
    kinds = {
        kind: [event[1:] for event in echo.EVENTS if event[0] == kind]
        for kind in ("add", "adjust", "drop")
    }
    assert sorted(kinds["add"]) == sorted((prompt,) for prompt in prompts)
    assert sorted(kinds["drop"]) == sorted(kinds["add"])
    assert set(Counter(kinds["adjust"]).values()) == {1}
    for prompt in prompts:
        lengths = [length for row, length in kinds["adjust"] if row == prompt]
        assert lengths == list(range(len(lengths)))
        own = [event[0] for event in echo.EVENTS if event[0] != "call" and event[1] == prompt]
        assert own == ["add", *["adjust"] * len(lengths), "drop"]


def test_the_reference_path_shows_prompts_and_ends(
    echo: ModuleType, teacher: models.Loaded
) -> None:
    sampling = Sampling(temperature=0.0, max_new_tokens=4)
    hooks = [defenses.resolve(dict(SETTINGS))]
    completions = generate(teacher.model, PROMPTS, sampling, end_ids=(END,), pad_id=0, hooks=hooks)
    # The last prompt is as long as a completion may be, so its row does not end by itself.
    assert completions == [
        *(Completion((*prompt, END), True) for prompt in PROMPTS[:3]),
        Completion(PROMPTS[3], False),
    ]
    check_rows_begin_and_end_once(echo, PROMPTS)
    # All rows of a step are adjusted in one call.
    assert [event[1] for event in echo.EVENTS if event[0] == "call"] == [4, 4, 3, 2]


def test_the_reference_path_drops_rows_when_it_fails(
    echo: ModuleType, teacher: models.Loaded
) -> None:
    class Fail(DecodingHooks):
        def adjust_rows(self, logits, rows):
            if len(rows[0].written) == 2:
                raise RuntimeError("no more")
            return logits

    hooks = [defenses.resolve(dict(SETTINGS)), Fail()]
    sampling = Sampling(temperature=0.0, max_new_tokens=4)
    with pytest.raises(RuntimeError, match="no more"):
        generate(teacher.model, PROMPTS, sampling, end_ids=(END,), pad_id=0, hooks=hooks)
    check_rows_begin_and_end_once(echo, PROMPTS)


def test_the_row_batch_adjusts_rows_that_join_later_in_the_same_call(
    echo: ModuleType, teacher: models.Loaded
) -> None:
    shared = (defenses.resolve(dict(SETTINGS)),)
    alone = (defenses.resolve(dict(SETTINGS)),)
    batch = RowBatch(teacher.model, end_ids=(END,), pad_id=0)
    rows = [BatchRow(prompt, shared, limit=10) for prompt in PROMPTS]
    rows.append(BatchRow((15, 16), alone, limit=10))
    batch.step([rows[3]])
    batch.step([rows[0], rows[4]])
    batch.step([rows[1], rows[2]])
    assert [event[1] for event in echo.EVENTS if event[0] == "call"] == [1, 2, 1, 4, 1]
    while batch.rows:
        batch.step()
    assert [row.written for row in rows] == [list(row.prompt) for row in rows]
    assert {row.finish for row in rows} == {"stop"}
    check_rows_begin_and_end_once(echo, [*PROMPTS, (15, 16)])


def test_the_row_batch_drops_cancelled_rows_and_those_that_are_open_at_its_end(
    echo: ModuleType, teacher: models.Loaded
) -> None:
    defense = (defenses.resolve(dict(SETTINGS)),)
    batch = RowBatch(teacher.model, end_ids=(END,), pad_id=0)
    cancelled, limited, opened = (
        BatchRow(prompt, defense, limit=limit)
        for prompt, limit in zip([(5, 6, 7), (8, 9, 10), (11, 12, 13)], (9, 2, 9), strict=True)
    )
    batch.step([cancelled, limited, opened])
    cancelled.cancelled = True
    batch.step()
    batch.close()
    assert limited.finish == "length"
    assert not opened.is_done
    check_rows_begin_and_end_once(echo, [(5, 6, 7), (8, 9, 10), (11, 12, 13)])


def test_the_transformers_engine_shows_prompts_and_every_kind_of_end(
    echo: ModuleType, teacher: models.Loaded
) -> None:
    long = tuple(range(20, 120))

    async def answer(engine: TransformersEngine, prompt: tuple[int, ...], most: int) -> list[int]:
        request = EngineRequest(id="r", prompt=prompt, max_tokens=most, temperature=0.0)
        return [token.id async for chunk in engine.generate(request) for token in chunk.tokens]

    async def run() -> list[Any]:
        left = engine.generate(EngineRequest("left", (15, *long), 100))
        closed = asyncio.create_task(answer(engine, (16, *long), 100))
        await anext(left)
        await left.aclose()
        texts = await asyncio.gather(*(answer(engine, prompt, 3) for prompt in PROMPTS))
        await asyncio.to_thread(engine.close)
        with pytest.raises(EngineError, match="was closed"):
            await closed
        return texts

    with closing(TransformersEngine(teacher, decoding=[SETTINGS])) as engine:
        texts = asyncio.run(run())
    assert texts == [list(prompt[:3]) for prompt in PROMPTS]
    check_rows_begin_and_end_once(echo, [*PROMPTS, (15, *long), (16, *long)])


needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"
)
CONFIG = SimpleNamespace(additional_config={"azeotrope_decoding": [SETTINGS]})


def params(**extra_args: Any) -> SimpleNamespace:
    """What a processor reads of vLLM's SamplingParams."""
    return SimpleNamespace(extra_args=extra_args, logprobs=None, temperature=1.0)


@needs_vllm
def test_the_processor_of_vllms_first_runner_shows_prompts_and_ends(echo: ModuleType) -> None:
    from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

    from actors.vllm_logits import V1Processor

    processor = V1Processor(CONFIG, torch.device("cpu"), False)
    written: list[list[int]] = [[], [], [], []]

    def step(*requests: int, **changes: Any) -> None:
        """One step of a batch with these requests in this order."""
        empty: dict[str, Any] = {"removed": [], "added": [], "moved": []}
        update = BatchUpdate(len(requests), **{**empty, **changes}) if changes else None
        processor.update_state(update)
        tokens = processor.apply(torch.zeros(len(requests), 32)).argmax(-1).tolist()
        for request, token in zip(requests, tokens, strict=True):
            written[request].append(token)

    def new(index: int, request: int) -> tuple[Any, ...]:
        return index, params(), list(PROMPTS[request]), written[request]

    step(0, 1, added=[new(0, 0), new(1, 1)])
    step(0, 1)
    assert written[1] == [8, END]
    # Request 1 ends, and request 2 takes its index, so vLLM does not list it as removed.
    step(0, 2, added=[new(1, 2)])
    step(2, 0, 3, added=[new(2, 3)], moved=[(0, 1, MoveDirectionality.SWAP)])
    assert written[0] == [5, 6, 7, END]
    step(2, 3, removed=[1], moved=[(2, 1, MoveDirectionality.UNIDIRECTIONAL)])
    step(3, removed=[0], moved=[(1, 0, MoveDirectionality.UNIDIRECTIONAL)])
    step(3)
    step(3)
    processor.update_state(BatchUpdate(0, removed=[0], added=[], moved=[]))
    assert written == [[*prompt, END] for prompt in PROMPTS]
    check_rows_begin_and_end_once(echo, PROMPTS)


@needs_vllm
def test_a_paused_row_of_vllms_first_runner_comes_back_with_its_completion(
    echo: ModuleType,
) -> None:
    from vllm.v1.sample.logits_processor import BatchUpdate

    from actors.vllm_logits import V1Processor

    processor = V1Processor(CONFIG, torch.device("cpu"), False)
    written = [5]
    for written_now in ([5], [5, 6]):
        written[:] = written_now
        added_row = (0, params(), [5, 6, 7], written)
        processor.update_state(BatchUpdate(1, removed=[], added=[added_row], moved=[]))
        adjusted = processor.apply(torch.zeros(1, 32))
        assert adjusted.argmax(-1).tolist() == [(5, 6, 7)[len(written)]]
        processor.update_state(BatchUpdate(0, removed=[0], added=[], moved=[]))
    kinds = [event[0] for event in echo.EVENTS if event[0] != "call"]
    assert kinds == ["add", "adjust", "drop"] * 2


class Slots:
    """The request states of vLLM's second runner: tokens by slot, on a device."""

    def __init__(self) -> None:
        self.tokens = torch.zeros(4, 32, dtype=torch.int32)
        self.lengths = torch.zeros(4, dtype=torch.int32)
        self.prompt_len = SimpleNamespace(np=self.lengths.numpy())
        self.all_token_ids = SimpleNamespace(gpu=self.tokens)
        self.slot_of: dict[str, int] = {}

    def add(self, request_id: str, slot: int, tokens: tuple[int, ...], prompt: int) -> None:
        self.slot_of[request_id] = slot
        self.tokens[slot, : len(tokens)] = torch.tensor(tokens)
        self.lengths[slot] = prompt

    def remove_request(self, request_id: str) -> int | None:
        return self.slot_of.pop(request_id, None)


@needs_vllm
def test_the_processor_of_vllms_second_runner_shows_prompts_and_ends(echo: ModuleType) -> None:
    from actors.vllm_logits import V2Processor
    from actors.vllm_worker import report_freed_slots

    slots = Slots()
    processor = V2Processor(CONFIG, slots)
    report_freed_slots(slots, processor)
    read = {}

    def begin(request_id: str, slot: int, prompt: tuple[int, ...]) -> None:
        assert processor.add_request(slot, params())
        # vLLM writes the prompt to the device after it has added the request.
        slots.add(request_id, slot, prompt, len(prompt))
        read[slot] = len(prompt)

    def step(*order: int) -> None:
        context = SimpleNamespace(
            idx_mapping_np=torch.tensor(order).numpy(),
            seq_lens_upper_bound_np=torch.tensor([read[slot] for slot in order]).numpy(),
        )
        tokens = processor.apply(torch.zeros(len(order), 32), context).argmax(-1).tolist()
        for slot, token in zip(order, tokens, strict=True):
            slots.tokens[slot, read[slot]] = token
            read[slot] += 1

    def completion(slot: int, prompt: tuple[int, ...]) -> list[int]:
        return slots.tokens[slot, len(prompt) : read[slot]].tolist()

    begin("a", 0, PROMPTS[0])
    begin("b", 3, PROMPTS[1])
    step(0, 3)
    step(3, 0)
    assert completion(3, PROMPTS[1]) == [8, END]
    assert slots.remove_request("b") == 3
    assert slots.remove_request("b") is None, "an unknown request is reported to nobody"
    begin("c", 3, PROMPTS[2])
    step(0, 3)
    step(0, 3)
    slots.remove_request("a")
    step(3)
    slots.remove_request("c")
    assert completion(0, PROMPTS[0]) == [*PROMPTS[0], END]
    assert completion(3, PROMPTS[2]) == [*PROMPTS[2], END]
    check_rows_begin_and_end_once(echo, PROMPTS[:3])
    # A preempted request comes back as a new one, with a part of its completion.
    echo.EVENTS.clear()
    assert processor.add_request(1, params())
    slots.add("d", 1, (*PROMPTS[3], 11, 12), len(PROMPTS[3]))
    read[1] = len(PROMPTS[3]) + 2
    step(1)
    assert completion(1, PROMPTS[3]) == [11, 12, 13]
    # Even without a report, a slot's next request drops the one before it.
    processor.add_request(1, params(azeotrope_strength=0.0))
    assert [event[0] for event in echo.EVENTS if event[0] != "call"] == ["add", "adjust", "drop"]
