"""Points of a run: defended teachers that can be served, with all that belongs to each."""

import json
from collections.abc import Sequence
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
    # Not imported to serve: they load Ray Train, data frames and plots, which takes seconds.
    from experiment.settings import ExperimentConfig
    from experiment.teachers import TeacherResult

POINTS = "points.json"
REPORT = "report.html"
LOW_PRECISION_TOLERANCE = 0.25
"""Largest difference of logits that an export may have if it was checked in bfloat16."""


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
    report: str | None = Field(default=None, description="the run's report, for the page")

    @property
    def label(self) -> str:
        """Tells one defense at two strengths apart."""
        return strength_label(self.defense, self.strength)


def write_points(
    config: "ExperimentConfig", folder: Path, teachers: "Sequence[TeacherResult]"
) -> None:
    """Write the defended teachers that a run may be served from to `points.json`."""
    points = []
    for teacher in teachers:
        choice = teacher.choice
        assert choice is not None
        parts = [part for part in choice.resolve() if not part.is_identity]
        point = Point(
            defense=teacher.label,
            strength=teacher.strength,
            checkpoint=teacher.checkpoint or models.resolve(config.teacher),
            decoding=teacher.decoding,
            rewriting=tuple(part.config.dump() for part in choice.acting("text")),
            control=choice.control or all(part.is_baseline for part in parts),
            teacher=models.resolve(config.teacher),
            boundary=config.boundary,
            task=config.task,
            report=str(folder / REPORT),
        )
        points.append(point.dump())
    write_json(folder / POINTS, points)


def find_point(source: str, defense: str | None = None) -> Point:
    """The point of a run folder, a checkpoint's folder, or a model's name.

    Args:
        defense: the name of one of the run's points; needed only if there are several.

    Raises:
        ConfigError: if no point or several fit, or the check of the export did not pass.
    """
    folder = Path(source).expanduser()
    if (folder / POINTS).is_file():
        point = _of_run(folder, defense)
    elif (folder / "config.json").is_file() and _is_run(folder):
        raise ConfigError(
            f"{source} is a run without {POINTS}: it did not end, or an older version made it; "
            "run its pipeline again, which takes finished stages from the cache"
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
    candidates = named if defense is not None else [p for p in points if not p.control]
    if len(candidates) == 1:
        return candidates[0]
    labels = ", ".join(point.label for point in points) or "nothing"
    kind = "that are no controls" if defense is None else f"called {defense!r}"
    raise ConfigError(
        f"{folder} has {len(candidates)} points {kind}; choose with defense=NAME or "
        f"defense='NAME (STRENGTH)' from {labels}"
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
    """Refuse a head whose export was not finished or not checked, or was changed afterwards."""
    stage = checkpoint.parent
    if not (stage / "head.json").is_file():
        if stage.name.startswith((".head-", "head-")):
            raise ConfigError(
                f"{checkpoint} comes from training that did not end: its export was never checked; "
                "run the workflow that made it again"
            )
        return
    head = json.loads((stage / "head.json").read_text())
    check = head.get("export")
    if not (stage / RECORD).is_file() or check is None:
        raise ConfigError(f"{checkpoint} has no finished export check; run its workflow again")
    difference = check["largest_logit_difference"]
    tolerance = TOLERANCE if check.get("float32", True) else LOW_PRECISION_TOLERANCE
    # Written so that NaN does not pass.
    if check["tied"] or not difference <= tolerance:
        raise ConfigError(
            f"{checkpoint} did not pass its export check (logits {difference:.2g} away, "
            f"tied: {check['tied']}); it is not served"
        )
    if head.get("undefended"):
        raise ConfigError(
            f"{checkpoint} has the undefended head: no round of its training kept the utility "
            "floor. To serve it all the same, give the teacher itself as the source"
        )
    fingerprint = head.get("fingerprint")
    if fingerprint is not None and fingerprint != models.fingerprint(str(checkpoint)):
        raise ConfigError(
            f"{checkpoint} was changed after its export check; run its workflow again"
        )
