"""Stages: content-addressed, atomic, shared between runs.

A stage's folder is named by a hash of everything that decides its content. It is built under a
hidden name and renamed when it is whole, so a stage that exists is finished, whatever was killed.
A killed build leaves its hidden folder, and the next attempt goes on from there.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from azeotrope import __version__
from azeotrope.config import digest

RECORD = "stage.json"
# Raise a stage's number when its meaning changes, so that old results are not taken for new ones.
VERSIONS = {
    "traces": 1,
    "text": 1,
    "truth": 1,
    "rarest": 1,
    "probe": 1,
    "features": 2,
    "head": 2,
    "student": 2,
}


@dataclass(frozen=True)
class Stage:
    """A finished or future folder of the cache."""

    name: str
    key: str
    path: Path
    description: dict[str, Any]

    @property
    def is_done(self) -> bool:
        return (self.path / RECORD).is_file()

    @property
    def seconds(self) -> float:
        """Wall time of the build, from the attempt that finished it."""
        return float(json.loads((self.path / RECORD).read_text())["seconds"])

    @property
    def partial(self) -> Path:
        return self.path.with_name(f".{self.path.name}.partial")


class Cache:
    """The folder that holds stages; several runs and several processes may share it."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()

    def stage(self, name: str, /, **inputs: Any) -> Stage:
        """The stage of this name that these inputs (plain data) decide."""
        description = {"stage": name, "version": VERSIONS[name], **inputs}
        key = digest(description)
        return Stage(name, key, self.root / f"{name}-{key}", description)

    def build(self, stage: Stage, make: Callable[[Path], None]) -> Stage:
        """Make the stage unless it exists; `make` writes into the folder it is given.

        Whoever comes second while a stage is being made waits for it.
        """
        started = time.perf_counter()
        with self.claim([stage]) as missing:
            for item in missing:
                make(item.partial)
                self.finish(item, time.perf_counter() - started)
        return stage

    @contextmanager
    def claim(self, stages: Sequence[Stage]) -> Iterator[list[Stage]]:
        """Lock the stages that do not exist yet, and give back those that still do not."""
        missing = [stage for stage in stages if not stage.is_done]
        with ExitStack() as locks:
            # One order for everybody, so that two processes never wait for each other.
            for stage in sorted(missing, key=lambda item: item.path.name):
                self.root.mkdir(parents=True, exist_ok=True)
                locks.enter_context(FileLock(self.root / f".{stage.path.name}.lock"))
            missing = [stage for stage in missing if not stage.is_done]
            for stage in missing:
                stage.partial.mkdir(exist_ok=True)
            yield missing

    def finish(self, stage: Stage, seconds: float) -> None:
        """Record the stage and give it its name; from now on it exists."""
        record = {
            "seconds": round(seconds, 2),
            "azeotrope": __version__,
            "inputs": stage.description,
        }
        (stage.partial / RECORD).write_text(json.dumps(record, indent=1))
        os.replace(stage.partial, stage.path)
