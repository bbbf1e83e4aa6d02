"""Train a defended head from stored features, and keep the teacher useful.

Teacher-forced loss does not show when a head makes generation collapse, so after every round of
steps the defended teacher *writes* answers to held-out problems. If they keep accuracy above the
floor, the round is accepted and the strength rises; otherwise the head goes back to the last good
one and the strength falls.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from pydantic import Field, field_validator, model_validator

from azeotrope.config import Config
from azeotrope.heads.features import FeatureBatch, FeaturePair, join
from azeotrope.heads.head import Head
from azeotrope.heads.rounds import (
    HeadResult,
    Round,
    SearchState,
    copy_parameters,
    load_state,
    restore_parameters,
)
from azeotrope.heads.utility import Utility, UtilityFloor
from azeotrope.training import FitConfig, LogEntry, TokenSum, fit

_FIT: dict[str, Any] = {
    "steps": 100,
    "batch_size": 16,
    "learning_rate": 3e-3,
    "schedule": "cosine",
    "weight_decay": 0.01,
}


class HeadTraining(Config):
    """How long and how carefully a head is trained."""

    fit: FitConfig = Field(default_factory=lambda: FitConfig.model_validate(_FIT))
    floor: UtilityFloor | None = Field(
        default_factory=UtilityFloor, description="null trains once, unconstrained, as published"
    )
    only_correct: bool = Field(
        default=True,
        description="learn only from the teacher's correct answers; the paper takes all of them",
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
        default=None,
        gt=0,
        description="temperature of those traces; null takes the temperature of the attacker's "
        "queries",
    )
    rarest: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="share of the first pass's correct traces to learn from: those that the "
        "proxies find least likely, which is the teacher's most private way of writing",
    )
    truth: int = Field(
        default=0,
        ge=0,
        description="ground-truth texts given to the defense beside the teacher's own",
    )
    apart: bool = Field(
        default=False, description="train on other problems than those that the attacker queries"
    )
    held_out: int = Field(
        default=64,
        ge=1,
        description="texts kept from training, on which a defense that has a score is scored",
    )

    @field_validator("fit", mode="before")
    @classmethod
    def _fill_from_head_defaults(cls, value: Any) -> Any:
        """Unspecified fields take the head defaults, not those of a student."""
        return {**_FIT, **value} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _floor_is_held(self) -> "HeadTraining":
        if self.floor is not None and self.floor.from_pass > self.refreshes:
            raise ValueError(
                f"floor.from_pass {self.floor.from_pass} is no pass of {self.refreshes + 1} "
                f"(counted from 0; refreshes {self.refreshes}), so the floor would never be held; "
                "lower it, or set floor=null to do without"
            )
        return self


@runtime_checkable
class HeadObjective(Protocol):
    """What a search needs of a defense that trains a head."""

    config: Any
    """Its settings; `config.strength` is the configured strength."""
    strength: float
    """The weight of the adversarial term in the summed loss."""

    @property
    def is_identity(self) -> bool:
        """Whether training would leave the head as it is."""
        ...

    def scaled(self, factor: float) -> "HeadObjective":
        """The same objective with its strength multiplied by `factor`."""
        ...

    def calibrate(self, completion_tokens: int, reasoning_tokens: int, sequences: int) -> None:
        """Learn the shape of the training data before the first step."""
        ...

    def loss(self, head: Any, proxies: tuple[Any, ...], batch: FeatureBatch) -> TokenSum:
        """The objective to minimise over the head's parameters."""
        ...

    def score(self, head: Any, proxies: tuple[Any, ...], batch: FeatureBatch) -> float | None:
        """How much a student learns from held-out texts; lower is better, None has no score."""
        ...


@dataclass(frozen=True)
class UtilityCheck:
    """How a search finds out whether a head keeps the floor."""

    measure: Callable[[Head], Utility]
    """Lets the teacher with this head write answers."""
    clean: Utility
    """What the undefended teacher reaches; the floor is a share of it."""


