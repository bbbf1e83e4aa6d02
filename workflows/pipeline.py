"""Defend a teacher, rob it, and report what the defense was worth.

    azeotrope pipeline pocket_demo
    azeotrope pipeline pocket_full seeds=[0]

Clean traces, baselines (base student, ground truth only, clean traces, answers only), defended
traces, students on them, clean-ups, exams; then `results.json`, `report.html` and a table. An
experiment without students ends with the teacher's exams, clean and defended. Every
stage is cached: a run that was killed, or a run that shares stages with another, goes on from
what is there and ends with the same numbers.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, as_completed, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from actors import session
from azeotrope import __version__
from azeotrope.attacks import base as attacks
from azeotrope.attacks.logits.attack import LogitAttack
from azeotrope.defenses.base import Defense
from azeotrope.files import write_json
from experiment.display import Display
from experiment.points import write_points
from experiment.preflight import preflight
from experiment.probes import probe
from experiment.results import Cell, Taught, link_stages, rows_of, write_results
from experiment.settings import DefenseChoice, ExperimentConfig, StudentConfig, load
from experiment.stages import Stage
from experiment.steps import Asked, Planned, Request, Steps
from experiment.terminal import print_findings, wide_console

QUEUE = 9
"""Students a Ray Train run teaches at most: few enough that no slot idles at the end."""
LEAST = 2
"""And at least, if there are as many: starting a run costs as much as teaching one."""


def run(config: ExperimentConfig, console: Console | None = None) -> Path:
    """Run the whole experiment; returns the run folder."""
    folder = Path(config.runs).resolve() / config.name
    preflight(config)
    write_json(folder / "config.json", {"azeotrope": __version__, "config": config.dump()})
    with Display(console) as display:
        steps = Steps(config, display)
        clean, base = _clean(config, steps)
        taught, students = _defend_and_rob(config, steps, clean)
        probed = probe(config, steps, clean, taught)
        rows = rows_of(config, clean, base, taught, students) + probed.rows
        heads = [head for item in taught for head in item.heads]
        link_stages(folder, [clean.traces, *(t.traces for t in taught), *heads, *students.values()])
    write_points(config, folder, taught)
    write_results(config, folder, rows, clean, taught, students, probed.notes)
    return folder


def clean_teacher(config: ExperimentConfig, steps: Steps) -> Taught:
    """What the undefended teacher writes."""
    traces, greedy, sampled = steps.traces(_teacher_requests(config, config.teacher, "none", ()))
    return Taught(None, traces, greedy, sampled)


def _clean(config: ExperimentConfig, steps: Steps) -> tuple[Taught, dict[str, Stage]]:
    """What the undefended teacher and the untaught students write, in one pass."""
    requests = _teacher_requests(config, config.teacher, "none", ())
    for student in config.students:
        requests.append(
            Request(
                student.model,
                student.name,
                config.exam_split,
                config.exam_problems,
                config.greedy,
            )
        )
    traces, greedy, sampled, *exams = steps.traces(requests)
    names = [student.name for student in config.students]
    return Taught(None, traces, greedy, sampled), dict(zip(names, exams, strict=True))


def _teacher_requests(
    config: ExperimentConfig, model: str, defense: str, decoding: tuple[dict[str, Any], ...]
) -> list[Request]:
    common = {"label": "teacher", "defense": defense, "decoding": decoding}
    count, split = config.teacher_problems, config.exam_split
    return [
        Request(model, split="train", count=config.most_traces, sampling=config.sampling, **common),
        Request(model, split=split, count=count, sampling=config.greedy, **common),
        Request(model, split=split, count=count, sampling=config.sampling, **common),
    ]


def _defend_and_rob(
    config: ExperimentConfig, steps: Steps, clean: Taught
) -> tuple[list[Taught], dict[Cell, Stage]]:
    """Train heads and students side by side: a student starts as soon as its traces exist."""
    truth = steps.ground_truth(config.most_traces)
    plans: dict[Cell, Planned] = {}
    robberies: list[Future[None]] = []
    width = _width(config, steps)
    with ThreadPoolExecutor(max_workers=width) as threads:

        def rob(cells: Sequence[Cell], victim: Taught) -> None:
            if not cells:
                return
            lookup = _Lookup(config, steps, truth, victim)
            new = [lookup.plan(cell) for cell in cells]
            plans.update(zip(cells, new, strict=True))
            size = min(QUEUE, max(LEAST, -(-len(new) // width)))
            for start in range(0, len(new), size):
                robberies.append(threads.submit(steps.students, new[start : start + size]))

        try:
            # Defenses first: what they write is what most students wait for.
            defended = [threads.submit(defend, config, steps, c, clean) for c in config.defenses]
            rob(list(_baseline_cells(config)), clean)
            for future in as_completed(defended):
                result = future.result()
                assert result.choice is not None
                rob(_defended_cells(config, result.choice, result.strength), result)
            for done in wait(robberies, return_when=FIRST_EXCEPTION).done:
                done.result()
        except BaseException:
            # Finished stages stay in the cache; those not yet started are not worth starting.
            threads.shutdown(wait=False, cancel_futures=True)
            steps.stop()
            raise
    taught = [future.result() for future in defended]
    return taught, {cell: plan.stage for cell, plan in plans.items()}


def _width(config: ExperimentConfig, steps: Steps) -> int:
    """Trainings that run side by side; each thread waits for Ray most of its time."""
    local = config.resources.num_cpus is None and not os.environ.get("RAY_ADDRESS")
    if local and not config.resources.gpus:
        cpus = os.cpu_count() or 1
        return max(1, int(cpus // (config.resources.cpus * config.resources.workers_per_student)))
    return steps.width()


@dataclass(frozen=True)
class _Lookup:
    """What the thief of one teacher gets for each attack."""

    config: ExperimentConfig
    steps: Steps
    truth: Stage
    victim: Taught

    def plan(self, cell: Cell) -> Planned:
        """The training of one student.

        Attacks on logits ask about the ground truth's texts, or about the teacher's own.
        """
        config, steps = self.config, self.steps
        what = cell.attack if cell.attack == "sft_only" else f"{cell.defense} {cell.attack}"
        attack = attacks.resolve(dict(config.attack_called(cell.attack, cell.variant)))
        if cell.attack == "sft_only" or not isinstance(attack, LogitAttack):
            source = self.truth if cell.attack == "sft_only" else self.victim.traces
            return steps.plan_student(
                cell.student,
                source,
                cell.traces,
                config.cleanup_called(cell.cleanup),
                cell.seed,
                what,
                attack=attack.config.dump(),
            )
        source = self.truth if attack.config.contexts == "truth" else self.victim.traces
        # The trunk is the undefended teacher's whatever the head is.
        features = steps.features(
            source, config.teacher, (), config.most_traces, only_correct=False
        )
        snapshot = config.teacher if attack.config.pairs else None
        return steps.plan_student(
            cell.student,
            source,
            cell.traces,
            "none",
            cell.seed,
            f"{what} {cell.variant}",
            attack=attack.config.dump(),
            asked=Asked(self.victim.checkpoint or config.teacher, features, snapshot),
        )


def defend(config: ExperimentConfig, steps: Steps, choice: DefenseChoice, clean: Taught) -> Taught:
    """Apply a composition: heads first, then decoding adjustments, rewriting last."""
    parts = choice.resolve()
    teacher, heads = config.teacher, []
    for part in (item for item in parts if item.stage == "weights" and not item.is_identity):
        found, teacher = _train_heads(config, steps, choice, part, teacher, clean)
        heads += found
    decoding = tuple(p.config.dump() for p in parts if p.stage == "decoding" and not p.is_identity)
    if heads or decoding:
        requests = _teacher_requests(config, teacher, choice.label, decoding)
        traces, greedy, sampled = steps.traces(requests)
    else:
        traces, greedy, sampled = clean.traces, clean.greedy, clean.sampled
    for part in (item for item in parts if item.stage == "text" and not item.is_identity):
        traces, greedy, sampled = (
            steps.rewritten(stage, part, choice.label) for stage in (traces, greedy, sampled)
        )
    return Taught(choice, traces, greedy, sampled, tuple(heads))


def _train_heads(
    config: ExperimentConfig,
    steps: Steps,
    choice: DefenseChoice,
    defense: Defense,
    teacher: str,
    clean: Taught,
) -> tuple[list[Stage], str]:
    """Train, then let the defended teacher write anew and train on, as often as asked."""
    training, heads = choice.training, []
    skip = config.most_traces if training.apart else 0
    proxies = config.proxies
    if choice.lesson is not None:
        proxies = steps.taught_proxies(choice.lesson, config.most_traces)
    given: list[Stage] = []
    if training.truth:
        texts = steps.ground_truth(training.truth, skip)
        given.append(
            steps.features(
                texts, teacher, proxies, training.truth, only_correct=False, layer=defense.layer
            )
        )
    for number in range(training.refreshes + 1):
        source, count = _own_traces(config, steps, choice, teacher, clean, number)
        own = steps.features(
            source,
            teacher,
            proxies,
            count,
            only_correct=training.only_correct,
            layer=defense.layer,
        )
        floor = training.floor
        held = floor is not None and number >= floor.from_pass
        heads.append(
            steps.head(
                [own, *given],
                teacher,
                proxies,
                defense.config.dump(),
                training if held else training.model_copy(update={"floor": None}),
                keeps_floor=floor is None or number == 0 or number > floor.from_pass,
            )
        )
        teacher = str(heads[-1].path / "teacher")
    return heads, teacher


def _own_traces(
    config: ExperimentConfig,
    steps: Steps,
    choice: DefenseChoice,
    teacher: str,
    clean: Taught,
    number: int,
) -> tuple[Stage, int]:
    """What the teacher wrote that the head is trained on in a pass, and how much of it."""
    training = choice.training
    count = config.head_traces or config.traces
    sampling = config.sampling
    if number:
        count = training.refresh_traces or count
        sampling = sampling.model_copy(
            update={"temperature": training.refresh_temperature or sampling.temperature}
        )
    first = number == 0 and teacher == config.teacher
    if first and count <= config.most_traces and not training.apart:
        source = clean.traces
    else:
        request = Request(
            teacher,
            "teacher",
            "train",
            count,
            sampling,
            defense="none" if first else choice.label,
            seed=number,
            skip=config.most_traces if training.apart else 0,
        )
        source = steps.traces([request])[0]
    if first and training.rarest is not None:
        source = steps.rarest(source, teacher, training.rarest)
    return source, count


def _baseline_cells(config: ExperimentConfig) -> Iterator[Cell]:
    main = (str(config.attack["name"]), str(config.attack["variant"]))
    for seed, student in _each(config):
        yield Cell(student, "none", 0.0, "sft_only", "none", "none", config.traces, seed)
        for traces in _budgets(config, seed):
            yield Cell(student, "none", 0.0, *main, "none", traces, seed)
        for cleanup in config.cleanup_labels:
            yield Cell(student, "none", 0.0, *main, cleanup, config.traces, seed)
        for attack in config.attacks:
            if attack["on_clean"]:
                yield _further(config, student, "none", 0.0, attack, seed)


def _defended_cells(config: ExperimentConfig, choice: DefenseChoice, strength: float) -> list[Cell]:
    cells: list[Cell] = []
    main = (str(config.attack["name"]), str(config.attack["variant"]))
    is_baseline = choice.control or all(part.is_baseline for part in choice.resolve())
    for seed, student in _each(config):
        # A yardstick gets no clean-ups, and there is nothing in a bare answer to clean.
        for traces in (config.traces,) if is_baseline else _budgets(config, seed):
            cells.append(Cell(student, choice.label, strength, *main, "none", traces, seed))
        for cleanup in () if is_baseline else config.cleanup_labels:
            cells.append(Cell(student, choice.label, strength, *main, cleanup, config.traces, seed))
        if choice.changes_weights_alone:
            for other in config.attacks:
                if not choice.control or other["variant"] == "none":
                    cells.append(_further(config, student, choice.label, strength, other, seed))
    return cells


def _further(
    config: ExperimentConfig,
    student: StudentConfig,
    defense: str,
    strength: float,
    attack: dict[str, Any],
    seed: int,
) -> Cell:
    """One of the further attacks, without clean-ups."""
    name, variant = attack["name"], attack["variant"]
    return Cell(student, defense, strength, name, variant, "none", config.traces, seed)


def cells_of(config: ExperimentConfig) -> list[Cell]:
    """Every student that a run trains; their strengths are left at 0."""
    defended = (c for choice in config.defenses for c in _defended_cells(config, choice, 0.0))
    return [*_baseline_cells(config), *defended]


def _each(config: ExperimentConfig) -> Iterator[tuple[int, StudentConfig]]:
    for seed in config.seeds:
        for student in config.students:
            yield seed, student


def _budgets(config: ExperimentConfig, seed: int) -> tuple[int, ...]:
    """How many traces are stolen, for students of one seed."""
    on_curve = config.curve_seeds is None or seed in config.curve_seeds
    return tuple(sorted({config.traces, *(config.budgets if on_curve else ())}))


def main(name: str, overrides: list[str]) -> None:
    """What `azeotrope pipeline` runs."""
    console = wide_console()
    folder = run(load(name, overrides), console)
    print_findings(folder, console)
    session.stop()
