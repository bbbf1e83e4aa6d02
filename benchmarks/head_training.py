"""A step of DOGe head training: stored features in chunks, against whole models and whole logits.

    python -m benchmarks.head_training --shape both

`cached` is what this project does: hidden states read back from Parquet, the loss of
`azeotrope.defenses.doge` in chunks of tokens, AdamW. `full` is the published way: teacher and
proxies run over the sequences in every step, the float32 logits of every position exist at once,
cross-entropy and KL are taken over the whole tensors, AdamW.

Both train the same head on the same sequences from the same start, so their losses must agree;
the run fails if they do not. Each variant is a process of its own, so that its peak of memory is
its own. Memory is what a step needs beyond weights, features and optimizer state: logits, what is
computed from them, and the head's gradient.
"""

import argparse
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.head_shapes import MEASURED, SHAPES, Shape
from benchmarks.measured import MB, MeasuredProcess, answer_steps, report

TOLERANCE = 1e-4
"""Largest relative difference between the variants' losses."""


def child(role: str, shape: Shape, tokens: int, folder: Path) -> None:
    """Take one variant's part, in a process of its own."""
    import torch

    from benchmarks import head_variants

    torch.set_num_threads(1)
    if role == "prepare":
        report(head_variants.prepare(shape, tokens, folder))
        return
    make = head_variants.cached if role == "cached" else head_variants.full
    # The optimizer's state exists from the first step on, the same in both variants.
    answer_steps(make(shape, folder), mark_after_first=True)


def start(role: str, shape: Shape, tokens: int, folder: Path) -> MeasuredProcess:
    arguments = ["--role", role, "--shape", shape.name, "--tokens", str(tokens)]
    return MeasuredProcess(
        f"{shape.name} {role}",
        ["benchmarks.head_training", *arguments, "--folder", str(folder)],
    )


def compare(
    shape: Shape, steps: int, tokens: int
) -> tuple[dict[str, Any], MeasuredProcess, MeasuredProcess]:
    """Run both variants: a first step that does not count, then `steps` that do.

    The first step is on one row: it loads what the libraries load late, and makes the optimizer's
    state.

    Returns:
        What the preparation reports, then the cached and the full variant, both finished.
    """
    with tempfile.TemporaryDirectory(prefix="azeotrope-bench-") as scratch:
        folder = Path(scratch)
        with start("prepare", shape, tokens, folder) as preparation:
            prepared = preparation.answer()
        if shape.interleave:
            # A machine that is busy for a moment slows both variants alike.
            with (
                start("cached", shape, tokens, folder) as cached,
                start("full", shape, tokens, folder) as full,
            ):
                run_steps([cached, full], shape.rows, steps)
            return prepared, cached, full
        with start("cached", shape, tokens, folder) as cached:
            run_steps([cached], shape.rows, steps)
        with start("full", shape, tokens, folder) as full:
            run_steps([full], shape.rows, steps)
        return prepared, cached, full


def run_steps(variants: list[MeasuredProcess], rows: int, steps: int) -> None:
    for variant in variants:
        variant.answer()
    for number, taken in enumerate([1] + [rows] * steps):
        for variant in variants:
            variant.step(taken, counts=number > 0)


def losses(variant: MeasuredProcess) -> list[float]:
    """Nats per token, step by step."""
    return [answer["loss"] for answer in variant.answers]


def describe(
    shape: Shape, prepared: dict[str, Any], cached: MeasuredProcess, full: MeasuredProcess
) -> list[str]:
    saved_s = (full.milliseconds - cached.milliseconds) / 1000
    ours, theirs = losses(cached), losses(full)
    return [
        f"{shape.name}: {prepared['positions']:,} positions with prompts and padding, "
        f"proxies: {prepared['proxies']}; median of {len(cached.seconds)} steps, one row to warm "
        "up",
        f"{shape.name}: the cache costs {prepared['seconds']:.2f} s once and "
        f"{prepared['bytes'] / MB:.1f} MB of disk"
        + (
            f"; it pays after {math.ceil(prepared['seconds'] / saved_s)} steps"
            if saved_s > 0
            else ""
        ),
        f"{shape.name}: nats per token, first step {ours[0]:.6f} cached and {theirs[0]:.6f} full, "
        f"last step {ours[-1]:.6f} and {theirs[-1]:.6f}",
    ]


def check(shape: Shape, cached: MeasuredProcess, full: MeasuredProcess) -> None:
    """Refuse variants that did not compute the same thing, the update of the head included.

    Raises:
        SystemExit: if the losses of a step differ.
    """
    for number, pair in enumerate(zip(losses(cached), losses(full), strict=True)):
        if not math.isclose(*pair, rel_tol=TOLERANCE):
            raise SystemExit(
                f"{shape.name}: step {number} has the loss {pair[0]} cached and {pair[1]} full; "
                "the two variants do not compute the same thing"
            )


def empty_table() -> Table:
    table = Table(title="DOGe head training, one step on one thread")
    table.add_column("shape")
    for column in (
        "tokens",
        "vocab",
        "ms cached",
        "ms full",
        "time x",
        "step MB cached",
        "step MB full",
        "memory x",
    ):
        table.add_column(column, justify="right")
    return table


def main() -> None:
    """Print one table over the chosen shapes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=[*SHAPES, "both"], default="both")
    parser.add_argument("--steps", type=int, help="steps that count (pocket 15, wide 1)")
    parser.add_argument("--tokens", type=int, help="per step of the wide shape (2048)")
    parser.add_argument("--role", choices=["prepare", "cached", "full"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role:
        child(options.role, SHAPES[options.shape], options.tokens, options.folder)
        return
    table, notes = empty_table(), []
    for name in MEASURED if options.shape == "both" else (options.shape,):
        shape = SHAPES[name]
        tokens = options.tokens or shape.tokens
        prepared, cached, full = compare(shape, options.steps or shape.steps, tokens)
        check(shape, cached, full)
        table.add_row(
            shape.name,
            f"{prepared['tokens']:,}",
            f"{prepared['vocab']:,}",
            f"{cached.milliseconds:,.1f}",
            f"{full.milliseconds:,.1f}",
            f"{full.milliseconds / cached.milliseconds:.1f}",
            f"{cached.peak / MB:,.0f}",
            f"{full.peak / MB:,.0f}",
            f"{full.peak / max(cached.peak, 1):.1f}",
        )
        notes += describe(shape, prepared, cached, full)
    console = Console(width=None if sys.stdout.isatty() else 110)
    console.print(table)
    for note in notes:
        console.print(note, highlight=False)


if __name__ == "__main__":
    main()
