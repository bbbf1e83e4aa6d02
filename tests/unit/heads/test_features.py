"""Stored hidden states are what the model computes, and training cannot tell the difference."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from azeotrope import models, tasks
from azeotrope.collect import collect
from azeotrope.defenses.doge import Config, Doge
from azeotrope.generation import Sampling
from azeotrope.heads.export import head_from, proxy_head_from
from azeotrope.heads.features import (
    FeatureBatch,
    FeaturePair,
    Features,
    blocks_of,
    compute,
    join,
    pair_up,
    read_features,
    write_features,
)
from azeotrope.logits.chunks import head_logits
from azeotrope.tokens import Boundary, Example, collate, from_ids
from azeotrope.traces import Trace
from azeotrope.training import FitConfig, TokenSum, fit


@pytest.fixture(scope="module")
def teacher() -> models.Loaded:
    return models.load("pocket/teacher", device="cpu")


@pytest.fixture(scope="module")
def proxies() -> list[models.Loaded]:
    return [models.load(f"pocket/{name}", device="cpu") for name in ("proxy-a", "proxy-b")]


@pytest.fixture(scope="module")
def traces(teacher: models.Loaded) -> list[Trace]:
    task = tasks.build(tasks.PocketConfig())
    return collect(teacher, task, task.problems("train", 12), Sampling(temperature=0.0))


@pytest.fixture(scope="module")
def examples(teacher: models.Loaded, traces: list[Trace]) -> list[Example]:
    return [
        from_ids(
            teacher.tokenizer, trace.prompt_ids, trace.completion_ids,
            boundary=Boundary(), max_length=160, id=trace.id,
        )
        for trace in traces
    ]  # fmt: skip


def test_training_from_files_equals_running_the_models_at_every_step(
    teacher: models.Loaded,
    proxies: list[models.Loaded],
    examples: list[Example],
    tmp_path: Path,
) -> None:
    config = FitConfig(steps=10, batch_size=4, learning_rate=3e-3, log_every=1)
    frozen = tuple(proxy_head_from(proxy, teacher, "proxy") for proxy in proxies)
    for number, model in enumerate((teacher, *proxies)):
        computed = compute(model.model, examples, batch_size=5)
        # Several files to a folder, as several workers write them.
        write_features(tmp_path / str(number) / "part-0.parquet", computed[:7])
        write_features(tmp_path / str(number) / "part-1.parquet", computed[7:])
    stored = [read_features(tmp_path / str(number)) for number in range(3)]
    pairs = pair_up(stored[0], stored[1:])
    vocab = len(models.head_of(teacher.model).weight)
    # A few tokens a chunk from the files; the whole batch at once beside it.
    chunked, whole = Doge(Config(strength=0.05), budget=13 * vocab), Doge(Config(strength=0.05))
    cached, direct = head_from(teacher), head_from(teacher)

    def afresh(items: list[Example]) -> TokenSum:
        batch = collate(items, pad_id=0)
        with torch.no_grad():
            ours, *theirs = (
                model.model(input_ids=batch.input_ids, output_hidden_states=True).hidden_states[-1]
                for model in (teacher, *proxies)
            )
        mask = batch.mask
        joined = FeatureBatch(
            batch.ids,
            batch.targets[mask],
            batch.reasoning[mask],
            ours[mask],
            tuple(states[mask] for states in theirs),
        )
        return whole.loss(direct, frozen, joined)

    first = fit(
        list(cached.parameters()),
        pairs,
        lambda items: chunked.loss(cached, frozen, join(items)),
        config,
    )
    second = fit(list(direct.parameters()), examples, afresh, config)
    assert first.tokens == second.tokens
    for one_entry, other_entry in zip(first.log, second.log, strict=True):
        assert one_entry.loss == pytest.approx(other_entry.loss, abs=1e-6)
    assert first.log[-1].loss != pytest.approx(first.log[0].loss, abs=1e-3)
    moved = (cached.weight - models.head_of(teacher.model).weight).abs().max()
    assert moved > 1e-3
    torch.testing.assert_close(cached.weight, direct.weight, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_read_is_what_was_written_bit_for_bit(
    examples: list[Example], dtype: torch.dtype, tmp_path: Path
) -> None:
    model = models.load("pocket/teacher", dtype=dtype, device="cpu").model
    written = compute(model, examples[:5], batch_size=2)
    write_features(tmp_path / "features.parquet", written)
    read = read_features(tmp_path)
    assert [item.id for item in read] == [example.id for example in examples[:5]]
    for before, after in zip(written, read, strict=True):
        assert after.hidden.dtype == dtype
        assert torch.equal(before.hidden, after.hidden)
        for name in ("targets", "reasoning", "answer"):
            assert torch.equal(getattr(before, name), getattr(after, name))


@torch.no_grad()
def test_a_greedy_trace_is_its_own_argmax(
    teacher: models.Loaded, traces: list[Trace], examples: list[Example]
) -> None:
    layer = models.head_of(teacher.model)
    for item, trace in zip(compute(teacher.model, examples), traces, strict=True):
        chosen = head_logits(item.hidden, layer.weight, layer.bias).argmax(-1)
        assert chosen.tolist() == list(trace.completion_ids)
        assert item.targets.tolist() == list(trace.completion_ids)


def test_a_proxy_reads_its_own_ids_and_keeps_the_teachers_targets(
    proxies: list[models.Loaded], examples: list[Example]
) -> None:
    vocab = proxies[0].model.config.vocab_size
    shifted = torch.arange(vocab).roll(1)
    plain = compute(proxies[0].model, examples[:2])
    shifted_model = models.load("pocket/proxy-a", device="cpu").model
    embedding = shifted_model.get_input_embeddings()
    with torch.no_grad():
        embedding.weight[shifted] = embedding.weight.clone()
    computed = compute(shifted_model, examples[:2], to_model=shifted)
    for one, two in zip(plain, computed, strict=True):
        assert torch.equal(one.targets, two.targets)
        assert torch.equal(one.hidden, two.hidden)


def simple(identity: str, tokens: int) -> Features:
    flags = torch.zeros(tokens, dtype=torch.bool)
    return Features(identity, torch.arange(tokens), flags, flags, torch.ones(tokens, 2))


def test_pairs_are_made_by_id_whatever_the_order() -> None:
    ours = [simple("a", 2), simple("b", 3)]
    theirs = [
        replace(simple("b", 3), hidden=torch.full((3, 2), 7.0)),
        replace(simple("a", 2), hidden=torch.full((2, 2), 5.0)),
    ]
    pairs = pair_up(ours, [theirs])
    assert [pair.teacher.id for pair in pairs] == [pair.proxies[0].id for pair in pairs]
    assert join(pairs).proxies[0][:, 0].tolist() == [5, 5, 7, 7, 7]
    assert join(pairs).targets.tolist() == [0, 1, 0, 1, 2]


@pytest.mark.parametrize("misfit", [simple("b", 2), simple("a", 3)], ids=["missing", "longer"])
def test_features_of_other_traces_do_not_pair(misfit: Features) -> None:
    with pytest.raises(ValueError, match="proxy 1 has no features that fit trace a"):
        pair_up([simple("a", 2)], [[simple("a", 2)], [misfit]])


def test_an_empty_folder_is_not_taken_for_no_features(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected Parquet files"):
        read_features(tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("block", [0, 2, 3, 4, 9])
def test_what_enters_a_block_is_stored_for_every_token(
    teacher: models.Loaded, examples: list[Example], block: int
) -> None:
    chosen = examples[:5]
    batch = collate(chosen, pad_id=0)
    run = teacher.model(input_ids=batch.input_ids, output_hidden_states=True)
    # With the number of all blocks, or more, what leaves the trunk.
    expected = run.hidden_states[min(block, 4)]
    computed = compute(teacher.model, chosen, before_block=block, batch_size=2)
    for row, (item, example) in enumerate(zip(computed, chosen, strict=True)):
        assert item.hidden.shape[0] == len(example) - 1
        torch.testing.assert_close(item.hidden, expected[row, : len(example) - 1])
        assert item.targets.tolist() == list(example.completion)
    assert not any(layer._forward_pre_hooks for layer in blocks_of(teacher.model))


def test_a_trunk_without_a_list_of_blocks_is_refused(examples: list[Example]) -> None:
    config = GPT2Config(
        n_layer=1, n_head=1, n_embd=8, vocab_size=129, bos_token_id=1, eos_token_id=2
    )
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no list `layers` of blocks"):
        compute(GPT2LMHeadModel(config), examples[:1], before_block=0)


def test_whose_texts_they_are_is_stored(examples: list[Example], tmp_path: Path) -> None:
    model = models.load("pocket/proxy-a", device="cpu").model
    computed = [*compute(model, examples[:2]), *compute(model, examples[2:3], own=False)]
    write_features(tmp_path / "features.parquet", computed)
    assert [item.own for item in read_features(tmp_path)] == [True, True, False]


def test_a_batch_is_split_by_whose_texts_they_are() -> None:
    pairs = []
    for number, own in enumerate([True, False, False, True]):
        ours = replace(simple(str(number), number + 1), own=own)
        # A proxy has a row for each token of the prompt too.
        rows = torch.full((number + 3, 4), float(number))
        pairs.append(FeaturePair(ours, (replace(ours, hidden=rows),)))
    batch = join(pairs)
    assert batch.counts == (1, 2, 3, 4)
    assert batch.rows == ((3, 4, 5, 6),)
    theirs = batch.only(own=False)
    assert (theirs.ids, theirs.counts, theirs.rows) == (("1", "2"), (2, 3), ((4, 5),))
    assert theirs.targets.tolist() == [0, 1, 0, 1, 2]
    assert theirs.teacher.shape == (5, 2)
    assert theirs.proxies[0][:, 0].tolist() == [1.0] * 4 + [2.0] * 5
    ours = batch.only(own=True)
    assert (ours.ids, ours.own) == (("0", "3"), (True, True))
    nothing = ours.only(own=False)
    assert (nothing.ids, len(nothing.targets), nothing.proxies[0].shape) == ((), 0, (0, 4))
    moved = batch.to("cpu")
    assert (moved.counts, moved.rows, moved.own) == (batch.counts, batch.rows, batch.own)
