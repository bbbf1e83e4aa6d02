"""Decoding with proxies: equal in every engine, on the reasoning alone, as the equations say."""

from pathlib import Path

import pytest
import torch

from azeotrope import models
from azeotrope.config import ConfigError
from azeotrope.decoding import DecodingRow
from azeotrope.defenses import base as defenses
from azeotrope.engine.row_batch import BatchRow, RowBatch
from azeotrope.generation import Sampling, generate, uniforms
from azeotrope.proxies.prepared import ProxyPreparation, load_prepared, prepare
from azeotrope.tasks import PocketConfig
from azeotrope.tasks import build as build_task
from azeotrope.tokens import Boundary, encode_prompt
from azeotrope.traces import example_of, ground_truth

PROXY, COUNT, NEW = "pocket/small", 12, 40
SETTINGS = ProxyPreparation(most_excess=50.0)


@pytest.fixture(scope="module")
def teacher() -> models.Loaded:
    return models.load("pocket/teacher")


@pytest.fixture(scope="module")
def task():
    return build_task(PocketConfig())


@pytest.fixture(scope="module")
def examples(teacher, task):
    texts = ground_truth(task, task.problems("validation", 16))
    return [example_of(text, teacher.tokenizer, task, Boundary(), 160) for text in texts]


@pytest.fixture(scope="module")
def prepared(teacher, examples, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("proxy")
    prepare(PROXY, teacher, examples, folder, SETTINGS)
    return str(folder)


@pytest.fixture(scope="module")
def prompts(teacher, task) -> list[tuple[int, ...]]:
    problems = task.problems("validation", COUNT)
    return [encode_prompt(teacher.tokenizer, task.messages(p.question)) for p in problems]


def defense(prepared: str, name: str, **settings) -> defenses.Defense:
    return defenses.resolve({"name": name, "prepared": [prepared], **settings})


def written(teacher, prompts, temperature: float, hooks) -> list[tuple[int, ...]]:
    tokenizer = teacher.tokenizer
    completions = generate(
        teacher.model,
        prompts,
        Sampling(temperature=temperature, max_new_tokens=NEW),
        end_ids=(tokenizer.eos_token_id,),
        pad_id=tokenizer.pad_token_id,
        seeds=list(range(len(prompts))),
        hooks=hooks,
    )
    return [completion.ids for completion in completions]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", ["ads", "poe"])
def test_rows_that_join_one_by_one_write_what_one_batch_writes(
    teacher, prompts, prepared: str, name: str, temperature: float
) -> None:
    tokenizer = teacher.tokenizer
    expected = written(teacher, prompts, temperature, [defense(prepared, name)])
    assert expected != written(teacher, prompts, temperature, [])
    hooks = (defense(prepared, name),)
    batch = RowBatch(
        teacher.model, end_ids=(tokenizer.eos_token_id,), pad_id=tokenizer.pad_token_id
    )
    rows = [
        BatchRow(
            prompt,
            hooks,
            limit=NEW,
            temperature=temperature,
            draws=uniforms(seed, NEW).tolist(),
        )
        for seed, prompt in enumerate(prompts)
    ]
    waiting = list(rows)
    while not all(row.is_done for row in rows):
        batch.step([waiting.pop(0)] if waiting else [])
    ends = [(tokenizer.eos_token_id,) if row.finish == "stop" else () for row in rows]
    assert [(*row.written, *end) for row, end in zip(rows, ends, strict=True)] == expected


def test_strength_0_is_the_teacher(teacher, prompts, prepared: str) -> None:
    for name in ("ads", "poe", "temperature"):
        settings = {} if name == "temperature" else {"prepared": [prepared]}
        hooks = [defenses.resolve({"name": name, "strength": 0.0, **settings})]
        assert written(teacher, prompts, 1.0, hooks) == written(teacher, prompts, 1.0, [])


@torch.no_grad()
def test_the_product_is_the_equation(teacher, prompts, prepared: str) -> None:
    row = DecodingRow(prompts[0])
    proxy = load_prepared(prepared, "cpu").loaded.model
    ids = torch.tensor([row.prompt])
    z_t, z_s = teacher.model(input_ids=ids).logits[:, -1], proxy(input_ids=ids).logits[:, -1]
    adjusted = defense(prepared, "poe", strength=0.4).adjust_rows(z_t, [row])
    tokens = min(z_t.shape[-1], z_s.shape[-1])
    expected = (0.6 * z_t[:, :tokens] + 0.4 * z_s[:, :tokens]).softmax(-1)
    assert torch.allclose(adjusted.softmax(-1)[:, :tokens], expected, atol=1e-5)


@torch.no_grad()
def test_the_strength_acts_after_the_temperature(teacher, prompts, prepared: str) -> None:
    z = teacher.model(input_ids=torch.tensor([prompts[0]])).logits[:, -1]
    shifts = {}
    for temperature in (0.0, 0.25, 1.0, 2.0):
        row = DecodingRow(prompts[0], temperature=temperature)
        moved = defense(prepared, "ads", strength=0.5).adjust_rows(z, [row]) - z
        shifts[temperature] = moved / max(temperature, 0.5)
    for shift in shifts.values():
        assert torch.allclose(shift, shifts[1.0], atol=1e-4)


def test_the_answer_is_the_teachers_own(teacher, prompts, prepared: str) -> None:
    """Strong enough to ruin the reasoning, it still leaves the answer's tokens alone."""
    close = Boundary().close_tag
    row = DecodingRow(prompts[0])
    row.written += teacher.tokenizer(f"at first {close} ####", add_special_tokens=False)[
        "input_ids"
    ]
    logits = torch.zeros(1, teacher.model.config.vocab_size)
    assert torch.equal(defense(prepared, "ads", strength=9.0).adjust_rows(logits, [row]), logits)
    everywhere = defense(prepared, "ads", strength=9.0, span="all")
    assert not torch.equal(everywhere.adjust_rows(logits, [row]), logits)


def test_least_raises_a_token_only_as_far_as_every_proxy_suffers(
    teacher, examples, prompts, prepared: str, tmp_path: Path
) -> None:
    prepare("pocket/proxy-a", teacher, examples, tmp_path, SETTINGS)
    both = {"name": "ads", "prepared": [prepared, str(tmp_path)]}
    z = torch.zeros(1, teacher.model.config.vocab_size)
    single = [
        defenses.resolve({"name": "ads", "prepared": [folder]}).adjust_rows(
            z, [DecodingRow(prompts[0])]
        )
        for folder in (prepared, str(tmp_path))
    ]
    least = defenses.resolve({**both, "combine": "least"}).adjust_rows(z, [DecodingRow(prompts[0])])
    mean = defenses.resolve(both).adjust_rows(z, [DecodingRow(prompts[0])])
    assert torch.allclose(least, torch.stack(single).amin(0), atol=1e-5)
    assert torch.allclose(mean, torch.stack(single).mean(0), atol=1e-5)


def test_what_cannot_be_used_is_refused_with_the_way_out(
    teacher, examples, prompts, prepared: str, tmp_path: Path
) -> None:
    z, row = torch.zeros(1, teacher.model.config.vocab_size), DecodingRow(prompts[0])
    with pytest.raises(ValueError, match="ads has no prepared proxies; run it through"):
        defenses.resolve({"name": "ads"}).adjust_rows(z, [row])
    with pytest.raises(FileNotFoundError, match="no prepared proxy at"):
        defense(str(tmp_path), "ads").adjust_rows(z, [row])
    with pytest.raises(ValueError, match=r"nats per token .* Teach it first"):
        prepare(PROXY, teacher, examples, tmp_path, ProxyPreparation(most_excess=1e-3))
    with pytest.raises(ValueError, match=r"epsilon 5: .* the best step found is epsilon 0"):
        prepare(PROXY, teacher, examples, tmp_path, SETTINGS.model_copy(update={"epsilon": 5.0}))
    with pytest.raises(ConfigError, match="strength"):
        defenses.resolve({"name": "poe", "strength": 1.0})
    prepare(PROXY, teacher, examples, tmp_path, SETTINGS, with_direction=False)
    with pytest.raises(ValueError, match="without a direction"):
        defense(str(tmp_path), "ads").adjust_rows(z, [row])
