"""A step of CMI: the closed form of the cosine's gradient, against double backward.

    python -m benchmarks.cmi_step
    python -m benchmarks.cmi_step --shape pocket --steps 3

Both compute the gradient of the cosine between what a surrogate learns from clean and from defended
forward KL, with respect to the same matrix, on the same texts. The gradients must agree to 1e-4 of
their norm; the run fails if they do not. Each variant is a process of its own, so that its peak of
memory is its own; memory is what a step needs beyond models and inputs. Steps of the two take
turns.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

# torch is imported inside the functions that children run: a child of a large process starts with
# its parent's peak of memory as its own.

TOLERANCE = 1e-4
MB = 1 << 20
METHODS = ("closed_form", "double_backward")


@dataclass(frozen=True)
class Shape:
    """A teacher's head and a surrogate: two blocks of which the last is watched."""

    name: str
    vocab: int
    hidden: int
    surrogate: int
    texts: int
    length: int
    rank: int
    steps: int


SHAPES = (
    Shape("pocket", 129, 160, 96, texts=16, length=64, rank=32, steps=10),
    Shape("wide", 49_152, 576, 576, texts=4, length=192, rank=32, steps=2),
)


def setup(shape: Shape, method: str) -> Any:
    """A function that takes one step and returns the cosine and the gradient's two factors."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from azeotrope.defenses.cmi import Cmi, Config, LowRankHead
    from azeotrope.heads.features import FeatureBatch
    from azeotrope.heads.head import Head
    from azeotrope.heads.surrogate import Surrogate
    from azeotrope.models import Loaded

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.surrogate,
        intermediate_size=2 * shape.surrogate,
        num_hidden_layers=2,
        num_attention_heads=shape.surrogate // 32,
        num_key_value_heads=shape.surrogate // 32,
        tie_word_embeddings=False,
    )
    surrogate = Surrogate(Loaded(LlamaForCausalLM(config), None), "last", shape.vocab)  # type: ignore[arg-type]
    plain = Head(torch.randn(shape.vocab, shape.hidden) * 0.1)
    settings = Config(rank=shape.rank, layer="last", method=method, cosine_on="both")  # type: ignore[arg-type]
    defense = Cmi(settings)
    head = LowRankHead(plain, plain, settings, shape.vocab)
    with torch.no_grad():
        # Away from the start, where the cosine is 1 and its gradient 0.
        head.up.normal_(std=0.02)
    tokens = shape.texts * shape.length
    batch = FeatureBatch(
        tuple(f"text {number}" for number in range(shape.texts)),
        torch.randint(shape.vocab, (tokens,)),
        torch.ones(tokens, dtype=torch.bool),
        torch.randn(tokens, shape.hidden),
        (torch.randn(tokens, shape.surrogate),),
        (shape.length,) * shape.texts,
        ((shape.length,) * shape.texts,),
        (False,) * shape.texts,
    )

    def step() -> tuple[float, list[float]]:
        head.zero_grad(set_to_none=True)
        cosine = defense.turn(head, (surrogate,), batch, 1.0)
        gradient = torch.cat([head.up.grad.flatten(), head.down.grad.flatten()])  # type: ignore[union-attr]
        # Enough of it to compare: all of a small one, evenly spaced entries of a large one.
        sample = gradient[:: max(1, len(gradient) // 20_000)]
        return cosine, [float(gradient.norm()), *sample.tolist()]

    return step


def child(shape: Shape, method: str) -> None:
    """One step for each line that comes in, one line of JSON for each step."""
    step = setup(shape, method)
    with suppress(OSError):
        # Linux forgets the peak of setting up; elsewhere it is part of both figures.
        Path("/proc/self/clear_refs").write_text("5")
    loaded = peak_bytes()
    for _ in sys.stdin:
        started = time.perf_counter()
        cosine, gradient = step()
        found = {"seconds": time.perf_counter() - started, "cosine": cosine, "gradient": gradient}
        print(json.dumps({**found, "peak": peak_bytes() - loaded}), flush=True)


def peak_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def compare(shape: Shape, steps: int) -> dict[str, dict[str, Any]]:
    """Both variants, turn by turn; the first step of each warms up and is not timed."""
    children = {
        method: subprocess.Popen(
            [sys.executable, "-m", __spec__.name, "--child", shape.name, method],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for method in METHODS
    }
    found: dict[str, list[dict[str, Any]]] = {method: [] for method in METHODS}
    for _ in range(steps + 1):
        for method, process in children.items():
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write("step\n")
            process.stdin.flush()
            found[method].append(json.loads(process.stdout.readline()))
    for process in children.values():
        process.communicate()
    return {
        method: {
            **taken[-1],
            "seconds": statistics.median(step["seconds"] for step in taken[1:]),
        }
        for method, taken in found.items()
    }


def difference(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """Distance of the two gradients over the norm of one, on the entries that were kept."""
    pairs = list(zip(ours["gradient"][1:], theirs["gradient"][1:], strict=True))
    apart = sum((one - other) ** 2 for one, other in pairs) ** 0.5
    return apart / max(sum(other**2 for _, other in pairs) ** 0.5, 1e-30)


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {number}")
    return number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [*(shape.name for shape in SHAPES), "both"]
    parser.add_argument("--shape", choices=names, default="both")
    parser.add_argument("--steps", type=_positive, help="steps that count (pocket 10, wide 2)")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        name, method = given.child
        child(next(shape for shape in SHAPES if shape.name == name), method)
        return
    table = Table("shape", "tokens", "vocabulary", "ms closed form", "ms double backward")
    for name in ("time", "MB closed form", "MB double backward", "memory", "gradients differ by"):
        table.add_column(name)
    for shape in SHAPES:
        if given.shape not in (shape.name, "both"):
            continue
        found = compare(shape, given.steps or shape.steps)
        ours, theirs = (found[method] for method in METHODS)
        apart = difference(ours, theirs)
        table.add_row(
            shape.name,
            f"{shape.texts * shape.length:,}",
            f"{shape.vocab:,}",
            f"{1000 * ours['seconds']:,.1f}",
            f"{1000 * theirs['seconds']:,.1f}",
            f"{theirs['seconds'] / ours['seconds']:.2f} x",
            f"{ours['peak'] / MB:,.0f}",
            f"{theirs['peak'] / MB:,.0f}",
            f"{theirs['peak'] / max(ours['peak'], 1):.2f} x",
            f"{apart:.1e}",
        )
        if not apart <= TOLERANCE:
            sys.exit(f"{shape.name}: the gradients differ by {apart:.2g} of their norm")
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
