"""Texts held out from a head search, and the round that their scores choose."""

from pathlib import Path

import pytest
import torch
from search_cases import (
    BAD,
    GOOD,
    Killed,
    Watched,
    new_head,
    scripted,
    texts,
    training,
    watched_search,
)
from torch import Tensor

from azeotrope.heads.head import Head
from azeotrope.heads.rounds import Round
from azeotrope.heads.search import HeadSearch, HeadTraining
from azeotrope.heads.utility import Utility


@pytest.mark.parametrize(
    ("own", "truth", "held_out", "withheld"),
    [
        (3, 6, 2, ["truth-4", "truth-5"]),
        (3, 6, 3, ["truth-3", "truth-4", "truth-5"]),
        # Never more than half of the ground truth.
        (3, 6, 64, ["truth-3", "truth-4", "truth-5"]),
        (3, 5, 64, ["truth-3", "truth-4"]),
        (0, 4, 1, ["truth-3"]),
        # One text cannot be both learned from and withheld.
        (3, 1, 64, []),
        (3, 0, 64, []),
    ],
)
def test_the_last_ground_truth_texts_are_withheld_from_training(
    own: int, truth: int, held_out: int, withheld: list[str]
) -> None:
    defense = Watched([0.5] * 2)
    pairs = texts(own, truth)
    watched_search(defense, pairs, [GOOD, GOOD], held_out=held_out)
    all_ids = {pair.teacher.id for pair in pairs}
    assert defense.trained == all_ids - set(withheld)
    # Own texts are scored too, for defenses that look at those; they are learned from.
    mine = [f"own-{number}" for number in range(own)][-held_out:]
    assert defense.scored == [(*withheld, *mine)] * 2


def test_without_a_floor_nothing_is_held_out_and_nothing_scored() -> None:
    defense, pairs = Watched([0.5]), texts(2, 4)
    config = training().model_copy(update={"floor": None})
    HeadSearch(new_head(), (), pairs, defense, config).run()
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
    measured: list[Tensor] = []
    script = iter(utilities)

    def measure(head: Head) -> Utility:
        measured.append(head.weight.detach().clone())
        return next(script)

    head = new_head()
    result = watched_search(Watched(scores), texts(2, 4), utilities, head=head, measure=measure)
    assert [item.score for item in result.rounds] == scores
    assert [item.accepted for item in result.rounds] == [item is GOOD for item in utilities]
    assert torch.equal(head.weight, measured[chosen])
    assert result.strength == result.rounds[chosen].strength
    assert not any(
        torch.equal(measured[chosen], measured[i]) for i in range(len(measured)) if i != chosen
    )


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
    resumed_result = watched_search(
        Watched(scores[at + 1 :]), pairs, utilities, head=resumed, measure=script, folder=tmp_path
    )
    assert resumed_result == expected
    assert [item.score for item in resumed_result.rounds] == scores
    assert all(entry.parts.keys() == {"pull"} for entry in resumed_result.log)
    assert torch.equal(resumed.weight, straight.weight)


def test_a_floor_that_no_pass_is_held_to_is_refused() -> None:
    late = {"refreshes": 1, "floor": {"from_pass": 2}}
    with pytest.raises(ValueError, match=r"from_pass 2 is no pass of 2 .* would never be held"):
        HeadTraining.model_validate(late)
    last = HeadTraining.model_validate({"refreshes": 2, "floor": {"from_pass": 2}})
    assert last.floor is not None
    assert last.floor.from_pass == 2
