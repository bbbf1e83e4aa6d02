"""The students of a run: one cell of the comparison each."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from experiment.settings import DefenseChoice, ExperimentConfig, StudentConfig

SFT_ONLY = "sft_only"
"""The baseline that learns from the ground truth and from no teacher."""


@dataclass(frozen=True)
class Cell:
    """One student to train: the traces, the attack with its variant and clean-ups, and the seed."""

    student: StudentConfig
    defense: str
    strength: float
    attack: str
    variant: str
    cleanup: str
    traces: int
    seed: int


def baseline_cells(config: ExperimentConfig) -> list[Cell]:
    """The students of the ground truth and of the undefended teacher."""
    return list(_baseline_cells(config))


def _baseline_cells(config: ExperimentConfig) -> Iterator[Cell]:
    main = _attack_name(config.attack)
    for seed, student in _seeds_and_students(config):
        yield Cell(student, "none", 0.0, SFT_ONLY, "none", "none", config.traces, seed)
        for traces in _budgets(config, seed):
            yield Cell(student, "none", 0.0, *main, "none", traces, seed)
        for cleanup in config.cleanup_labels:
            yield Cell(student, "none", 0.0, *main, cleanup, config.traces, seed)
        for attack in config.attacks:
            if attack["on_clean"]:
                further = _attack_name(attack)
                yield Cell(student, "none", 0.0, *further, "none", config.traces, seed)


def defended_cells(config: ExperimentConfig, choice: DefenseChoice, strength: float) -> list[Cell]:
    """The students of one defended teacher."""
    return list(_defended_cells(config, choice, strength))


def _defended_cells(
    config: ExperimentConfig, choice: DefenseChoice, strength: float
) -> Iterator[Cell]:
    main, defense = _attack_name(config.attack), (choice.label, strength)
    is_baseline = choice.control or all(part.is_baseline for part in choice.resolve())
    for seed, student in _seeds_and_students(config):
        # Baselines get no clean-ups: a bare answer has nothing to clean.
        for traces in (config.traces,) if is_baseline else _budgets(config, seed):
            yield Cell(student, *defense, *main, "none", traces, seed)
        for cleanup in () if is_baseline else config.cleanup_labels:
            yield Cell(student, *defense, *main, cleanup, config.traces, seed)
        # Attacks on logits need a checkpoint that computes what clients see.
        for attack in config.attacks if choice.changes_weights_alone else ():
            if not choice.control or attack["variant"] == "none":
                yield Cell(student, *defense, *_attack_name(attack), "none", config.traces, seed)


def cells_of(config: ExperimentConfig) -> list[Cell]:
    """Every student that a run trains; their strengths are left at 0."""
    defended = (cell for c in config.defenses for cell in defended_cells(config, c, 0.0))
    return [*baseline_cells(config), *defended]


def _attack_name(attack: dict[str, Any]) -> tuple[str, str]:
    """An attack's name and variant."""
    return attack["name"], attack["variant"]


def _seeds_and_students(config: ExperimentConfig) -> Iterator[tuple[int, StudentConfig]]:
    for seed in config.seeds:
        for student in config.students:
            yield seed, student


def _budgets(config: ExperimentConfig, seed: int) -> tuple[int, ...]:
    """Numbers of traces that the attacker takes, for students of one seed."""
    on_curve = config.curve_seeds is None or seed in config.curve_seeds
    return tuple(sorted({config.traces, *(config.budgets if on_curve else ())}))
