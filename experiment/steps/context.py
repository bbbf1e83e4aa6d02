"""What all steps of a run share: settings, the cache, the display, and the connection to Ray."""

import threading
from pathlib import Path

from actors import session
from actors.resources import Slots
from actors.shared import check_shared
from azeotrope import models
from experiment.display import Display
from experiment.settings import ExperimentConfig
from experiment.stages import Cache


class StoppedError(RuntimeError):
    """This stage was not started because the run is ending."""


class StepContext:
    """The surroundings of an experiment's steps.

    Ray starts with the first stage that is not in the cache.
    """

    def __init__(self, config: ExperimentConfig, display: Display) -> None:
        self.config = config
        self.cache = Cache(Path(config.cache))
        self.display = display
        self._fingerprints: dict[str, str] = {}
        self._stopped = threading.Event()
        self._knows_shared = False

    def with_config(self, config: ExperimentConfig) -> "StepContext":
        """The same surroundings for other settings; both stop together."""
        context = StepContext(config, self.display)
        context._fingerprints = self._fingerprints
        context._stopped = self._stopped
        return context

    def fingerprint(self, model: str) -> str:
        """A hash of a model's files, which describes the model in stages."""
        # Hashing reads whole checkpoints, so that each is read once per run.
        if model not in self._fingerprints:
            self._fingerprints[model] = models.fingerprint(model)
        return self._fingerprints[model]

    def start_ray(self) -> None:
        """Start or join Ray; later calls return at once.

        Raises:
            StoppedError: if the run is ending.
            RayStartError: if Ray cannot start, or offers less than the settings ask for.
            UnsharedFolderError: if a node does not see `cache` or `runs`.
        """
        if self._stopped.is_set():
            raise StoppedError("another stage failed")
        with self.display.starting_ray():
            session.start(self.config.resources, offline=self._needs_no_network)
            if not self._knows_shared:
                check_shared([self.cache.root, Path(self.config.runs)])
                self._knows_shared = True

    def parallel_students(self) -> int:
        """How many students train side by side on this cluster."""
        self.start_ray()
        return Slots.of(self.config.resources).students(self.config.resources)

    def stop(self) -> None:
        """Let no thread start another stage."""
        self._stopped.set()
        session.stop()

    @property
    def _needs_no_network(self) -> bool:
        config = self.config
        local_models = all(Path(models.resolve(name)).is_dir() for name in config.models)
        return local_models and config.task.is_local
