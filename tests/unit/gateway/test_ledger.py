"""The quota ledger of every kind, with numbers worked out by hand."""

from datetime import date

import pytest
from store_kinds import MIDNIGHT, Clock, LedgerOpener, refused, reserve

from gateway.accounts.database import StoreError
from gateway.accounts.ledger import Ledger, Usage
from gateway.accounts.quotas import Limits, Refusal, Standing


def test_a_reservation_takes_the_maximum_and_settling_gives_back_the_rest(
    ledger: Ledger, clock: Clock
) -> None:
    limits = Limits(10, 1000, 5000, 8)
    assert reserve(ledger, "a", limits) == Standing(10, 9, 60.0, 1000, 900, 60.0)
    clock.now += 15
    ledger.settle("a", 30)
    assert reserve(ledger, "b", limits) == Standing(10, 8, 60.0, 1000, 860, 60.0)
    assert ledger.usage() == [Usage("ak-1", date(2024, 10, 4), 1, 10, 30, 1)]
    assert ledger.usage("ak-2") == []


def test_requests_leave_the_window_one_by_one(ledger: Ledger, clock: Clock) -> None:
    limits = Limits(3, 100_000, 100_000, 100)
    for name, wait in (("a", 10.0), ("b", 20.25), ("c", 5.0)):
        assert isinstance(reserve(ledger, name, limits), Standing)
        clock.now += wait
    # 35.25 s after the first request, which leaves the window at 60 s.
    answer = reserve(ledger, "d", limits)
    assert refused(answer) == ("requests", 24.75, False)
    assert isinstance(answer, Refusal)
    assert answer.standing == Standing(3, 0, 55.0, 100_000, 99_700, 55.0)
    clock.now += 24.749
    assert refused(reserve(ledger, "d", limits)) == ("requests", 0.001, False)
    clock.now += 0.001
    assert isinstance(reserve(ledger, "d", limits), Standing)
    # b arrived at 10 s, and it is 60 s now.
    assert refused(reserve(ledger, "e", limits)) == ("requests", 10.0, False)


def test_tokens_are_free_again_when_enough_requests_have_left(ledger: Ledger, clock: Clock) -> None:
    limits = Limits(100, 300, 100_000, 100)
    for name in "abc":
        reserve(ledger, name, limits)
        clock.now += 7
    # 300 of 300 tokens are taken. 150 more need two requests to leave; the second one arrived at
    # 7 s, and it is 21 s now.
    assert refused(reserve(ledger, "d", limits, completion=140)) == ("tokens", 46.0, False)
    # b used 20 and not 100, so 80 are free and 70 are missing: now the first one is enough.
    ledger.settle("b", 10)
    assert refused(reserve(ledger, "d", limits, completion=140)) == ("tokens", 39.0, False)
    clock.now += 39
    assert isinstance(reserve(ledger, "d", limits, completion=140), Standing)


def test_the_longest_wait_is_reported(ledger: Ledger, clock: Clock) -> None:
    limits = Limits(2, 200, 100_000, 2)
    reserve(ledger, "a", limits)
    clock.now += 10
    reserve(ledger, "b", limits)
    # The count of requests needs a to leave, 150 tokens need b to leave too, and the wait for a
    # slot is a guess of one second.
    assert refused(reserve(ledger, "c", limits, completion=140)) == ("tokens", 60.0, False)
    assert refused(reserve(ledger, "c", limits, completion=40)) == ("requests", 50.0, False)


def test_a_throttled_key_waits_for_more_to_leave(ledger: Ledger, clock: Clock) -> None:
    for name in "abcd":
        reserve(ledger, name)
        clock.now += 1
    answer = reserve(ledger, "e", Limits(2, 1000, 100_000, 100))
    # Three of four must leave, and the third arrived at 2 s.
    assert refused(answer) == ("requests", 58.0, False)
    assert isinstance(answer, Refusal)
    assert answer.standing.remaining_requests == 0


def test_the_day_is_one_of_utc(ledger: Ledger, clock: Clock) -> None:
    limits = Limits(100, 1000, 250, 100)
    clock.now = MIDNIGHT + 86_400 - 120.5
    reserve(ledger, "a", limits)
    reserve(ledger, "b", limits)
    assert refused(reserve(ledger, "c", limits)) == ("tokens_day", 120.5, False)
    clock.now += 61
    # Both have left the minute and still count on the day: one settled, one open.
    ledger.settle("a", 50)
    assert refused(reserve(ledger, "c", limits)) == ("tokens_day", 59.5, False)
    assert isinstance(reserve(ledger, "c", limits, completion=80), Standing)
    clock.now += 59.5
    assert isinstance(reserve(ledger, "d", limits), Standing)
    # A request that arrives before midnight and ends after it counts on the day before.
    ledger.settle("b", 7)
    assert ledger.usage() == [
        Usage("ak-1", date(2024, 10, 4), 2, 20, 57, 1),
        Usage("ak-1", date(2024, 10, 5), 0, 0, 0, 1),
    ]


