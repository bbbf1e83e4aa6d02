"""A step of DOGe head training: stored features in chunks, against whole models and whole logits.

    python -m benchmarks.head_training --shape both

`cached` is what this project does: hidden states read back from Parquet, the loss of
`azeotrope.defenses.doge` in chunks of tokens, AdamW. `full` is the published way: teacher and
proxies run over the sequences in every step, the float32 logits of every position exist at once,
cross-entropy and KL are taken over the whole tensors, AdamW.

Both train the same head on the same sequences from the same start, so their losses must agree;
the run fails if they do not. Each variant is a process of its own, so that its peak of memory is
its own. Memory is what a step needs beyond weights, features and optimizer state: logits, what is
made of them, and the head's gradient.
"""

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from azeotrope.heads.head import ProxyHead
    from azeotrope.tokens import Example

# torch is imported inside the functions that children run: a child of a large process starts with
# its parent's peak of memory as its own.

ShapeName = Literal["pocket", "wide"]
Role = Literal["prepare", "cached", "full"]
TOLERANCE = 1e-4
LEARNING_RATE = 3e-3
STRENGTH = 0.3
SEED = 0
MB = 1 << 20


@dataclass(frozen=True)
class Shape:
    """What is compared, and how often; `interleave` needs both variants in memory at once."""

    name: ShapeName
    rows: int
    steps: int
    interleave: bool


SHAPES = {
    "pocket": Shape("pocket", rows=16, steps=15, interleave=True),
    "wide": Shape("wide", rows=8, steps=1, interleave=False),
}
WIDE_VOCAB = 151_936
WIDE_HIDDEN = 2048
WIDE_PROXY_HIDDEN = 1024
WIDE_LAYERS = 4
WIDE_PROMPT = 1
WIDE_ANSWER = 16
"""Completion tokens of each row of the wide shape that are no reasoning."""


# In the children ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Models:
    """A teacher, its proxies, and the proxies' heads cut to the shared tokens."""

    teacher: "PreTrainedModel"
    proxies: tuple["PreTrainedModel", ...]
    proxy_heads: tuple["ProxyHead", ...]
    to_proxy: tuple["Tensor | None", ...]


def pocket_models() -> Models:
    from azeotrope import models
    from azeotrope.heads.export import proxy_head_from
    from azeotrope.logits.vocabulary import share

    names = ("pocket/proxy-a", "pocket/proxy-b")
    teacher = models.load("pocket/teacher", device="cpu")
    proxies = [models.load(name, device="cpu") for name in names]
    heads = [proxy_head_from(p, teacher, name) for p, name in zip(proxies, names, strict=True)]
    shared = [share(teacher.tokenizer, proxy.tokenizer) for proxy in proxies]
    return Models(
        teacher.model,
        tuple(proxy.model for proxy in proxies),
        tuple(heads),
        tuple(None if item.is_identity else item.to_proxy for item in shared),
    )