class HeadSearch:
    """Trains a head in place, at a strength that rises and falls with the teacher's utility.

    Args:
        head: what is trained. If no round is accepted, it ends as it began.
        proxies: frozen heads or surrogates, as the defense asks for them.
        folder: holds the finished rounds, so that a killed search goes on after the last one.
        on_round: called after each round, once its state is on disk.
        on_step: called after each logged step.
    """

    def __init__(
        self,
        head: Head,
        proxies: tuple[Any, ...],
        data: Sequence[FeaturePair],
        defense: HeadObjective,
        config: HeadTraining,
        *,
        folder: Path | None = None,
        on_round: Callable[[Round], None] | None = None,
        on_step: Callable[[LogEntry], None] | None = None,
    ) -> None:
        self.head = head
        self.proxies = proxies
        self.data = data
        self.defense = defense
        self.config = config
        self.folder = folder
        self.on_round = on_round
        self.on_step = on_step

    def run(self, check: UtilityCheck | None = None) -> HeadResult:
        """Train until the rounds are used up, or once if there is no floor.

        Args:
            check: measures the teacher's utility; needed when there is a floor.

        Raises:
            ValueError: if no token is adversarial, or a floor is set without `check`.
            NonFiniteLossError: if the objective stops being finite.
        """
        if self.defense.is_identity:
            return HeadResult()
        self.defense.calibrate(
            completion_tokens=sum(len(pair.teacher.targets) for pair in self.data),
            reasoning_tokens=sum(int(pair.teacher.reasoning.sum()) for pair in self.data),
            sequences=len(self.data),
        )
        if self.config.floor is None:
            log = self._fit(self.defense, self.data, 0)
            return HeadResult(log=log, strength=self.defense.config.strength)
        if check is None:
            raise ValueError(
                "a utility floor needs a check that measures the teacher and knows the clean "
                "teacher's utility; give one, or set floor=null"
            )
        return self._search(self.config.floor, check)

    def _search(self, floor: UtilityFloor, check: UtilityCheck) -> HeadResult:
        training_texts, held_out = _split(self.data, self.config.held_out)
        state = self._resume()
        for number in range(len(state.result.rounds), floor.rounds):
            defense = self.defense.scaled(state.factor)
            log = self._fit(defense, training_texts, number)
            utility = check.measure(self.head)
            finished = Round(
                number,
                # The configured strength, not the calibrated one: this is what users compare.
                strength=self.defense.config.strength * state.factor,
                utility=utility,
                accepted=floor.holds(utility, check.clean),
                loss=log[-1].loss if log else 0.0,
                score=defense.score(self.head, self.proxies, self._batch(held_out)),
            )
            self._choose(state, finished)
            state.result.log.extend(log)
            state.factor *= floor.raise_by if finished.accepted else floor.lower_by
            if self.folder is not None:
                state.save(self.folder)
            if self.on_round is not None:
                self.on_round(finished)
        return state.result

    def _resume(self) -> SearchState:
        """The state of an earlier attempt, with its head in place, or a new one."""
        state = None if self.folder is None else load_state(self.folder)
        if state is None:
            return SearchState(copy_parameters(self.head), HeadResult())
        restore_parameters(self.head, state.chosen)
        return SearchState(copy_parameters(self.head), state.result, state.factor)

    def _choose(self, state: SearchState, finished: Round) -> None:
        """Keep the round's head if it is useful and the best so far; undo the round otherwise."""
        # A stronger head from which a student learns more is no progress, however useful it is.
        improves = finished.score is None or finished.score < state.result.best_score
        state.result.rounds.append(finished)
        if finished.accepted and improves:
            state.chosen = copy_parameters(self.head)
            state.result.strength = finished.strength
        else:
            restore_parameters(self.head, state.chosen)

    def _fit(
        self, defense: HeadObjective, texts: Sequence[FeaturePair], number: int
    ) -> list[LogEntry]:
        def loss(pairs: list[FeaturePair]) -> TokenSum:
            return defense.loss(self.head, self.proxies, self._batch(pairs))

        config = self.config.fit
        return fit(
            [parameter for parameter in self.head.parameters() if parameter.requires_grad],
            texts,
            loss,
            # Another order of samples each round, the same one whenever the round is repeated.
            config.model_copy(update={"seed": config.seed + number}),
            checkpoint=None if self.folder is None else self.folder / f"round-{number}",
            on_step=self.on_step,
            identify=lambda pair: pair.teacher.id,
        ).log

    def _batch(self, pairs: Sequence[FeaturePair]) -> FeatureBatch:
        return join(pairs).to(self.head.weight.device)


def _split(
    data: Sequence[FeaturePair], held_out: int
) -> tuple[Sequence[FeaturePair], Sequence[FeaturePair]]:
    """Texts to train on, and texts to score on; a defense scores those that it is about.

    The last ground-truth texts are kept from training, at most half of them. The teacher's own
    texts are too few to spare any: the last are both scored and trained on.
    """
    own_texts = [pair for pair in data if pair.teacher.own]
    truth = [pair for pair in data if not pair.teacher.own]
    withheld = truth[-min(held_out, len(truth) // 2) :] if len(truth) > 1 else []
    withheld_ids = {pair.teacher.id for pair in withheld}
    training_texts = [
        pair for pair in data if pair.teacher.own or pair.teacher.id not in withheld_ids
    ]
    return training_texts, [*withheld, *own_texts[-held_out:]]
