"""Points that a run has reached: defended teachers that can be served, and what goes with each."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from pydantic import Field, TypeAdapter, ValidationError

from azeotrope import models
from azeotrope.config import Config, ConfigError, explain
from azeotrope.defenses.base import strength_label
from azeotrope.files import write_json
from azeotrope.heads.export import TOLERANCE
from azeotrope.tasks import TaskConfig
from azeotrope.tokens import Boundary
from experiment.stages import RECORD

if TYPE_CHECKING:
    # Not loaded to serve: they bring Ray Train, data frames and plots, which take seconds.
    from experiment.results import Taught
    from experiment.settings import ExperimentConfig

POINTS = "points.json"
REPORT = "report.html"


class Point(Config):
    """One defended teacher: a checkpoint, and what acts on its tokens and its text."""

    defense: str = Field(description="as result tables name it; `none` is the undefended teacher")
    strength: float = 0.0
    checkpoint: str
    decoding: tuple[dict[str, Any], ...] = ()
    rewriting: tuple[dict[str, Any], ...] = ()
    control: bool = Field(default=False, description="only to compare with, never to be served")
    teacher: str | None = Field(default=None, description="the undefended teacher it came from")
    boundary: Boundary = Field(default_factory=Boundary)
    task: TaskConfig | None = None
    report: str | None = None

    @property
    def label(self) -> str:
        """Tells one defense at two strengths apart."""
        return strength_label(self.defense, self.strength)


def write_points(config: "ExperimentConfig", folder: Path, taught: "list[Taught]") -> None:
    """Record what a run may be served from."""
    found = []
    for item in taught:
        assert item.choice is not None
        parts = [part for part in item.choice.resolve() if not part.is_identity]
        point = Point(
            defense=item.label,
            strength=item.strength,
            checkpoint=item.checkpoint or models.resolve(config.teacher),
            decoding=tuple(part.config.dump() for part in parts if part.stage == "decoding"),
            rewriting=tuple(part.config.dump() for part in parts if part.stage == "text"),
            control=item.choice.control or all(part.is_baseline for part in parts),
            teacher=models.resolve(config.teacher),
            boundary=config.boundary,
            task=config.task,
            report=str(folder / REPORT),
        )
        found.append(point.dump())
    write_json(folder / POINTS, found)


def find_point(source: str, defense: str | None = None) -> Point:
    """The point behind a run folder, a checkpoint's folder, or a model's name.

    Args:
        defense: which of a run's points; may be left out where there is one.

    Raises:
        ConfigError: if there is none, or several, or the check of its export did not pass.
    """
    folder = Path(source).expanduser()
    if (folder / POINTS).is_file():
        point = _of_run(folder, defense)
    elif (folder / "config.json").is_file() and _is_run(folder):
        raise ConfigError(
            f"{source} is a run without {POINTS}: it did not end, or an older version made it; "
            "run its pipeline again, which takes what is finished from the cache"
        )
    else:
        try:
            point = Point(defense="none", checkpoint=models.resolve(source))
        except FileNotFoundError as error:
            raise ConfigError(f"{error}; or give the folder of a run") from None
        if not Path(point.checkpoint).is_dir() and not _is_cached(point.checkpoint):
            raise ConfigError(
                f"no run and no checkpoint at {source}, and no model of that name on this machine; "
                "replicas ask no hub, so download a model before you serve it"
            )
        if defense is not None:
            raise ConfigError(f"{source} is a checkpoint; `defense` chooses among a run's points")
    _check_export(Path(point.checkpoint))
    return point


def _of_run(folder: Path, defense: str | None) -> Point:
    try:
        points = TypeAdapter(list[Point]).validate_json((folder / POINTS).read_bytes())
    except ValidationError as error:
        raise ConfigError(f"{folder / POINTS} cannot be read: {explain(error)}") from None
    named = [point for point in points if defense in (point.defense, point.label)]
    wanted = named if defense is not None else [point for point in points if not point.control]
    if len(wanted) == 1:
        return wanted[0]
    known = ", ".join(point.label for point in points) or "nothing"
    of_those = "that are no controls" if defense is None else f"called {defense!r}"
    raise ConfigError(
        f"{folder} has {len(wanted)} points {of_those}; choose with defense=NAME or "
        f"defense='NAME (STRENGTH)' from {known}"
    )


def _is_run(folder: Path) -> bool:
    try:
        return "azeotrope" in json.loads((folder / "config.json").read_text())
    except ValueError:
        return False


def _is_cached(name: str) -> bool:
    """Whether a model of a hub was downloaded before."""
    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:
        return False


def _check_export(checkpoint: Path) -> None:
    """Refuse a head whose export was not finished, not checked, or not what lies there now."""
    stage = checkpoint.parent
    if not (stage / "head.json").is_file():
        if stage.name.startswith((".head-", "head-")):
            raise ConfigError(
                f"{checkpoint} comes from training that did not end: its export was never checked; "
                "run the workflow that made it again"
            )
        return
    described = json.loads((stage / "head.json").read_text())
    check = described.get("export")
    if not (stage / RECORD).is_file() or check is None:
        raise ConfigError(f"{checkpoint} has no finished export check; run its workflow again")
    difference = check["largest_logit_difference"]
    if check["tied"] or not difference <= (TOLERANCE if check.get("float32", True) else 0.25):
        raise ConfigError(
            f"{checkpoint} did not pass its export check (logits {difference:.2g} away, "
            f"tied: {check['tied']}); it is not served"
        )
    if described.get("undefended"):
        raise ConfigError(
            f"{checkpoint} has the undefended head: no round of its training kept the utility "
            "floor. If it is to be served all the same, give the teacher itself as the source"
        )
    known = described.get("fingerprint")
    if known is not None and known != models.fingerprint(str(checkpoint)):
        raise ConfigError(
            f"{checkpoint} was changed after its export check; run its workflow again"
        )
