"""A benchmark's variants in processes of their own, each with its time and its peak of memory.

The parent must not import torch: a child of a large process starts with its parent's peak of memory
as its own.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

MB = 1 << 20
ROOT = Path(__file__).parents[1]
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


# In the children ----------------------------------------------------------------------------


class PeakMemory:
    """The peak of this process's memory above a mark, in bytes."""

    def __init__(self) -> None:
        self.mark()

    def mark(self) -> None:
        """Count from the memory that is in use now."""
        with suppress(OSError):
            # Linux resets the peak to the present use. Elsewhere the mark is the old peak, so a
            # step that needs less than loading did counts as nothing.
            Path("/proc/self/clear_refs").write_text("5")
        self._marked = _peak_bytes()

    @property
    def above_mark(self) -> int:
        return _peak_bytes() - self._marked


def _peak_bytes() -> int:
    # In bytes on macOS and in kilobytes on Linux.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def report(values: dict[str, Any]) -> None:
    """Send one line of JSON to the parent."""
    print(json.dumps(values), flush=True)


def answer_steps(step: Callable[[int], dict[str, Any]], *, mark_after_first: bool) -> None:
    """Take one step per line of standard input, and report its values, seconds and peak.

    Args:
        step: takes the number on the line.
        mark_after_first: memory that the first step allocates for good, such as the optimizer's
            state, does not count.
    """
    memory = PeakMemory()
    report({"ready": True})
    for number, line in enumerate(sys.stdin):
        started = time.perf_counter()
        values = step(int(line))
        seconds = time.perf_counter() - started
        if number == 0 and mark_after_first:
            memory.mark()
        report({**values, "seconds": seconds, "peak": memory.above_mark})


# In the parent ------------------------------------------------------------------------------


class MeasuredProcess:
    """A variant in a process of its own, on one thread.

    Args:
        name: for errors.
        arguments: of `python -m`: a module and what it needs to take the variant's part.
    """

    def __init__(self, name: str, arguments: list[str]) -> None:
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, **ONE_THREAD},
        )
        self.seconds: list[float] = []
        """Of the steps that count."""
        self.answers: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.stdin is not None:
            with suppress(BrokenPipeError):
                self.process.stdin.close()
        self.process.wait()

    def answer(self) -> dict[str, Any]:
        """The next line that the variant reports.

        Raises:
            SystemExit: if the process ended instead.
        """
        assert self.process.stdout is not None
        for line in self.process.stdout:
            # Libraries may print lines of their own.
            if line.startswith("{"):
                return json.loads(line)
        code = self.process.wait()
        memory = "; it was killed, most likely because memory ran out" if code == -9 else ""
        raise SystemExit(f"{self.name} ended early with code {code}{memory}")

    def step(self, number: int, *, counts: bool) -> None:
        """Let the variant take one step, and note its answer.

        Raises:
            SystemExit: if the process ended instead.
        """
        assert self.process.stdin is not None
        self.process.stdin.write(f"{number}\n")
        self.process.stdin.flush()
        self.answers.append(self.answer())
        if counts:
            self.seconds.append(self.answers[-1]["seconds"])

    @property
    def milliseconds(self) -> float:
        """The median of the steps that count."""
        return 1000 * statistics.median(self.seconds)

    @property
    def peak(self) -> int:
        """Bytes that the steps needed, up to the last one."""
        return self.answers[-1]["peak"]
