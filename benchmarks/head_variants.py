"""The two variants of a step of DOGe head training, as they run in processes of their own.

`cached` reads stored features; `full` runs whole models on whole sequences.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from azeotrope import models
from azeotrope.collect import collect
from azeotrope.defenses.doge import Config, Doge
from azeotrope.generation import Sampling
from azeotrope.heads.export import proxy_head_from
from azeotrope.heads.features import compute, join, pair_up, read_features, write_features
from azeotrope.heads.head import Head, ProxyHead
from azeotrope.logits.vocabulary import SharedVocabulary, share
from azeotrope.tasks import PocketConfig
from azeotrope.tasks import build as build_task
from azeotrope.tokens import Boundary, Example, collate, from_ids
from benchmarks.head_shapes import RandomModels, Shape

Step = Callable[[int], dict[str, Any]]
"""Takes the number of rows to train on."""

LEARNING_RATE = 3e-3
STRENGTH = 0.3
SEED = 0
PROMPT = 1
ANSWER = 16
"""Prompt tokens, and completion tokens that are no reasoning, of each row of random ids."""
EXAMPLES = "examples.json"


@dataclass(frozen=True)
class TeacherAndProxies:
    """A teacher, its proxies, and the proxies' heads cut to the shared tokens."""

    teacher: PreTrainedModel
    proxies: tuple[PreTrainedModel, ...]
    proxy_heads: tuple[ProxyHead, ...]
    to_proxy: tuple[Tensor | None, ...]
    """Each proxy's id for every id of the teacher; None if they are the same."""


def load_models(shape: Shape) -> TeacherAndProxies:
    return _pocket_models() if shape.random is None else _random_models(shape.random)


def _pocket_models() -> TeacherAndProxies:
    names = ("pocket/proxy-a", "pocket/proxy-b")
    teacher = models.load("pocket/teacher", device="cpu")
    proxies = [models.load(name, device="cpu") for name in names]
    heads = [proxy_head_from(p, teacher, name) for p, name in zip(proxies, names, strict=True)]
    vocabularies = [share(teacher.tokenizer, proxy.tokenizer) for proxy in proxies]
    return TeacherAndProxies(
        teacher.model,
        tuple(proxy.model for proxy in proxies),
        tuple(heads),
        tuple(None if shared.is_identity else shared.to_proxy for shared in vocabularies),
    )


def _random_models(sizes: RandomModels) -> TeacherAndProxies:
    """Random weights: the arithmetic of a step does not depend on what they are."""

    def make(hidden: int, *, tied: bool) -> LlamaForCausalLM:
        config = LlamaConfig(
            vocab_size=sizes.vocab,
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=sizes.layers,
            num_attention_heads=hidden // 128,
            num_key_value_heads=max(hidden // 512, 1),
            tie_word_embeddings=tied,
        )
        return LlamaForCausalLM(config).eval()

    torch.manual_seed(SEED)
    teacher = make(sizes.hidden, tied=False)
    proxy = make(sizes.proxy_hidden, tied=True)
    ids = torch.arange(sizes.vocab)
    head = ProxyHead(proxy.lm_head.weight, None, SharedVocabulary(ids, ids, ids))
    return TeacherAndProxies(teacher, (proxy,), (head,), (None,))


def make_examples(shape: Shape, tokens: int) -> list[Example]:
    if shape.random is None:
        return _pocket_examples(shape.rows)
    return _random_examples(shape.rows, tokens, shape.random.vocab)


def _pocket_examples(rows: int) -> list[Example]:
    """Traces that the pocket teacher writes."""
    teacher = models.load("pocket/teacher", device="cpu")
    task = build_task(PocketConfig())
    traces = collect(teacher, task, task.problems("train", rows), Sampling())
    return [
        from_ids(
            teacher.tokenizer,
            trace.prompt_ids,
            trace.completion_ids,
            boundary=Boundary(),
            max_length=256,
            id=trace.id,
        )
        for trace in traces
    ]


def _random_examples(rows: int, tokens: int, vocab: int) -> list[Example]:
    """Random token ids; the last few of each row count as the answer."""
    generator = torch.Generator().manual_seed(SEED)
    length = tokens // rows
    ids = torch.randint(vocab, (rows, PROMPT + length), generator=generator).tolist()
    reasoning = tuple(position < length - ANSWER for position in range(length))
    answer = tuple(not flag for flag in reasoning)
    return [
        Example(f"random/{number}", tuple(row[:PROMPT]), tuple(row[PROMPT:]), reasoning, answer)
        for number, row in enumerate(ids)
    ]


def prepare(shape: Shape, tokens: int, folder: Path) -> dict[str, Any]:
    """Write the sequences and the features of all models; the time is what the cache costs once."""
    examples = make_examples(shape, tokens)
    plain = [[e.id, e.prompt, e.completion, e.reasoning, e.answer] for e in examples]
    (folder / EXAMPLES).write_text(json.dumps(plain))
    loaded = load_models(shape)
    started = time.perf_counter()
    write_features(folder / "teacher" / "0.parquet", compute(loaded.teacher, examples))
    for number, (proxy, table) in enumerate(zip(loaded.proxies, loaded.to_proxy, strict=True)):
        features = compute(proxy, examples, to_model=table)
        write_features(folder / f"proxy-{number}" / "0.parquet", features)
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "bytes": sum(path.stat().st_size for path in folder.glob("*/*.parquet")),
        "tokens": sum(len(example.completion) for example in examples),
        "positions": len(examples) * (max(len(example) for example in examples) - 1),
        "vocab": loaded.teacher.config.vocab_size,
        "proxies": len(loaded.proxies),
    }


