"""Train a defended head from stored features, and keep the teacher useful while doing it.

Teacher-forced loss does not show when a head makes generation collapse, so after every round of
steps the defended teacher *writes* answers to held-out problems. A round that keeps accuracy above
the floor is accepted and the strength rises; one that does not is rolled back to the last good
head and the strength falls.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from pydantic import Field, field_validator, model_validator
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from azeotrope.config import Config
from azeotrope.files import written_whole
from azeotrope.heads.features import FeatureBatch, FeaturePair, join
from azeotrope.heads.head import Head
from azeotrope.training import FitConfig, LogEntry, TokenSum, fit

STATE = "search.safetensors"


_FIT: dict[str, Any] = {
    "steps": 100,
    "batch_size": 16,
    "learning_rate": 3e-3,
    "schedule": "cosine",
    "weight_decay": 0.01,
}


class UtilityFloor(Config):
    """The constraint on generated accuracy, as shares of the clean teacher's.

    A few hundred problems choose the head, so its accuracy on new ones is a little lower: set the
    floor above what must be kept.
    """

    greedy: float = Field(default=0.98, gt=0, le=1)
    sampled: float = Field(default=0.95, gt=0, le=1)
    begun: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="of greedy answers that somebody else began, in the words of the ground truth; "
        "null does not ask, and lets a head be useful in its own style alone",
    )
    problems: int = Field(default=300, ge=1, description="held-out validation problems")
    temperature: float = Field(default=1.0, gt=0, description="of the sampled check")
    rounds: int = Field(default=4, ge=1)
    raise_by: float = Field(
        default=1.25, ge=1, description="factor on the strength after a good round"
    )
    lower_by: float = Field(default=0.5, gt=0, lt=1, description="factor after a bad one")
    from_pass: int = Field(
        default=0,
        ge=0,
        description="the first pass that is held to the floor. Earlier ones may fall below it "
        "where later ones repair the teacher on what it writes then",
    )

    def holds(self, found: "Utility", clean: "Utility") -> bool:
        """Whether a teacher is as useful as it must be, beside the undefended one."""
        asked = [
            (self.greedy, found.greedy, clean.greedy),
            (self.sampled, found.sampled, clean.sampled),
        ]
        if self.begun is not None:
            asked.append((self.begun, found.begun or 0.0, clean.begun or 0.0))
        return all(now >= share * before for share, now, before in asked)


@runtime_checkable
class HeadObjective(Protocol):
    """What a search needs of a defense that trains a head."""

    config: Any
    """Its settings; `strength` is the one that was asked for."""
    strength: float
    """The weight of the adversarial term in the summed loss."""

    @property
    def is_identity(self) -> bool:
        """Whether training would leave the head as it is."""

    def scaled(self, factor: float) -> "HeadObjective":
        """The same objective with its strength multiplied by `factor`."""
        ...

    def calibrate(self, completion_tokens: int, reasoning_tokens: int, sequences: int) -> None:
        """Learn the shape of the training data before the first step."""

    def loss(self, head: Any, proxies: tuple[Any, ...], batch: FeatureBatch) -> TokenSum:
        """The objective to minimise over the head's parameters."""

    def score(self, head: Any, proxies: tuple[Any, ...], batch: FeatureBatch) -> float | None:
        """How little a student learns from held-out texts; lower is better, None says nothing."""