def wide_models() -> Models:
    """Random weights: the arithmetic of a step does not depend on what they are."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from azeotrope.heads.head import ProxyHead
    from azeotrope.logits.vocabulary import SharedVocabulary

    def make(hidden: int, *, tied: bool) -> LlamaForCausalLM:
        config = LlamaConfig(
            vocab_size=WIDE_VOCAB,
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=WIDE_LAYERS,
            num_attention_heads=hidden // 128,
            num_key_value_heads=max(hidden // 512, 1),
            tie_word_embeddings=tied,
        )
        return LlamaForCausalLM(config).eval()

    torch.manual_seed(SEED)
    teacher = make(WIDE_HIDDEN, tied=False)
    proxy = make(WIDE_PROXY_HIDDEN, tied=True)
    every = torch.arange(WIDE_VOCAB)
    head = ProxyHead(proxy.lm_head.weight, None, SharedVocabulary(every, every, every))
    return Models(teacher, (proxy,), (head,), (None,))


def pocket_examples(rows: int) -> list["Example"]:
    """Traces that the pocket teacher writes."""
    from azeotrope import models
    from azeotrope.collect import collect
    from azeotrope.generation import Sampling
    from azeotrope.tasks import PocketConfig
    from azeotrope.tasks import build as build_task
    from azeotrope.tokens import Boundary, from_ids

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


def wide_examples(rows: int, tokens: int) -> list["Example"]:
    """Random token ids; the last few of each row count as the answer."""
    import torch

    from azeotrope.tokens import Example

    generator = torch.Generator().manual_seed(SEED)
    length = tokens // rows
    shape = (rows, WIDE_PROMPT + length)
    ids = torch.randint(WIDE_VOCAB, shape, generator=generator).tolist()
    reasoning = tuple(at < length - WIDE_ANSWER for at in range(length))
    return [
        Example(
            f"random/{number}",
            tuple(row[:WIDE_PROMPT]),
            tuple(row[WIDE_PROMPT:]),
            reasoning,
            tuple(not flag for flag in reasoning),
        )
        for number, row in enumerate(ids)
    ]


def prepare(shape: Shape, tokens: int, folder: Path) -> dict[str, Any]:
    """Write the sequences and everybody's features; the time is the one-off cost of the cache."""
    from azeotrope.heads.features import compute, write_features

    pocket = shape.name == "pocket"
    examples = pocket_examples(shape.rows) if pocket else wide_examples(shape.rows, tokens)
    plain = [[e.id, e.prompt, e.completion, e.reasoning, e.answer] for e in examples]
    (folder / "examples.json").write_text(json.dumps(plain))
    found = pocket_models() if pocket else wide_models()
    started = time.perf_counter()
    write_features(folder / "teacher" / "0.parquet", compute(found.teacher, examples))
    for number, (proxy, table) in enumerate(zip(found.proxies, found.to_proxy, strict=True)):
        features = compute(proxy, examples, to_model=table)
        write_features(folder / f"proxy-{number}" / "0.parquet", features)
    seconds = time.perf_counter() - started
    size = sum(path.stat().st_size for path in folder.glob("*/*.parquet"))
    return {
        "seconds": seconds,
        "bytes": size,
        "tokens": sum(len(example.completion) for example in examples),
        "positions": len(examples) * (max(len(example) for example in examples) - 1),
        "vocab": found.teacher.config.vocab_size,
        "proxies": len(found.proxies),
    }


def cached(shape: Shape, folder: Path) -> Callable[[int], float]:
    """One step from stored features; only the heads stay in memory."""
    import torch

    from azeotrope import models
    from azeotrope.defenses.doge import Config, Doge
    from azeotrope.heads.features import join, pair_up, read_features
    from azeotrope.heads.head import Head

    found = pocket_models() if shape.name == "pocket" else wide_models()
    layer = models.head_of(found.teacher)
    head, proxies, count = Head(layer.weight, layer.bias), found.proxy_heads, len(found.proxies)
    del found, layer
    wake_parquet()
    mark_memory()
    doge = Doge(Config(strength=STRENGTH))
    pairs = pair_up(
        read_features(folder / "teacher"),
        [read_features(folder / f"proxy-{number}") for number in range(count)],
    )
    optimizer = torch.optim.AdamW(head.parameters(), lr=LEARNING_RATE)

    def step(rows: int) -> float:
        total, tokens = doge.loss(head, proxies, join(pairs[:rows]))
        update(optimizer, tokens)
        return float(total) / tokens

    return step


