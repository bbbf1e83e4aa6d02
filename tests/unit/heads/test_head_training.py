"""The search for a strength: good rounds go on, bad rounds leave no trace, kills cost nothing."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from azeotrope.defenses.base import Defense, DefenseConfig
from azeotrope.heads.features import FeatureBatch, FeaturePair, Features
from azeotrope.heads.head import Head, ProxyHead
from azeotrope.heads.search import (
    HeadResult,
    HeadTraining,
    Round,
    Utility,
    UtilityFloor,
    train_head,
)
from azeotrope.training import TokenSum

CLEAN = Utility(0.9, 0.8)
GOOD, BAD = Utility(0.9, 0.8), Utility(0.1, 0.8)


class Killed(Exception):
    """Stands for the process that dies."""


class Pull(Defense):
    """Draws every logit towards minus the strength: each round's strength shows in the head."""

    stage = "weights"

    def loss(self, head: Head, proxies: tuple[ProxyHead, ...], batch: FeatureBatch) -> TokenSum:
        logits = batch.teacher @ head.weight.T
        return TokenSum((logits + self.strength).square().sum(), len(batch.targets))


def pull(strength: float = 0.5) -> Pull:
    return Pull(DefenseConfig(name="pull", strength=strength))


def data() -> list[FeaturePair]:
    generator = torch.Generator().manual_seed(2)
    found = []
    for index in range(5):
        tokens = index + 2
        flags = torch.ones(tokens, dtype=torch.bool)
        hidden = torch.randn(tokens, 3, generator=generator)
        found.append(
            FeaturePair(Features(f"trace-{index}", torch.arange(tokens), flags, flags, hidden), ())
        )
    return found


def new_head(seed: int = 1) -> Head:
    return Head(torch.randn(4, 3, generator=torch.Generator().manual_seed(seed)))


def training(rounds: int = 4, **floor: object) -> HeadTraining:
    return HeadTraining.model_validate(
        {
            "fit": {"steps": 4, "batch_size": 2, "checkpoint_every": 2, "log_every": 1},
            "floor": {"rounds": rounds, "raise_by": 2.0, "lower_by": 0.25, **floor},
        }
    )


def scripted(utilities: Iterable[Utility | Exception]) -> Callable[[Head], Utility]:
    """A teacher that answers as well as the script says."""
    waiting = iter(utilities)

    def measure(head: Head) -> Utility:
        found = next(waiting)
        if isinstance(found, Exception):
            raise found
        return found

    return measure


def search(
    head: Head, utilities: Iterable[Utility | Exception], config: HeadTraining, **more: object
) -> HeadResult:
    return train_head(
        head, (), data(), pull(), config, measure=scripted(utilities), clean=CLEAN, **more
    )


def test_good_rounds_raise_the_strength() -> None:
    head = new_head()
    result = search(head, [GOOD] * 4, training())
    assert [item.strength for item in result.rounds] == [0.5, 1.0, 2.0, 4.0]
    assert all(item.accepted for item in result.rounds)
    assert result.strength == 4.0
    assert len(result.log) == 4 * 4
    assert [item.loss for item in result.rounds] == [entry.loss for entry in result.log[3::4]]


def test_a_bad_round_is_undone_bit_for_bit_and_lowers_the_strength() -> None:
    once, thrice = new_head(), new_head()
    search(once, [GOOD], training(1))
    seen: list[Tensor] = []
    script = iter([GOOD, BAD, BAD])

    def measure(head: Head) -> Utility:
        seen.append(head.weight.detach().clone())
        return next(script)

    result = train_head(thrice, (), data(), pull(), training(3), measure=measure, clean=CLEAN)
    assert [item.accepted for item in result.rounds] == [True, False, False]
    assert [item.strength for item in result.rounds] == [0.5, 1.0, 0.25]
    assert result.strength == 0.5
    assert torch.equal(thrice.weight, once.weight)
    assert not torch.equal(seen[1], seen[0])


