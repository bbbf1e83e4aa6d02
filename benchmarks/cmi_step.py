"""A step of CMI: the closed form of the cosine's gradient, against double backward.

    python -m benchmarks.cmi_step
    python -m benchmarks.cmi_step --shape pocket --steps 3

Both compute the gradient of the cosine between what a surrogate learns from clean and from defended
forward KL, with respect to the same matrix, on the same texts. The gradients must agree to 1e-4 of
their norm; the run fails if they do not. Each variant is a process of its own, so that its peak of
memory is its own; memory is what a step needs beyond models and inputs. The steps of the two take
turns.
"""

import argparse
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.measured import MB, MeasuredProcess, answer_steps

TOLERANCE = 1e-4
METHODS = ("closed_form", "double_backward")
SAMPLED = 20_000
"""Entries of the gradients that are compared: all of a small one, evenly spaced in a large one."""


@dataclass(frozen=True)
class CmiShape:
    """A teacher's head and a surrogate: two blocks, the last of which is watched."""

    name: str
    vocab: int
    hidden: int
    surrogate: int
    texts: int
    length: int
    rank: int
    steps: int


SHAPES = {
    "pocket": CmiShape("pocket", 129, 160, 96, texts=16, length=64, rank=32, steps=10),
    "wide": CmiShape("wide", 49_152, 576, 576, texts=4, length=192, rank=32, steps=2),
    "smoke": CmiShape("smoke", 64, 32, 32, texts=2, length=8, rank=4, steps=1),
}
MEASURED = ("pocket", "wide")
"""The shapes whose figures mean something; `smoke` only shows that the benchmark runs."""


def setup(shape: CmiShape, method: str) -> Callable[[int], dict[str, Any]]:
    """A function that takes one step and returns the cosine and the gradient of both factors."""
    # torch is imported by the children alone; `benchmarks.measured` says why.
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from azeotrope.defenses.cmi import Cmi, Config
    from azeotrope.heads.features import FeatureBatch
    from azeotrope.heads.head import Head
    from azeotrope.heads.surrogate import Surrogate
    from azeotrope.models import Loaded, load_tokenizer

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
    # A surrogate does not use its tokenizer; any one will do.
    loaded = Loaded(LlamaForCausalLM(config), load_tokenizer("pocket/teacher"))
    surrogate = Surrogate(loaded, "last", shape.vocab)
    plain = Head(torch.randn(shape.vocab, shape.hidden) * 0.1)
    settings = Config(rank=shape.rank, layer="last", method=method, cosine_on="both")  # type: ignore[arg-type]
    defense = Cmi(settings)
    head = defense.parametrise(plain, plain, shape.vocab)
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

    def step(_: int) -> dict[str, Any]:
        head.zero_grad(set_to_none=True)
        cosine = defense.turn(head, (surrogate,), batch, 1.0)
        gradient = torch.cat([head.up.grad.flatten(), head.down.grad.flatten()])  # type: ignore[union-attr]
        sample = gradient[:: max(1, len(gradient) // SAMPLED)]
        return {"cosine": cosine, "gradient": sample.tolist()}

    return step


def compare(shape: CmiShape, steps: int) -> tuple[MeasuredProcess, MeasuredProcess]:
    """Both variants, finished; the first step of each warms up and does not count."""
    with ExitStack() as running:
        closed_form, double_backward = (
            running.enter_context(
                MeasuredProcess(
                    f"{shape.name} {method}",
                    ["benchmarks.cmi_step", "--child", shape.name, method],
                )
            )
            for method in METHODS
        )
        for variant in (closed_form, double_backward):
            variant.answer()
        for number in range(steps + 1):
            for variant in (closed_form, double_backward):
                variant.step(number, counts=number > 0)
    return closed_form, double_backward


def difference(ours: list[float], theirs: list[float]) -> float:
    """Distance of two gradients over the norm of the second, on the sampled entries."""
    distance = sum((a - b) ** 2 for a, b in zip(ours, theirs, strict=True)) ** 0.5
    return distance / max(sum(value**2 for value in theirs) ** 0.5, 1e-30)


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {number}")
    return number


def main() -> None:
    """Print one table over the chosen shapes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=[*SHAPES, "both"], default="both")
    parser.add_argument("--steps", type=_positive, help="steps that count (pocket 10, wide 2)")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        import torch

        torch.set_num_threads(1)
        name, method = options.child
        answer_steps(setup(SHAPES[name], method), mark_after_first=False)
        return
    table = Table("shape", "tokens", "vocabulary", "ms closed form", "ms double backward")
    for name in ("time", "MB closed form", "MB double backward", "memory", "gradients differ by"):
        table.add_column(name)
    for name in MEASURED if options.shape == "both" else (options.shape,):
        shape = SHAPES[name]
        ours, theirs = compare(shape, options.steps or shape.steps)
        distance = difference(ours.answers[-1]["gradient"], theirs.answers[-1]["gradient"])
        table.add_row(
            shape.name,
            f"{shape.texts * shape.length:,}",
            f"{shape.vocab:,}",
            f"{ours.milliseconds:,.1f}",
            f"{theirs.milliseconds:,.1f}",
            f"{theirs.milliseconds / ours.milliseconds:.2f} x",
            f"{ours.peak / MB:,.0f}",
            f"{theirs.peak / MB:,.0f}",
            f"{theirs.peak / max(ours.peak, 1):.2f} x",
            f"{distance:.1e}",
        )
        if not distance <= TOLERANCE:
            sys.exit(f"{shape.name}: the gradients differ by {distance:.2g} of their norm")
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
