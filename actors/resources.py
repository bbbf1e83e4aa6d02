"""What each role asks of the cluster, on CPU and on GPU: the one place that says so."""

from dataclasses import dataclass

import ray
from pydantic import Field

from azeotrope.config import Config, ConfigError


class Resources(Config):
    """Per-process requests. On a CPU one thread a process beats one process with many."""

    num_cpus: float | None = Field(default=None, description="CPUs of a local Ray; null takes all")
    cpus: float = Field(default=1.0, gt=0, description="of each worker")
    gpus: float = Field(default=0.0, ge=0, description="of each worker")
    generation_workers: int | None = Field(default=None, ge=1, description="null fills the cluster")
    workers_per_head: int = Field(default=1, ge=1, description="ranks that train one head")
    workers_per_student: int = Field(default=1, ge=1, description="ranks that train one student")
    restarts: int = Field(default=3, ge=0, description="times a dead worker is started again")


@dataclass(frozen=True)
class Slots:
    """How many workers fit the cluster at once."""

    workers: int

    @classmethod
    def of(cls, resources: Resources) -> "Slots":
        """Count them.

        Raises:
            ConfigError: if not even one fits: it would wait for ever.
        """
        have = ray.cluster_resources()
        cpus, gpus = have.get("CPU", 0.0), have.get("GPU", 0.0)
        fit = int(cpus // resources.cpus)
        if resources.gpus > 0:
            fit = min(fit, int(gpus / resources.gpus))
        most = max(resources.workers_per_head, resources.workers_per_student)
        if fit < most:
            raise ConfigError(
                f"one training run asks for {most} x ({resources.cpus:g} CPU, "
                f"{resources.gpus:g} GPU) but the cluster has {cpus:g} CPU and {gpus:g} GPU; "
                "lower `resources` or start more nodes"
            )
        return cls(fit)

    def generation(self, resources: Resources, jobs: int) -> int:
        wanted = resources.generation_workers or self.workers
        return max(1, min(wanted, self.workers, jobs))

    def students(self, resources: Resources) -> int:
        """Students that train side by side."""
        return max(1, self.workers // resources.workers_per_student)