def cached(shape: Shape, folder: Path) -> Step:
    """One step from stored features; only the heads stay in memory."""
    loaded = load_models(shape)
    layer = models.head_of(loaded.teacher)
    head, proxies, count = Head(layer.weight, layer.bias), loaded.proxy_heads, len(loaded.proxies)
    del loaded, layer
    _wake_parquet()
    doge = Doge(Config(strength=STRENGTH))
    pairs = pair_up(
        read_features(folder / "teacher"),
        [read_features(folder / f"proxy-{number}") for number in range(count)],
    )
    optimizer = torch.optim.AdamW(head.parameters(), lr=LEARNING_RATE)

    def step(rows: int) -> dict[str, Any]:
        loss = doge.loss(head, proxies, join(pairs[:rows]))
        _update(optimizer, loss.count)
        return {"loss": float(loss.total) / loss.count}

    return step


def full(shape: Shape, folder: Path) -> Step:
    """One step with whole models and whole tensors."""
    loaded = load_models(shape)
    models.untie(loaded.teacher)
    loaded.teacher.requires_grad_(False)
    layer = models.head_of(loaded.teacher).requires_grad_(True)
    plain = json.loads((folder / EXAMPLES).read_text())
    examples = [Example(row[0], *map(tuple, row[1:])) for row in plain]
    optimizer = torch.optim.AdamW(layer.parameters(), lr=LEARNING_RATE)

    def step(rows: int) -> dict[str, Any]:
        batch = collate(examples[:rows], pad_id=0)
        labels = batch.targets.masked_fill(~batch.mask, -100).flatten()
        logits = loaded.teacher(input_ids=batch.input_ids, use_cache=False).logits.flatten(0, 1)
        ce = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
        kl = ce.new_zeros(())
        for proxy, head, table in zip(
            loaded.proxies, loaded.proxy_heads, loaded.to_proxy, strict=True
        ):
            ids = batch.input_ids if table is None else table[batch.input_ids]
            shared = logits if head.is_whole else logits[:, head.teacher_ids]
            kl = kl + (_full_kl(shared, proxy, ids) * batch.reasoning.flatten()).sum()
            del shared
        del logits
        loss = ce - STRENGTH * kl / len(loaded.proxies)
        loss.backward()
        tokens = int(batch.mask.sum())
        _update(optimizer, tokens)
        return {"loss": float(loss.detach()) / tokens}

    return step


def _full_kl(logits: Tensor, proxy: PreTrainedModel, ids: Tensor) -> Tensor:
    """KL of teacher and proxy at every position, prompts and padding included."""
    temperature = Config().temperature
    with torch.no_grad():
        proxy_logits = proxy(input_ids=ids, use_cache=False).logits.flatten(0, 1)
        # Holds for all shapes: teacher and proxies have the same rows in the same order.
        assert proxy_logits.shape == logits.shape
        log_proxy = (proxy_logits / temperature).log_softmax(-1)
        del proxy_logits
    log_teacher = (logits / temperature).log_softmax(-1)
    return F.kl_div(log_proxy, log_teacher, log_target=True, reduction="none").sum(-1)


def _wake_parquet() -> None:
    """Load what Parquet loads at its first use: tens of MB of code, which are no features."""
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.table({"a": [1]}), buffer)
    pq.read_table(pa.BufferReader(buffer.getvalue()))


def _update(optimizer: torch.optim.Optimizer, tokens: int) -> None:
    """One step of the optimizer on the mean over tokens."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad.div_(tokens)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
