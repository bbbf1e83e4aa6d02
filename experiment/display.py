"""The terminal while a workflow runs: one live block of progress bars with the time left."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

POLL_S = 0.5


class Display:
    """Thread-safe progress bars: several stages may run at the same time."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
        )
        self._ray = threading.Lock()
        self._ray_is_up = False

    def __enter__(self) -> "Display":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        self.console.print(text)

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Callable[[int], None]]:
        """A bar for work whose parts are counted as they finish."""
        task = self._progress.add_task(label, total=total)
        try:
            yield lambda done: self._progress.advance(task, done)
        finally:
            self._finish(task, label)

    @contextmanager
    def watch(self, label: str, file: Path) -> Iterator[None]:
        """A bar for a training run whose worker writes `[share done, label]` to a file."""
        task = self._progress.add_task(label, total=100)
        over = threading.Event()

        def poll() -> None:
            while not over.wait(POLL_S):
                with suppress(ValueError, OSError):
                    share, now = json.loads(file.read_text())
                    self._progress.update(task, completed=int(100 * share), description=now)

        thread = threading.Thread(target=poll, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            self._finish(task, label)

    @contextmanager
    def starting_ray(self) -> Iterator[None]:
        """Let one thread start Ray and announce it, because the start takes seconds."""
        with self._ray:
            if not self._ray_is_up:
                self.say("[dim]starting Ray[/dim]")
            yield
            self._ray_is_up = True

    def _finish(self, task: TaskID, label: str) -> None:
        seconds = self._progress.tasks[self._progress.task_ids.index(task)].elapsed
        self._progress.remove_task(task)
        self.say(f"[dim]{label}: {seconds or 0:.0f} s[/dim]")
