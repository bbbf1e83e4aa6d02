"""The search for a strength: good rounds go on, bad rounds are undone, killed searches resume."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from search_cases import BAD, CLEAN, GOOD, Killed, data, new_head, pull, search, training
from torch import Tensor

from azeotrope.heads.head import Head
from azeotrope.heads.rounds import HeadResult, Round
from azeotrope.heads.search import HeadSearch, HeadTraining, UtilityCheck
from azeotrope.heads.utility import Utility, UtilityFloor


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
    measured: list[Tensor] = []
    script = iter([GOOD, BAD, BAD])

    def measure(head: Head) -> Utility:
        measured.append(head.weight.detach().clone())
        return next(script)

    check = UtilityCheck(measure, CLEAN)
    result = HeadSearch(thrice, (), data(), pull(), training(3)).run(check)
    assert [item.accepted for item in result.rounds] == [True, False, False]
    assert [item.strength for item in result.rounds] == [0.5, 1.0, 0.25]
    assert result.strength == 0.5
    assert torch.equal(thrice.weight, once.weight)
    assert not torch.equal(measured[1], measured[0])


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
    resumed_result = search(resumed, SCRIPT[done:], training(), folder=tmp_path)
    assert torch.equal(resumed.weight, straight.weight)
    assert resumed_result == expected


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
    resumed_result = search(resumed, SCRIPT[1:], training(), folder=tmp_path)
    assert torch.equal(resumed.weight, straight.weight)
    assert resumed_result == expected


def test_a_finished_search_is_not_repeated(tmp_path: Path) -> None:
    head, again = new_head(), new_head(99)
    expected = search(head, SCRIPT, training(), folder=tmp_path)
    resumed_result = search(again, [], training(), folder=tmp_path)
    assert resumed_result == expected
    assert torch.equal(again.weight, head.weight)


def test_without_a_floor_it_trains_once_and_asks_nobody() -> None:
    config = training().model_copy(update={"floor": None})
    head, searched = new_head(), new_head()
    result = HeadSearch(head, (), data(), pull(), config).run()
    search(searched, [GOOD], training(1))
    assert result.rounds == []
    assert result.strength == 0.5
    assert len(result.log) == 4
    assert result.log[-1].loss < result.log[0].loss
    assert torch.equal(head.weight, searched.weight)


def test_a_floor_needs_a_check() -> None:
    with pytest.raises(ValueError, match="a utility floor needs a check"):
        HeadSearch(new_head(), (), data(), pull(), training()).run()


def test_strength_zero_does_nothing_and_asks_nobody() -> None:
    head, before = new_head(), new_head()
    assert HeadSearch(head, (), data(), pull(0), training()).run() == HeadResult()
    assert torch.equal(head.weight, before.weight)


def test_naming_one_setting_of_the_fit_keeps_the_others_of_a_head() -> None:
    plain = HeadTraining()
    changed = HeadTraining.model_validate({"fit": {"learning_rate": 1e-3}})
    assert changed.fit == plain.fit.model_copy(update={"learning_rate": 1e-3})
