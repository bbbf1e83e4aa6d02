"""Stages: the cached parts of runs, named by their content and shared between runs.

A stage's folder is named by a hash of everything that decides its content. It is built under a
hidden name and renamed when it is complete, so that a stage that exists is finished even if
processes were killed. A killed build leaves its hidden folder, and the next attempt continues it.
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
# A number must rise when the meaning of a stage changes, so that old results are not taken for new
# ones. Every number is a part of the stage's hash.
VERSIONS = {
    "traces": 1,
    "text": 1,
    "truth": 1,
    "rarest": 1,
    "probe": 1,
    "features": 3,
    "head": 2,
    "proxy": 1,
    "student": 3,
}


@dataclass(frozen=True)
class Stage:
    """A folder of the cache, which exists or may be built."""

    name: str
    key: str
    path: Path
    description: dict[str, Any]

    @property
    def is_done(self) -> bool:
        """Whether the stage is finished."""
        return (self.path / RECORD).is_file()

    @property
    def seconds(self) -> float:
        """Wall time of the attempt that finished the stage."""
        return float(json.loads((self.path / RECORD).read_text())["seconds"])

    @property
    def partial(self) -> Path:
        """The hidden folder in which the stage is built."""
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
        """Make the stage unless it exists; a second process that needs it waits.

        Args:
            make: writes the content into the folder that it is given. If it raises, the folder
                stays, and the next attempt receives it again.
        """
        started = time.perf_counter()
        with self.claim([stage]) as missing:
            for claimed in missing:
                make(claimed.partial)
                self.finish(claimed, time.perf_counter() - started)
        return stage

    @contextmanager
    def claim(self, stages: Sequence[Stage]) -> Iterator[list[Stage]]:
        """Lock the stages that do not exist yet; yields those that still do not exist then."""
        missing = [stage for stage in stages if not stage.is_done]
        with ExitStack() as locks:
            # All processes lock in the same order, so that two never wait for each other.
            for stage in sorted(missing, key=lambda stage: stage.path.name):
                self.root.mkdir(parents=True, exist_ok=True)
                locks.enter_context(FileLock(self.root / f".{stage.path.name}.lock"))
            # Another process may have finished some while this one waited for their locks.
            missing = [stage for stage in missing if not stage.is_done]
            for stage in missing:
                stage.partial.mkdir(exist_ok=True)
            yield missing

    def finish(self, stage: Stage, seconds: float) -> None:
        """Write the record and give the folder its final name, so that the stage exists."""
        record = {
            "seconds": round(seconds, 2),
            "azeotrope": __version__,
            "inputs": stage.description,
        }
        (stage.partial / RECORD).write_text(json.dumps(record, indent=1))
        os.replace(stage.partial, stage.path)


def describe(stage: Stage, file: str) -> dict[str, Any]:
    """The JSON file in which a finished stage describes its content, such as `head.json`."""
    return json.loads((stage.path / file).read_text())