class HeadTraining(Config):
    """How long and how carefully a head is trained."""

    fit: FitConfig = Field(default_factory=lambda: FitConfig.model_validate(_FIT))
    floor: UtilityFloor | None = Field(
        default_factory=UtilityFloor, description="null trains once, unconstrained, as published"
    )
    only_correct: bool = Field(
        default=True,
        description="learn only from own answers that are right; the paper takes all of them",
    )
    refreshes: int = Field(
        default=1,
        ge=0,
        description="times the defended teacher writes new traces and training goes on",
    )
    refresh_traces: int | None = Field(
        default=None, ge=1, description="traces of each later pass; null takes as many as the first"
    )
    refresh_temperature: float | None = Field(
        default=None, gt=0, description="at which those are drawn; null draws as the thief does"
    )
    rarest: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="share of the first pass's right traces to learn from: those that the proxies "
        "find least likely, which is the teacher's most private way of writing",
    )
    truth: int = Field(
        default=0,
        ge=0,
        description="ground-truth texts given to the defense beside the teacher's own",
    )
    apart: bool = Field(
        default=False, description="train on other problems than those that the thief will have"
    )
    held_out: int = Field(
        default=64,
        ge=1,
        description="texts kept from training, on which a defense that has a score is scored",
    )

    @field_validator("fit", mode="before")
    @classmethod
    def _keep_the_rest(cls, given: Any) -> Any:
        """Who names one setting keeps the others of a head, not those of a student."""
        return {**_FIT, **given} if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _floor_is_held(self) -> "HeadTraining":
        if self.floor is not None and self.floor.from_pass > self.refreshes:
            raise ValueError(
                f"floor.from_pass {self.floor.from_pass} is no pass of {self.refreshes + 1} "
                f"(counted from 0; refreshes {self.refreshes}), so the floor would never be held; "
                "lower it, or set floor=null to do without"
            )
        return self


@dataclass(frozen=True)
class Utility:
    """Accuracy of the teacher's own generated answers."""

    greedy: float
    sampled: float
    begun: float | None = None
    """Where others began the answers; None if the floor does not ask."""


@dataclass
class Round:
    """One round of the search."""

    number: int
    strength: float
    utility: Utility | None
    accepted: bool
    loss: float
    score: float | None = None


@dataclass
class HeadResult:
    rounds: list[Round] = field(default_factory=list)
    log: list[LogEntry] = field(default_factory=list)
    strength: float = 0.0
    """The strength of the last accepted round; 0 if none was."""


def train_head(
    head: Head,
    proxies: tuple[nn.Module, ...],
    data: Sequence[FeaturePair],
    defense: HeadObjective,
    config: HeadTraining,
    *,
    measure: Callable[[Head], Utility] | None = None,
    clean: Utility | None = None,
    folder: Path | None = None,
    on_round: Callable[[Round], None] | None = None,
    on_step: Callable[[LogEntry], None] | None = None,
) -> HeadResult:
    """Train `head` in place; without an accepted round it ends as it began.

    Args:
        measure: lets the teacher with this head write answers; needed when there is a floor.
        clean: what the undefended teacher reaches; the floor is a share of it.
        folder: where finished rounds are kept, so that a killed search goes on from the last one.

    Raises:
        ValueError: if no token is adversarial, or a floor is set without `measure` and `clean`.
        NonFiniteLossError: if the objective stops being finite.
    """
    result = HeadResult()
    if defense.is_identity:
        return result
    defense.calibrate(
        completion_tokens=sum(len(pair.teacher.targets) for pair in data),
        reasoning_tokens=sum(int(pair.teacher.reasoning.sum()) for pair in data),
        sequences=len(data),
    )
    if config.floor is None:
        result.log = _fit(head, proxies, data, defense, config.fit, folder, 0, on_step)
        result.strength = defense.config.strength
        return result
    if measure is None or clean is None:
        raise ValueError("a utility floor needs `measure` and the clean teacher's utility")
    data, held_out = _split(data, config.held_out)
    score = partial(_score, proxies=proxies, held_out=held_out, defense=defense)
    _search(
        head,
        proxies,
        data,
        defense,
        config,
        measure,
        clean,
        score,
        folder,
        result,
        on_round,
        on_step,
    )
    return result