def test_slots_are_counted_until_settled_however_long_it_takes(
    ledger: Ledger, clock: Clock
) -> None:
    limits = Limits(100, 100_000, 100_000, 4)
    reserve(ledger, "a", limits, slots=3)
    assert refused(reserve(ledger, "b", limits, slots=2)) == ("concurrency", 1.0, False)
    clock.now += 300
    assert refused(reserve(ledger, "b", limits, slots=2)) == ("concurrency", 1.0, False)
    assert isinstance(reserve(ledger, "c", limits), Standing)
    ledger.settle("a", 0)
    assert isinstance(reserve(ledger, "b", limits, slots=3), Standing)


@pytest.mark.parametrize(
    ("limits", "name"),
    [
        (Limits(1, 99, 1000, 9), "tokens"),
        (Limits(1, 1000, 99, 9), "tokens_day"),
        (Limits(1, 1000, 1000, 1), "concurrency"),
    ],
)
def test_a_request_that_can_never_fit_is_told_so(ledger: Ledger, limits: Limits, name: str) -> None:
    answer = reserve(ledger, "a", limits, slots=2)
    assert refused(answer) == (name, 0.0, True)
    assert ledger.usage() == []


def test_keys_do_not_share_quotas(ledger: Ledger) -> None:
    limits = Limits(1, 100, 100, 1)
    assert isinstance(reserve(ledger, "a", limits, key="ak-1"), Standing)
    assert isinstance(reserve(ledger, "b", limits, key="ak-2"), Standing)
    assert isinstance(reserve(ledger, "c", limits, key="ak-1"), Refusal)


def test_the_first_settlement_counts(ledger: Ledger, clock: Clock) -> None:
    reserve(ledger, "a")
    for tokens in (30, 60, 0):
        ledger.settle("a", tokens)
    ledger.settle("unknown", 10)
    expected = [Usage("ak-1", date(2024, 10, 4), 1, 10, 30, 0)]
    assert ledger.usage() == expected
    clock.now += 3600
    reserve(ledger, "b")
    ledger.settle("a", 90)
    assert ledger.usage()[0].completion_tokens == 30


def test_a_dead_replica_pays_for_what_it_had_written(ledger: Ledger, clock: Clock) -> None:
    limits = Limits(100, 200, 100_000, 2)
    reserve(ledger, "a", limits, owner="dead", lease_s=10.0)
    reserve(ledger, "b", limits, owner="alive", lease_s=10.0)
    clock.now += 8
    # Only its owner reports for a request, and counts never decrease.
    ledger.progress("dead", {"a": 20, "b": 80, "unknown": 5}, lease_s=10.0)
    ledger.progress("dead", {"a": 15}, lease_s=10.0)
    ledger.progress("alive", {"b": 3}, lease_s=12.0)
    clock.now += 9.999
    assert refused(reserve(ledger, "c", limits))[0] == "tokens"
    clock.now += 0.001
    # The next reservation settles a at 10 + 20 tokens, so 70 are free.
    assert isinstance(reserve(ledger, "c", limits, completion=60), Standing)
    assert ledger.usage() == [Usage("ak-1", date(2024, 10, 4), 1, 10, 20, 2)]
    # The replica was only slow; its late reports change nothing.
    ledger.progress("dead", {"a": 90}, lease_s=10.0)
    ledger.settle("a", 90)
    assert ledger.sweep() == 0
    clock.now += 2
    assert ledger.sweep() == 1
    assert ledger.usage() == [Usage("ak-1", date(2024, 10, 4), 2, 20, 23, 1)]


def test_an_id_is_used_once(ledger: Ledger) -> None:
    reserve(ledger, "a")
    with pytest.raises(StoreError):
        reserve(ledger, "a", key="ak-2")
    assert [(row.key, row.open_requests) for row in ledger.usage()] == [("ak-1", 1)]


def test_impossible_numbers_are_refused(ledger: Ledger) -> None:
    for wrong in ({"prompt": -1}, {"completion": -1}, {"slots": 0}, {"lease_s": 0.0}):
        with pytest.raises(ValueError, match="a reservation has"):
            reserve(ledger, "a", **wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="0 tokens or more"):
        ledger.settle("a", -1)


def test_the_clock_of_the_store_is_the_default(empty_ledger: LedgerOpener) -> None:
    with empty_ledger(None) as ledger:
        limits = Limits(1, 1000, 1000, 1)
        assert reserve(ledger, "a", limits) == Standing(1, 0, 60.0, 1000, 900, 60.0)
        limit, wait, never = refused(reserve(ledger, "b", limits))
        assert (limit, never) == ("requests", False)
        assert 50 < wait <= 60
        ledger.settle("a", 5)
        [row] = ledger.usage()
        assert abs((row.day - date.today()).days) <= 1
