"""The search for a strength: good rounds go on, bad rounds leave no trace, kills cost nothing."""

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from azeotrope.defenses.base import Defense, DefenseConfig, Head, ProxyHead
from azeotrope.features import FeatureBatch, FeaturePair, Features
from azeotrope.head_training import HeadResult, HeadTraining, Round, Utility, train_head
from azeotrope.training import TokenSum

CLEAN = Utility(0.9, 0.8)
GOOD, BAD = Utility(0.9, 0.8), Utility(0.1, 0.8)


class Killed(Exception):
    """Stands for the process that dies."""


class Pull(Defense):
    """Draws every logit towards minus the strength: each round's strength shows in the head."""

    stage = "weights"

    def __init__(self, config: DefenseConfig) -> None:
        super().__init__(config)
        self.strength = config.strength

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