def test_if_nothing_is_good_the_head_is_as_it_was() -> None:
    head, before = new_head(), new_head()
    result = search(head, [BAD] * 3, training(3))
    assert [item.strength for item in result.rounds] == [0.5, 0.125, 0.03125]
    assert result.strength == 0.0
    assert torch.equal(head.weight, before.weight)


@pytest.mark.parametrize(
    ("utility", "accepted"),
    [
        (Utility(0.45, 0.4), True),
        (Utility(0.44, 0.8), False),
        (Utility(0.9, 0.39), False),
        (Utility(1.0, 1.0), True),
    ],
)
def test_greedy_and_sampled_answers_must_both_stay_above_the_floor(
    utility: Utility, accepted: bool
) -> None:
    result = search(new_head(), [utility], training(1, greedy=0.5, sampled=0.5))
    assert result.rounds[0].accepted is accepted
    assert result.rounds[0].utility == utility


@pytest.mark.parametrize(("begun", "accepted"), [(0.45, True), (0.44, False), (None, False)])
def test_answers_that_others_began_count_where_the_floor_asks(
    begun: float | None, accepted: bool
) -> None:
    clean = replace(CLEAN, begun=0.9)
    useful = replace(GOOD, begun=begun)
    floor = UtilityFloor(begun=0.5)
    assert floor.holds(useful, clean) is accepted
    assert UtilityFloor().holds(useful, clean)
    assert not floor.holds(replace(BAD, begun=1.0), clean)


SCRIPT = [GOOD, BAD, GOOD, BAD]


@pytest.mark.parametrize("at", range(4))
@pytest.mark.parametrize("where", ["measure", "after the round"])
def test_a_killed_search_ends_as_if_nothing_had_happened(
    where: str, at: int, tmp_path: Path
) -> None:
    straight = new_head()
    expected = search(straight, SCRIPT, training())

    def die(this: Round) -> None:
        if where != "measure" and this.number == at:
            raise Killed

    utilities: list[Utility | Exception] = list(SCRIPT)
    if where == "measure":
        utilities[at] = Killed()
    with pytest.raises(Killed):
        search(new_head(), utilities, training(), folder=tmp_path, on_round=die)
    done = at if where == "measure" else at + 1
    resumed = new_head()
    found = search(resumed, SCRIPT[done:], training(), folder=tmp_path)
    assert torch.equal(resumed.weight, straight.weight)
    assert found == expected


def test_a_search_killed_within_a_round_ends_the_same(tmp_path: Path) -> None:
    straight = new_head()
    expected = search(straight, SCRIPT, training())
    steps = 0

    def die(entry: object) -> None:
        nonlocal steps
        steps += 1
        # The third of the four steps of the second round; a checkpoint was made after two.
        if steps == 7:
            raise Killed

    with pytest.raises(Killed):
        search(new_head(), SCRIPT, training(), folder=tmp_path, on_step=die)
    resumed = new_head()
    found = search(resumed, SCRIPT[1:], training(), folder=tmp_path)
    assert torch.equal(resumed.weight, straight.weight)
    assert found == expected


def test_a_finished_search_is_not_repeated(tmp_path: Path) -> None:
    head, again = new_head(), new_head(99)
    expected = search(head, SCRIPT, training(), folder=tmp_path)
    found = search(again, [], training(), folder=tmp_path)
    assert found == expected
    assert torch.equal(again.weight, head.weight)


def test_without_a_floor_it_trains_once_and_asks_nobody() -> None:
    config = training().model_copy(update={"floor": None})
    head, searched = new_head(), new_head()
    result = train_head(head, (), data(), pull(), config)
    search(searched, [GOOD], training(1))
    assert result.rounds == []
    assert result.strength == 0.5
    assert len(result.log) == 4
    assert result.log[-1].loss < result.log[0].loss
    assert torch.equal(head.weight, searched.weight)


