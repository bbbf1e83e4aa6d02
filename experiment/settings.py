"""Settings of an experiment, which all workflows share."""

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
"""The folder of the shipped configurations."""


class StudentConfig(Config):
    """A model that the attacker trains."""

    name: str = Field(description="short name in result tables: small, large, other, ...")
    model: str
    lora: Lora | None = None


class ProxyLesson(Config):
    """What proxies learn before a defense uses them.

    An attacker's student changes as it learns. Proxies that learned a little from the undefended
    teacher, on problems of the defender, are closer to such a student than untrained ones.
    """

    attacks: tuple[dict[str, Any], ...] = Field(
        min_length=1,
        description="one per proxy, in turn; with fewer attacks than proxies they repeat",
    )
    traces: int = Field(default=250, ge=1, description="texts that they learn from")
    texts: Literal["truth", "teacher"] = Field(
        default="truth",
        description="truth: the task's solutions, with the teacher's logits for attacks that use "
        "them; teacher: what the undefended teacher writes",
    )

    @field_validator("attacks")
    @classmethod
    def _resolvable(cls, specs: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
        return tuple(attacks.resolve(dict(spec)).config.dump() for spec in specs)


class DefenseChoice(Config):
    """One column of the comparison: one defense, or several that act together."""

    parts: tuple[dict[str, Any], ...] = Field(min_length=1)
    training: HeadTraining = Field(default_factory=HeadTraining)
    lesson: ProxyLesson | None = Field(
        default=None, description="null uses the proxies without further training"
    )
    name: str | None = Field(
        default=None,
        pattern=r"^\S+$",
        description="name in result tables; null joins the parts' names",
    )
    control: bool = Field(
        default=False,
        description="only for comparison: one budget, no clean-ups, no variants of attacks",
    )

    @field_validator("parts")
    @classmethod
    def _resolvable(cls, parts: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
        return tuple(defenses.resolve(dict(part)).config.dump() for part in parts)

    def resolve(self) -> list[defenses.Defense]:
        """The defenses, in the order of the settings.

        Raises:
            ConfigError: if a defense does not exist any more.
        """
        return [defenses.resolve(dict(part)) for part in self.parts]

    def acting(self, stage: defenses.Stage) -> list[defenses.Defense]:
        """The defenses of one stage, without those that change nothing."""
        return [part for part in self.resolve() if part.stage == stage and not part.is_identity]

    @property
    def label(self) -> str:
        """The name in result tables."""
        return self.name or "+".join(str(part["name"]) for part in self.parts)

    @property
    def changes_weights_alone(self) -> bool:
        """Whether an exported checkpoint by itself computes the logits that clients see."""
        return all(part.stage == "weights" or part.is_identity for part in self.resolve())

    @property
    def strength(self) -> float:
        """The strength of the first part."""
        return float(self.parts[0]["strength"])


class ProbeConfig(Config):
    """Measurements of the teachers' logits that need no student."""

    information: int = Field(
        default=400, ge=0, description="validation texts for the estimate of I(X; Z | Y); 0 skips"
    )
    begun: int = Field(
        default=0,
        ge=0,
        description="exam problems whose right solutions are begun for the teacher, which then "
        "finishes them; 0 skips",
    )
    subspace: tuple[str, ...] = Field(
        default=(),
        description="models whose hidden size is recovered through top-k logprobs; `teacher` means "
        "the clean and each defended teacher",
    )

    @property
    def suspects(self) -> tuple[str, ...]:
        """The models among `subspace` that are not the experiment's teacher."""
        return tuple(name for name in self.subspace if name != "teacher")

    @field_validator("information")
    @classmethod
    def _enough(cls, texts: int) -> int:
        if 0 < texts < LEAST_TEXTS:
            raise ValueError(f"the estimate needs {LEAST_TEXTS} texts, or 0 to skip it")
        return texts


class ExperimentConfig(Config):
    """A whole experiment: the protected teacher, its defenses, and the attacks on it."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", description="names the run folder")
    task: TaskConfig = Field(default_factory=PocketConfig)
    boundary: Boundary = Field(default_factory=Boundary)
    teacher: str = "pocket/teacher"
    proxies: tuple[str, ...] = ("pocket/proxy-a", "pocket/proxy-b")
    students: tuple[StudentConfig, ...] = Field(
        default=(StudentConfig(name="small", model="pocket/small"),),
        description="an empty list defends and measures the teacher without attacking it",
    )
    sampling: Sampling = Field(default_factory=Sampling, description="how traces are drawn")
    traces: int = Field(
        default=1000, ge=1, description="traces that the attacker takes in the main comparison"
    )
    head_traces: int | None = Field(
        default=None,
        ge=1,
        description="traces that a head is trained on; null takes as many as the attacker",
    )
    budgets: tuple[int, ...] = Field(
        default=(),
        description="further numbers of traces that the attacker takes, for the budget curve",
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
        description="further attacks, used on the undefended teacher and on every defense of the "
        "weights; `attack` with its clean-ups is used on every defense",
    )
    cleanups: tuple[CleanupSpec, ...] = Field(
        default=("correct_only",),
        description="each a name, a mapping with `name` and settings, or a list of these that are "
        "applied in order",
    )
    exam_split: Literal["test", "validation"] = Field(
        default="test",
        description="split of the exam problems: choose settings on `validation`, then use `test` "
        "once, with the chosen settings",
    )
    probe: ProbeConfig | None = Field(
        default=None, description="further measurements of every teacher; null makes none"
    )
    exam_problems: int = Field(
        default=600, ge=1, description="exam problems per student, answered greedily"
    )
    teacher_problems: int = Field(default=1000, ge=1, description="exam problems per teacher")
    shard: int = Field(
        default=SHARD,
        ge=1,
        description="problems that a worker answers in one batch and then saves; fewer need less "
        "memory and lose less when a worker dies",
    )
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    curve_seeds: tuple[int, ...] | None = Field(
        default=None, description="seeds of the budget curve's further points; null takes all seeds"
    )
    save_students: bool = True
    resources: Resources = Field(default_factory=Resources)
    runs: str = Field(default="runs", description="folder of results")
    cache: str = Field(default="runs/cache", description="folder of stages, shared between runs")

    @field_validator("runs", "cache")
    @classmethod
    def _a_folder(cls, folder: str) -> str:
        if "://" in folder:
            raise ValueError(
                f"{folder} is an address, and results are written to folders; mount it, and give "
                "the folder"
            )
        path = Path(folder)
        blocking = next((up for up in (path, *path.parents) if up.exists()), path)
        if blocking.exists() and not blocking.is_dir():
            raise ValueError(
                f"{blocking} is not a folder, so {folder} cannot be made; give another"
            )
        return folder

    @field_validator("attack")
    @classmethod
    def _known_attack(cls, attack: dict[str, Any]) -> dict[str, Any]:
        return attacks.resolve(dict(attack)).config.dump()

    @field_validator("attacks")
    @classmethod
    def _known_attacks(cls, specs: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
        return tuple(attacks.resolve(dict(spec)).config.dump() for spec in specs)

    @field_validator("cleanups")
    @classmethod
    def _known_cleanups(cls, specs: tuple[CleanupSpec, ...]) -> tuple[CleanupSpec, ...]:
        return tuple(cleanups.resolve(spec).spec for spec in specs)

    @model_validator(mode="after")
    def _named_apart(self) -> Self:
        """Rows of the result tables are told apart by names, so that no name may occur twice."""
        names = [student.name for student in self.students]
        if len(set(names)) != len(names):
            raise ValueError(f"two students have the same name: {', '.join(names)}")
        attack_names = [(spec["name"], spec["variant"]) for spec in (self.attack, *self.attacks)]
        for name, variant in attack_names:
            if attack_names.count((name, variant)) > 1:
                raise ValueError(
                    f"two attacks are called {name} ({variant}); give each a `variant` of its own"
                )
        cleanup_labels = self.cleanup_labels
        if len(set(cleanup_labels)) != len(cleanup_labels):
            raise ValueError(
                f"two clean-ups have the same name: {', '.join(cleanup_labels)}; give one a `label`"
            )
        labels = [defenses.strength_label(c.label, c.strength) for c in self.defenses]
        if len(set(labels)) != len(labels):
            raise ValueError(
                f"two defenses have the same name and strength: {', '.join(labels)}; "
                "give one a `name`"
            )
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        needs = any(d.needs_proxies for choice in self.defenses for d in choice.resolve())
        if needs and self.teacher in self.proxies:
            raise ValueError(
                f"the proxy {self.teacher} is the teacher itself; a proxy stands for the "
                "attacker's student, so take a smaller model with the same tokens"
            )
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
        """The sampling of traces at temperature 0."""
        return self.sampling.model_copy(update={"temperature": 0.0})

    @property
    def models(self) -> tuple[str, ...]:
        """Every model that the experiment loads, each once."""
        names = (self.teacher, *self.proxies, *(student.model for student in self.students))
        return tuple(dict.fromkeys(names))

    def attack_called(self, name: str, variant: str) -> dict[str, Any]:
        """The settings of one of the further attacks; any other name means the main attack."""
        for spec in self.attacks:
            if (spec["name"], spec["variant"]) == (name, variant):
                return spec
        return self.attack

    @property
    def cleanup_labels(self) -> tuple[str, ...]:
        """The clean-ups as result tables name them."""
        return tuple(cleanups.resolve(spec).label for spec in self.cleanups)

    def cleanup_called(self, label: str) -> CleanupSpec:
        """The settings of the clean-up with this label; a name of no label stands for itself."""
        return dict(zip(self.cleanup_labels, self.cleanups, strict=True)).get(label, label)

    @property
    def most_traces(self) -> int:
        """The largest number of traces that the attacker takes."""
        return max((self.traces, *self.budgets))


def find(name: str) -> Path:
    """The configuration file at a path, or the shipped one of a name.

    Raises:
        ConfigError: if no configuration of this name is shipped.
    """
    path = Path(name)
    if path.suffix in {".yaml", ".yml"}:
        return path
    shipped = CONFIGS / f"{name}.yaml"
    if not shipped.is_file():
        names = ", ".join(sorted(path.stem for path in CONFIGS.glob("*.yaml")))
        raise ConfigError(f"no configuration {name!r}; give a YAML file or one of: {names}")
    return shipped


def load(name: str, overrides: list[str]) -> ExperimentConfig:
    """Read an experiment's configuration, and check that its defenses and attacks exist.

    Raises:
        ConfigError: if the file or an override does not fit.
    """
    return load_config(ExperimentConfig, find(name), overrides)
