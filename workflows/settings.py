"""Typed settings that several workflows share, checked before anything expensive starts."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from actors.generator import SHARD
from actors.resources import Resources
from actors.students import Lora
from azeotrope.attacks import base as attacks
from azeotrope.attacks import cleanups
from azeotrope.config import Config, ConfigError
from azeotrope.config import load as load_config
from azeotrope.defenses import base as defenses
from azeotrope.generation import Sampling
from azeotrope.head_training import HeadTraining
from azeotrope.tasks import TaskConfig
from azeotrope.tasks.pocket import PocketConfig
from azeotrope.tokens import Boundary

CONFIGS = Path(__file__).parent / "configs"


class StudentConfig(Config):
    """A thief's starting model."""

    name: str = Field(description="short name in result tables: small, large, other, ...")
    model: str
    lora: Lora | None = None


class DefenseChoice(Config):
    """One column of the comparison: one defense, or several that act together."""

    parts: tuple[dict[str, Any], ...] = Field(min_length=1)
    training: HeadTraining = Field(default_factory=HeadTraining)

    @field_validator("parts")
    @classmethod
    def _resolvable(cls, parts: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
        return tuple(defenses.resolve(dict(part)).config.dump() for part in parts)

    def resolve(self) -> list[defenses.Defense]:
        return [defenses.resolve(dict(part)) for part in self.parts]

    @property
    def label(self) -> str:
        return "+".join(str(part["name"]) for part in self.parts)

    @property
    def strength(self) -> float:
        return float(self.parts[0]["strength"])


class ExperimentConfig(Config):
    """A whole experiment: who is protected, how, and who steals."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", description="names the run folder")
    task: TaskConfig = Field(default_factory=PocketConfig)
    boundary: Boundary = Field(default_factory=Boundary)
    teacher: str = "pocket/teacher"
    proxies: tuple[str, ...] = ("pocket/proxy-a", "pocket/proxy-b")
    students: tuple[StudentConfig, ...] = Field(
        default=(StudentConfig(name="small", model="pocket/small"),),
        description="an empty list defends and measures the teacher, and robs nobody",
    )
    sampling: Sampling = Field(default_factory=Sampling, description="how traces are drawn")
    traces: int = Field(
        default=1000, ge=1, description="traces the thief takes in the main comparison"
    )
    head_traces: int | None = Field(
        default=None,
        ge=1,
        description="traces a head is trained on; null takes as many as the thief",
    )
    budgets: tuple[int, ...] = Field(
        default=(), description="other numbers of traces, for the curve"
    )
    max_length: int = Field(
        default=160, ge=8, description="tokens of prompt and completion together"
    )
    defenses: tuple[DefenseChoice, ...] = (
        DefenseChoice(parts=({"name": "doge"},)),
        DefenseChoice(parts=({"name": "answers_only"},)),
    )
    attack: dict[str, Any] = Field(default_factory=lambda: {"name": "text_sft"})
    cleanups: tuple[str, ...] = ("correct_only",)
    exam_problems: int = Field(
        default=600, ge=1, description="test problems a student answers, greedily"
    )
    teacher_problems: int = Field(
        default=1000, ge=1, description="test problems the teacher answers"
    )
    shard: int = Field(
        default=SHARD,
        ge=1,
        description="problems a worker answers side by side and saves at once; fewer need less "
        "memory and lose less when a worker dies",
    )
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    curve_seeds: tuple[int, ...] | None = Field(
        default=None, description="seeds of the budget curve's other points; null takes all"
    )
    save_students: bool = True
    resources: Resources = Field(default_factory=Resources)
    runs: str = Field(default="runs", description="folder for results")
    cache: str = Field(default="runs/cache", description="folder for stages, shared between runs")

    @field_validator("attack")
    @classmethod
    def _known_attack(cls, attack: dict[str, Any]) -> dict[str, Any]:
        return attacks.resolve(dict(attack)).config.dump()

    @field_validator("cleanups")
    @classmethod
    def _known_cleanups(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            cleanups.resolve(name)
        return names

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [student.name for student in self.students]
        if len(set(names)) != len(names):
            raise ValueError(f"two students have the same name: {', '.join(names)}")
        needs = any(d.needs_proxies for choice in self.defenses for d in choice.resolve())
        if needs and not self.proxies:
            raise ValueError("a defense in this list needs at least one proxy; `proxies` is empty")
        if self.sampling.max_new_tokens >= self.max_length:
            raise ValueError(
                f"max_length {self.max_length} leaves no room for a prompt beside "
                f"sampling.max_new_tokens {self.sampling.max_new_tokens}"
            )
        return self

    @property
    def greedy(self) -> Sampling:
        return self.sampling.model_copy(update={"temperature": 0.0})

    @property
    def models(self) -> tuple[str, ...]:
        """The name of every model in it, each once."""
        names = (self.teacher, *self.proxies, *(student.model for student in self.students))
        return tuple(dict.fromkeys(names))

    @property
    def most_traces(self) -> int:
        return max((self.traces, *self.budgets))


Workflow = Literal["pipeline"]


def find(name: str) -> Path:
    """A configuration file by path, or by the name of one that is shipped.

    Raises:
        ConfigError: if there is neither.
    """
    path = Path(name)
    if path.suffix in {".yaml", ".yml"}:
        return path
    shipped = CONFIGS / f"{name}.yaml"
    if not shipped.is_file():
        known = ", ".join(sorted(item.stem for item in CONFIGS.glob("*.yaml")))
        raise ConfigError(f"no configuration {name!r}; give a YAML file or one of: {known}")
    return shipped


def load(name: str, overrides: list[str]) -> ExperimentConfig:
    """Read an experiment's configuration; every defense and attack in it exists afterwards."""
    return load_config(ExperimentConfig, find(name), overrides)