def test_a_floor_needs_somebody_to_measure() -> None:
    for given in ({}, {"measure": scripted([GOOD])}, {"clean": CLEAN}):
        with pytest.raises(ValueError, match="a utility floor needs `measure`"):
            train_head(new_head(), (), data(), pull(), training(), **given)


def test_strength_zero_does_nothing_and_asks_nobody() -> None:
    head, before = new_head(), new_head()
    assert train_head(head, (), data(), pull(0), training()) == HeadResult()
    assert torch.equal(head.weight, before.weight)


def test_naming_one_setting_of_the_fit_keeps_the_others_of_a_head() -> None:
    plain = HeadTraining()
    changed = HeadTraining.model_validate({"fit": {"learning_rate": 1e-3}})
    assert changed.fit == plain.fit.model_copy(update={"learning_rate": 1e-3})


# Texts held out, and scores


class Watched(Pull):
    """Notes what it is trained on and what it is scored on; scores are as scripted."""

    def __init__(self, scores: Iterable[float | None] = ()) -> None:
        super().__init__(DefenseConfig(name="watched", strength=0.5))
        self.scores = iter(scores)
        self.trained: set[str] = set()
        self.scored: list[tuple[str, ...]] = []

    def loss(self, head: Head, proxies: tuple[ProxyHead, ...], batch: FeatureBatch) -> TokenSum:
        self.trained.update(batch.ids)
        total, count, _ = super().loss(head, proxies, batch)
        return TokenSum(total, count, {"pull": float(total.detach()) / count})

    def score(
        self, head: Head, proxies: tuple[ProxyHead, ...], batch: FeatureBatch
    ) -> float | None:
        self.scored.append(batch.ids)
        return next(self.scores, None)


def texts(own: int, truth: int) -> list[FeaturePair]:
    """So many of the teacher's own texts and of the ground truth, in turn."""
    generator = torch.Generator().manual_seed(2)
    found = []
    for number in range(max(own, truth)):
        for kind, count in (("own", own), ("truth", truth)):
            if number < count:
                flags = torch.ones(3, dtype=torch.bool)
                hidden = torch.randn(3, 3, generator=generator)
                name = f"{kind}-{number}"
                features = Features(name, torch.arange(3), flags, flags, hidden, kind == "own")
                found.append(FeaturePair(features, ()))
    return found


def watched_search(
    defense: Watched,
    pairs: list[FeaturePair],
    utilities: Iterable[Utility | Exception],
    *,
    held_out: int = 64,
    head: Head | None = None,
    measure: Callable[[Head], Utility] | None = None,
    **more: object,
) -> HeadResult:
    found = list(utilities)
    config = training(len(found)).model_copy(update={"held_out": held_out})
    return train_head(
        head or new_head(), (), pairs, defense, config,
        measure=measure or scripted(found), clean=CLEAN, **more,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("own", "truth", "held_out", "kept"),
    [
        (3, 6, 2, ["truth-4", "truth-5"]),
        (3, 6, 3, ["truth-3", "truth-4", "truth-5"]),
        # Never more than half of the ground truth.
        (3, 6, 64, ["truth-3", "truth-4", "truth-5"]),
        (3, 5, 64, ["truth-3", "truth-4"]),
        (0, 4, 1, ["truth-3"]),
        # One text cannot be both learned from and kept.
        (3, 1, 64, []),
        (3, 0, 64, []),
    ],
)
def test_the_last_of_the_ground_truth_are_kept_from_training(
    own: int, truth: int, held_out: int, kept: list[str]
) -> None:
    defense = Watched([0.5] * 2)
    pairs = texts(own, truth)
    watched_search(defense, pairs, [GOOD, GOOD], held_out=held_out)
    everything = {pair.teacher.id for pair in pairs}
    assert defense.trained == everything - set(kept)
    # Own texts are scored too, for defenses that look at those; they are learned from.
    mine = [f"own-{number}" for number in range(own)][-held_out:]
    assert defense.scored == [(*kept, *mine)] * 2