def full(shape: Shape, folder: Path) -> Callable[[int], float]:
    """One step with whole models and whole tensors."""
    import torch
    import torch.nn.functional as F

    from azeotrope import models
    from azeotrope.defenses.doge import Config
    from azeotrope.tokens import Example, collate

    found = pocket_models() if shape.name == "pocket" else wide_models()
    models.untie(found.teacher)
    found.teacher.requires_grad_(False)
    layer = models.head_of(found.teacher).requires_grad_(True)
    examples = [Example(row[0], *map(tuple, row[1:])) for row in read_examples(folder)]
    temperature = Config().temperature
    mark_memory()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=LEARNING_RATE)

    def step(rows: int) -> float:
        batch = collate(examples[:rows], pad_id=0)
        labels = batch.targets.masked_fill(~batch.mask, -100).flatten()
        logits = found.teacher(input_ids=batch.input_ids, use_cache=False).logits.flatten(0, 1)
        ce = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
        kl = ce.new_zeros(())
        for proxy, head, table in zip(
            found.proxies, found.proxy_heads, found.to_proxy, strict=True
        ):
            ids = batch.input_ids if table is None else table[batch.input_ids]
            ours = logits if head.is_whole else logits[:, head.teacher_ids]
            with torch.no_grad():
                theirs = proxy(input_ids=ids, use_cache=False).logits.flatten(0, 1)
                # Holds for both shapes: teacher and proxies have the same rows in the same order.
                assert theirs.shape == ours.shape
                log_proxy = (theirs / temperature).log_softmax(-1)
                del theirs
            log_teacher = (ours / temperature).log_softmax(-1)
            each = F.kl_div(log_proxy, log_teacher, log_target=True, reduction="none").sum(-1)
            kl = kl + (each * batch.reasoning.flatten()).sum()
            del ours, log_proxy, log_teacher
        del logits
        loss = ce - STRENGTH * kl / len(found.proxies)
        loss.backward()
        tokens = int(batch.mask.sum())
        update(optimizer, tokens)
        return float(loss.detach()) / tokens

    return step


