"""The resources that each role requests from the cluster, on CPU and on GPU."""

from dataclasses import dataclass

import ray
from pydantic import Field

from azeotrope.config import Config, ConfigError


class Resources(Config):
    """Requests per process.

    On a CPU, many processes of one thread each are faster than one process of many threads.
    """

    num_cpus: float | None = Field(default=None, description="CPUs of a local Ray; null takes all")
    cpus: float = Field(default=1.0, gt=0, description="of each worker")
    gpus: float = Field(default=0.0, ge=0, description="of each worker")
    generation_workers: int | None = Field(default=None, ge=1, description="null fills the cluster")
    workers_per_head: int = Field(default=1, ge=1, description="ranks that train one head")
    workers_per_student: int = Field(default=1, ge=1, description="ranks that train one student")
    restarts: int = Field(default=3, ge=0, description="how often a dead worker is restarted")


@dataclass(frozen=True)
class Slots:
    """How many workers fit the cluster at once."""

    workers: int

    @classmethod
    def of(cls, resources: Resources) -> "Slots":
        """The number of workers of this size on the connected cluster.

        Raises:
            ConfigError: if a single training run does not fit, because it would wait for ever.
        """
        available = ray.cluster_resources()
        cpus, gpus = available.get("CPU", 0.0), available.get("GPU", 0.0)
        fit = int(cpus // resources.cpus)
        if resources.gpus > 0:
            fit = min(fit, int(gpus / resources.gpus))
        needed = max(resources.workers_per_head, resources.workers_per_student)
        if fit < needed:
            raise ConfigError(
                f"one training run requests {needed} x ({resources.cpus:g} CPU, "
                f"{resources.gpus:g} GPU) but the cluster has {cpus:g} CPU and {gpus:g} GPU; "
                "lower `resources` or start more nodes"
            )
        return cls(fit)

    def generation(self, resources: Resources, jobs: int) -> int:
        """Workers that generate side by side."""
        requested = resources.generation_workers or self.workers
        return max(1, min(requested, self.workers, jobs))

    def students(self, resources: Resources) -> int:
        """Students that train side by side."""
        return max(1, self.workers // resources.workers_per_student)