def test_without_a_floor_nothing_is_held_out_and_nothing_scored() -> None:
    defense, pairs = Watched([0.5]), texts(2, 4)
    train_head(new_head(), (), pairs, defense, training().model_copy(update={"floor": None}))
    assert defense.trained == {pair.teacher.id for pair in pairs}
    assert defense.scored == []


@pytest.mark.parametrize(
    ("utilities", "scores", "chosen"),
    [
        ([GOOD, GOOD, GOOD], [0.9, 0.5, 0.7], 1),
        ([GOOD, GOOD, GOOD], [0.5, 0.9, 0.7], 0),
        ([GOOD, GOOD, GOOD], [0.9, 0.7, 0.5], 2),
        # The lowest score of all, but a teacher that is of no use.
        ([GOOD, BAD, GOOD], [0.9, 0.1, 0.7], 2),
        ([BAD, GOOD, BAD], [0.1, 0.9, 0.1], 1),
        # Equal is no better.
        ([GOOD, GOOD], [0.5, 0.5], 0),
    ],
)
def test_of_the_rounds_that_keep_the_floor_the_lowest_score_is_chosen(
    utilities: list[Utility], scores: list[float], chosen: int
) -> None:
    seen: list[Tensor] = []
    script = iter(utilities)

    def measure(head: Head) -> Utility:
        seen.append(head.weight.detach().clone())
        return next(script)

    head = new_head()
    result = watched_search(Watched(scores), texts(2, 4), utilities, head=head, measure=measure)
    assert [item.score for item in result.rounds] == scores
    assert [item.accepted for item in result.rounds] == [item is GOOD for item in utilities]
    assert torch.equal(head.weight, seen[chosen])
    assert result.strength == result.rounds[chosen].strength
    assert not any(torch.equal(seen[chosen], seen[i]) for i in range(len(seen)) if i != chosen)


def test_a_useful_round_raises_the_strength_whatever_its_score() -> None:
    result = watched_search(Watched([0.2, 0.9, 0.8, 0.1]), texts(2, 4), [GOOD, GOOD, BAD, GOOD])
    assert [item.strength for item in result.rounds] == [0.5, 1.0, 2.0, 0.5]
    assert result.strength == 0.5


def test_without_scores_the_last_useful_round_is_chosen() -> None:
    result = watched_search(Watched([None] * 3), texts(2, 4), [GOOD, GOOD, BAD])
    assert [item.score for item in result.rounds] == [None] * 3
    assert result.strength == 1.0


@pytest.mark.parametrize("at", range(4))
def test_a_killed_search_remembers_the_best_score(at: int, tmp_path: Path) -> None:
    utilities, scores = [GOOD, GOOD, BAD, GOOD], [0.5, 0.9, 0.1, 0.6]
    straight = new_head()
    pairs = texts(2, 4)
    expected = watched_search(Watched(scores), pairs, utilities, head=straight)
    assert expected.strength == 0.5, "none of the later rounds is better than the first"

    def die(this: Round) -> None:
        if this.number == at:
            raise Killed

    with pytest.raises(Killed):
        watched_search(Watched(scores), pairs, utilities, folder=tmp_path, on_round=die)
    resumed = new_head(99)
    script = scripted(utilities[at + 1 :])
    found = watched_search(
        Watched(scores[at + 1 :]), pairs, utilities, head=resumed, measure=script, folder=tmp_path
    )
    assert found == expected
    assert [item.score for item in found.rounds] == scores
    assert all(entry.parts.keys() == {"pull"} for entry in found.log)
    assert torch.equal(resumed.weight, straight.weight)


def test_a_floor_that_no_pass_is_held_to_is_refused() -> None:
    late = {"refreshes": 1, "floor": {"from_pass": 2}}
    with pytest.raises(ValueError, match=r"from_pass 2 is no pass of 2 .* would never be held"):
        HeadTraining.model_validate(late)
    last = HeadTraining.model_validate({"refreshes": 2, "floor": {"from_pass": 2}})
    assert last.floor is not None
    assert last.floor.from_pass == 2