def _split(
    data: Sequence[FeaturePair], held_out: int
) -> tuple[Sequence[FeaturePair], Sequence[FeaturePair]]:
    """Texts to train on, and texts to score on, of which a defense takes those that it is about.

    The last of the ground truth are kept from training. Of its own texts a teacher has too few:
    the last are scored and trained on.
    """
    own = [pair for pair in data if pair.teacher.own]
    others = [pair for pair in data if not pair.teacher.own]
    kept = others[-min(held_out, len(others) // 2) :] if len(others) > 1 else []
    names = {pair.teacher.id for pair in kept}
    rest = [pair for pair in data if pair.teacher.own or pair.teacher.id not in names]
    return rest, [*kept, *own[-held_out:]]


def _score(
    head: Head,
    *,
    proxies: tuple[nn.Module, ...],
    held_out: Sequence[FeaturePair],
    defense: HeadObjective,
) -> float | None:
    return defense.score(head, proxies, join(held_out).to(head.weight.device))


def _search(
    head: Head,
    proxies: tuple[nn.Module, ...],
    data: Sequence[FeaturePair],
    defense: HeadObjective,
    config: HeadTraining,
    measure: Callable[[Head], Utility],
    clean: Utility,
    score: Callable[[Head], float | None],
    folder: Path | None,
    result: HeadResult,
    on_round: Callable[[Round], None] | None,
    on_step: Callable[[LogEntry], None] | None,
) -> None:
    floor = config.floor
    assert floor is not None
    factor = 1.0
    if folder is not None and (folder / STATE).is_file():
        factor = _load(folder, head, result)
    good = _copy(head)
    kept = [r.score for r in result.rounds if r.accepted and r.score is not None]
    best = min(kept, default=math.inf)
    for number in range(len(result.rounds), floor.rounds):
        scaled = defense.scaled(factor)
        log = _fit(head, proxies, data, scaled, config.fit, folder, number, on_step)
        utility = measure(head)
        accepted = floor.holds(utility, clean)
        strength = defense.config.strength * factor
        scored = score(head)
        loss = log[-1].loss if log else 0.0
        result.rounds.append(this := Round(number, strength, utility, accepted, loss, scored))
        result.log.extend(log)
        # A stronger head that a thief learns more from is no progress, however useful it is.
        if accepted and (scored is None or scored < best):
            good, result.strength = _copy(head), strength
            best = best if scored is None else scored
        else:
            _restore(head, good)
        factor *= floor.raise_by if accepted else floor.lower_by
        if folder is not None:
            _save(folder, good, result, factor)
        if on_round is not None:
            on_round(this)


def _fit(
    head: Head,
    proxies: tuple[nn.Module, ...],
    data: Sequence[FeaturePair],
    defense: HeadObjective,
    config: FitConfig,
    folder: Path | None,
    number: int,
    on_step: Callable[[LogEntry], None] | None,
) -> list[LogEntry]:
    device = head.weight.device

    def loss(items: list[FeaturePair]) -> TokenSum:
        return defense.loss(head, proxies, join(items).to(device))

    state = None if folder is None else folder / f"round-{number}"
    return fit(
        [parameter for parameter in head.parameters() if parameter.requires_grad],
        data,
        loss,
        # Another order of samples each round, the same one whenever the round is repeated.
        config.model_copy(update={"seed": config.seed + number}),
        checkpoint=state,
        on_step=on_step,
        identify=lambda pair: pair.teacher.id,
    ).log


def _copy(head: Head) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in head.named_parameters()}


def _restore(head: Head, saved: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in head.named_parameters():
            value.copy_(saved[name])


def _save(folder: Path, good: dict[str, Tensor], result: HeadResult, factor: float) -> None:
    described = {
        "factor": factor,
        "strength": result.strength,
        "rounds": [asdict(item) for item in result.rounds],
        "log": [asdict(item) for item in result.log],
    }
    tensors = {name: value.cpu().contiguous() for name, value in good.items()}
    with written_whole(folder / STATE) as temporary:
        save_file(tensors, temporary, metadata={"search": json.dumps(described)})


def _load(folder: Path, head: Head, result: HeadResult) -> float:
    with safe_open(folder / STATE, framework="pt") as file:
        described = json.loads(file.metadata()["search"])
        _restore(head, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    for item in described["rounds"]:
        utility = Utility(**item.pop("utility"))
        result.rounds.append(Round(**item, utility=utility))
    result.log.extend(LogEntry(**item) for item in described["log"])
    result.strength = described["strength"]
    return float(described["factor"])
