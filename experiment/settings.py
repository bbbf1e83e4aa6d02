"""Typed settings that several workflows share, checked before anything expensive starts."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from actors.resources import Resources
from actors.students import Lora
from azeotrope.attacks import base as attacks
from azeotrope.attacks.cleanups import base as cleanups
from azeotrope.attacks.cleanups.base import CleanupSpec
from azeotrope.collect import SHARD
from azeotrope.config import Config, ConfigError
from azeotrope.config import load as load_config
from azeotrope.defenses import base as defenses
from azeotrope.generation import Sampling
from azeotrope.heads.search import HeadTraining
from azeotrope.logits.information import LEAST_TEXTS
from azeotrope.tasks import PocketConfig, TaskConfig
from azeotrope.tokens import Boundary

CONFIGS = Path(__file__).parents[1] / "workflows" / "configs"
LESSON_PROBLEMS = 50
"""A taught proxy's exam is no result: it is asked a few problems that nobody else is."""


class StudentConfig(Config):
    """A thief's starting model."""

    name: str = Field(description="short name in result tables: small, large, other, ...")
    model: str
    lora: Lora | None = None


class ProxyLesson(Config):
    """What the proxies are taught before a defense looks at them.

    A thief's student is soon not what it was: proxies that learned a little from the undefended
    teacher, on the defender's own problems, show where students will be.
    """

    attacks: tuple[dict[str, Any], ...] = Field(
        min_length=1, description="one for each proxy, in turn; begun again when they run out"
    )
    traces: int = Field(default=250, ge=1, description="texts that they learn from")

    @field_validator("attacks")
    @classmethod
    def _resolvable(cls, items: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
        return tuple(attacks.resolve(dict(item)).config.dump() for item in items)


class DefenseChoice(Config):
    """One column of the comparison: one defense, or several that act together."""

    parts: tuple[dict[str, Any], ...] = Field(min_length=1)
    training: HeadTraining = Field(default_factory=HeadTraining)
    lesson: ProxyLesson | None = Field(
        default=None, description="null takes the proxies as they come"
    )
    name: str | None = Field(
        default=None, pattern=r"^\S+$", description="in result tables; null joins the parts' names"
    )
    control: bool = Field(
        default=False,
        description="only to compare with: one budget, no clean-ups, no variants of attacks",
    )

    @field_validator("parts")
    @classmethod
    def _resolvable(cls, parts: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
        return tuple(defenses.resolve(dict(part)).config.dump() for part in parts)

    def resolve(self) -> list[defenses.Defense]:
        return [defenses.resolve(dict(part)) for part in self.parts]

    @property
    def label(self) -> str:
        return self.name or "+".join(str(part["name"]) for part in self.parts)

    @property
    def changes_weights_alone(self) -> bool:
        """Whether logits can be asked of an exported checkpoint, with nothing added to it."""
        return all(part.stage == "weights" or part.is_identity for part in self.resolve())

    @property
    def strength(self) -> float:
        return float(self.parts[0]["strength"])


class Probe(Config):
    """Measurements of the teachers' logits that need no student."""

    information: int = Field(
        default=400, ge=0, description="validation texts for the estimate of I(X; Z | Y); 0 skips"
    )
    begun: int = Field(
        default=0,
        ge=0,
        description="texts of the ground truth of the problems of exams, of which the right ones "
        "are begun for the teacher, to be finished by it; 0 skips",
    )
    subspace: tuple[str, ...] = Field(
        default=(),
        description="models whose hidden size is recovered through top-k logprobs; `teacher` is "
        "each defended teacher",
    )

    @field_validator("information")
    @classmethod
    def _enough(cls, texts: int) -> int:
        if 0 < texts < LEAST_TEXTS:
            raise ValueError(f"the estimate needs {LEAST_TEXTS} texts, or 0 to skip it")
        return texts


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
    attacks: tuple[dict[str, Any], ...] = Field(
        default=(),
        description="further attacks, each on the undefended teacher and on every defense of the "
        "weights; `attack` with its clean-ups is on every defense",
    )
    cleanups: tuple[CleanupSpec, ...] = Field(
        default=("correct_only",),
        description="each a name, a mapping with `name` and settings, or a list of these that are "
        "applied in order",
    )
    exam_split: Literal["test", "validation"] = Field(
        default="test",
        description="problems of all exams: choose settings on `validation`, and look at `test` "
        "once, with the settings that were chosen",
    )
    probe: Probe | None = Field(
        default=None, description="what else is measured of every teacher; null measures nothing"
    )
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

    @field_validator("attacks")
    @classmethod
    def _known_attacks(cls, items: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
        return tuple(attacks.resolve(dict(item)).config.dump() for item in items)

    @field_validator("cleanups")
    @classmethod
    def _known_cleanups(cls, specs: tuple[CleanupSpec, ...]) -> tuple[CleanupSpec, ...]:
        return tuple(cleanups.resolve(spec).spec for spec in specs)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [student.name for student in self.students]
        if len(set(names)) != len(names):
            raise ValueError(f"two students have the same name: {', '.join(names)}")
        every = [(item["name"], item["variant"]) for item in (self.attack, *self.attacks)]
        repeated = [
            f"{name} ({variant})" for name, variant in every if every.count((name, variant)) > 1
        ]
        if repeated:
            raise ValueError(
                f"two attacks are called {repeated[0]}; give each a `variant` of its own"
            )
        cleaned = self.cleanup_labels
        if len(set(cleaned)) != len(cleaned):
            raise ValueError(
                f"two clean-ups have the same name: {', '.join(cleaned)}; give one a `label`"
            )
        labels = [defenses.strength_label(c.label, c.strength) for c in self.defenses]
        if len(set(labels)) != len(labels):
            raise ValueError(
                f"two defenses have the same name and strength: {', '.join(labels)}; "
                "give one a `name`"
            )
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

    def attack_called(self, name: str, variant: str) -> dict[str, Any]:
        """The settings of one of the attacks; clean-ups are no variants of the main one."""
        for item in self.attacks:
            if (item["name"], item["variant"]) == (name, variant):
                return item
        return self.attack

    @property
    def cleanup_labels(self) -> tuple[str, ...]:
        """The clean-ups as result tables name them."""
        return tuple(cleanups.resolve(spec).label for spec in self.cleanups)

    def cleanup_called(self, label: str) -> CleanupSpec:
        """The settings of one of the clean-ups; a label that none has is its own name."""
        return dict(zip(self.cleanup_labels, self.cleanups, strict=True)).get(label, label)

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
