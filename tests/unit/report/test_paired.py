"""McNemar's test against numbers counted by hand, and how it reaches the reader."""

import pytest

from azeotrope.report.paired import PairedTest, find_test, mcnemar_p, read_paired


def test_mcnemar_counts_only_the_problems_one_model_solved() -> None:
    # Six discordant problems, all for one side: 2 / 2^6.
    correct_a = [True] * 6 + [True] * 20 + [False] * 5
    correct_b = [False] * 6 + [True] * 20 + [False] * 5
    assert mcnemar_p(correct_a, correct_b) == pytest.approx(2 / 64)
    assert mcnemar_p(correct_b, correct_a) == pytest.approx(2 / 64)
    assert mcnemar_p(correct_a, correct_a) == 1.0


def test_mcnemar_refuses_unequal_lists() -> None:
    with pytest.raises(ValueError, match="2 against 1"):
        mcnemar_p([True, False], [True])


def test_a_test_needs_the_same_problems() -> None:
    clean = {"a": True, "b": True, "c": False}
    columns = {"defense": "doge", "strength": 0.1, "decoding": "greedy"}
    test = PairedTest.of(clean, {"c": False, "b": False, "a": False}, **columns)
    # Two problems that the clean teacher alone solves: 2 / 2^2.
    assert test == PairedTest(**columns, n=3, p=0.5)
    assert PairedTest.of(clean, {"a": True, "b": True}, **columns) is None
    assert PairedTest.of({}, {}, **columns) is None


def test_greedy_answers_are_preferred() -> None:
    sampled = PairedTest(defense="doge", strength=0.1, decoding="sampled@1", n=9, p=0.2)
    greedy = sampled.model_copy(update={"decoding": "greedy"})
    assert find_test([sampled, greedy], "doge", 0.1) == greedy
    assert find_test([sampled], "doge", 0.1) == sampled
    assert find_test([greedy], "doge", 0.2) is None


def test_tests_are_read_from_the_facts_of_a_run() -> None:
    test = PairedTest(defense="doge", decoding="greedy", n=9, p=0.2)
    assert read_paired({"name": "demo"}) == []
    assert read_paired({"paired": [test.dump()]}) == [test]
    with pytest.raises(ValueError, match=r"run\.paired: p"):
        read_paired({"paired": [{**test.dump(), "p": 2}]})