def wake_parquet() -> None:
    """Load what Parquet loads at its first use: tens of MB of code that are no features."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = pa.BufferOutputStream()
    pq.write_table(pa.table({"a": [1]}), buffer)
    pq.read_table(pa.BufferReader(buffer.getvalue()))


def read_examples(folder: Path) -> list[list[Any]]:
    return json.loads((folder / "examples.json").read_text())


def update(optimizer: Any, tokens: int) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad.div_(tokens)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


_loaded_bytes = 0


def mark_memory() -> None:
    """From here on memory counts. Linux forgets the peak of loading; elsewhere it is the mark."""
    global _loaded_bytes
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    _loaded_bytes = peak_bytes()


def peak_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def child(role: Role, shape: Shape, tokens: int, folder: Path) -> None:
    """Speak JSON lines: one when loaded, then one for each step of so many rows."""
    import torch

    torch.set_num_threads(1)
    if role == "prepare":
        print(json.dumps(prepare(shape, tokens, folder)), flush=True)
        return
    step = (cached if role == "cached" else full)(shape, folder)
    print(json.dumps({"loaded": _loaded_bytes}), flush=True)
    for number, line in enumerate(sys.stdin):
        started = time.perf_counter()
        loss = step(int(line))
        seconds = time.perf_counter() - started
        if number == 0:
            # The optimizer's state exists from the first step on, the same in both variants.
            mark_memory()
        peak = peak_bytes() - _loaded_bytes
        print(json.dumps({"loss": loss, "seconds": seconds, "peak": peak}), flush=True)


# In the parent ------------------------------------------------------------------------------


class Child:
    """A variant in a process of its own."""

    def __init__(self, role: Role, shape: Shape, tokens: int, folder: Path) -> None:
        arguments = ["--role", role, "--shape", shape.name, "--tokens", str(tokens)]
        one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__, *arguments, "--folder", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **one_thread},
        )
        self.name = f"{shape.name} {role}"
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.peak = 0

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        code = self.process.wait()
        memory = "; it was killed, most likely for want of memory" if code == -9 else ""
        raise SystemExit(f"{self.name} ended early with code {code}{memory}")

    def step(self, rows: int, *, counts: bool) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{rows}\n")
        self.process.stdin.flush()
        found = self.answer()
        self.losses.append(found["loss"])
        self.peak = found["peak"]
        if counts:
            self.seconds.append(found["seconds"])

    @property
    def milliseconds(self) -> float:
        return 1000 * statistics.median(self.seconds)

    def close(self) -> None:
        if self.process.stdin is not None:
            with suppress(BrokenPipeError):
                self.process.stdin.close()
        self.process.wait()


@contextmanager
def running(role: Role, shape: Shape, tokens: int, folder: Path) -> Iterator[Child]:
    one = Child(role, shape, tokens, folder)
    try:
        if role != "prepare":
            one.answer()
        yield one
    finally:
        one.close()


def compare(shape: Shape, steps: int, tokens: int) -> tuple[dict[str, Any], Child, Child]:
    """Run both variants: a first step that does not count, then `steps` that do.

    The first step is on one row: it wakes the libraries and makes the optimizer's state.
    """
    rows = [1] + [shape.rows] * steps
    with tempfile.TemporaryDirectory(prefix="azeotrope-bench-") as place:
        folder = Path(place)
        with running("prepare", shape, tokens, folder) as one:
            about = one.answer()
        if shape.interleave:
            # A machine that is busy for a moment slows both variants alike.
            with (
                running("cached", shape, tokens, folder) as ours,
                running("full", shape, tokens, folder) as theirs,
            ):
                for number, taken in enumerate(rows):
                    for one in (ours, theirs):
                        one.step(taken, counts=number > 0)
            return about, ours, theirs
        done: list[Child] = []
        for role in ("cached", "full"):
            with running(role, shape, tokens, folder) as one:
                for number, taken in enumerate(rows):
                    one.step(taken, counts=number > 0)
            done.append(one)
        return about, done[0], done[1]


def main() -> None:
    """Print one table over the shapes that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=[*SHAPES, "both"], default="both")
    parser.add_argument("--steps", type=int, help="steps that count (pocket 15, wide 1)")
    parser.add_argument("--tokens", type=int, default=2048, help="of the wide shape, a step")
    parser.add_argument("--role", choices=["prepare", "cached", "full"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.role:
        child(given.role, SHAPES[given.shape], given.tokens, given.folder)
        return
    table = Table(title="DOGe head training, one step on one thread")
    for column in (
        "shape",
        "tokens",
        "vocab",
        "ms cached",
        "ms full",
        "time x",
        "step MB cached",
        "step MB full",
        "memory x",
    ):
        table.add_column(column, justify="left" if column == "shape" else "right")
    notes: list[str] = []
    for shape in SHAPES.values() if given.shape == "both" else [SHAPES[given.shape]]:
        about, ours, theirs = compare(shape, given.steps or shape.steps, given.tokens)
        table.add_row(
            shape.name,
            f"{about['tokens']:,}",
            f"{about['vocab']:,}",
            f"{ours.milliseconds:,.1f}",
            f"{theirs.milliseconds:,.1f}",
            f"{theirs.milliseconds / ours.milliseconds:.1f}",
            f"{ours.peak / MB:,.0f}",
            f"{theirs.peak / MB:,.0f}",
            f"{theirs.peak / ours.peak:.1f}",
        )
        notes += describe(shape, about, ours, theirs)
        check(shape, ours, theirs)
    console = Console(width=None if sys.stdout.isatty() else 110)
    console.print(table)
    for note in notes:
        console.print(note, highlight=False)


def describe(shape: Shape, about: dict[str, Any], ours: Child, theirs: Child) -> list[str]:
    saved = (theirs.milliseconds - ours.milliseconds) / 1000
    return [
        f"{shape.name}: {about['positions']:,} positions with prompts and padding, "
        f"proxies: {about['proxies']}; median of {len(ours.seconds)} steps, one row to warm up",
        f"{shape.name}: the cache costs {about['seconds']:.2f} s once and "
        f"{about['bytes'] / MB:.1f} MB of disk"
        + (f"; earned back in {math.ceil(about['seconds'] / saved)} steps" if saved > 0 else ""),
        f"{shape.name}: nats a token, first step {ours.losses[0]:.6f} cached and "
        f"{theirs.losses[0]:.6f} full, last step {ours.losses[-1]:.6f} and "
        f"{theirs.losses[-1]:.6f}",
    ]


def check(shape: Shape, ours: Child, theirs: Child) -> None:
    """Both variants must have computed the same thing, the update of the head included."""
    for number, pair in enumerate(zip(ours.losses, theirs.losses, strict=True)):
        if not math.isclose(*pair, rel_tol=TOLERANCE):
            raise SystemExit(
                f"{shape.name}: step {number} has the loss {pair[0]} cached and {pair[1]} full; "
                "the two variants do not compute the same thing"
            )


if __name__ == "__main__":
    main()
