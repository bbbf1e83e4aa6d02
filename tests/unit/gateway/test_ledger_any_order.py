"""Any order of events leaves a ledger with the counts of a simple model of the same rules."""

import itertools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from store_kinds import NOON, Clock, LedgerOpener, reserve

from gateway.accounts.ledger import Ledger
from gateway.accounts.quotas import Limits, Refusal


@dataclass
class ModelRequest:
    """One request of the model; times are seconds since 1970."""

    key: str
    arrived: float
    prompt: int
    reserved: int
    slots: int
    lease: float
    written: int = 0
    settled: int | None = None

    @property
    def cost(self) -> int:
        return self.prompt + (self.reserved if self.settled is None else self.settled)


@dataclass
class LedgerModel:
    """The same rules without any optimisation: it deletes nothing and keeps no sums."""

    limits: Limits
    rows: dict[str, ModelRequest] = field(default_factory=dict)

    def counts(self, key: str, now: float) -> tuple[int, int, int, int]:
        mine = [row for row in self.rows.values() if row.key == key]
        minute = [row for row in mine if row.arrived > now - 60]
        today = [row for row in mine if row.arrived // 86_400 == now // 86_400]
        return (
            len(minute),
            sum(row.cost for row in minute),
            sum(row.cost for row in today),
            sum(row.slots for row in mine if row.settled is None),
        )

    def over(self, key: str, now: float, tokens: int, slots: int) -> set[str]:
        requests, minute, day, slots_taken = self.counts(key, now)
        exceeded = {
            "requests": requests + 1 > self.limits.requests_per_minute,
            "tokens": minute + tokens > self.limits.tokens_per_minute,
            "tokens_day": day + tokens > self.limits.tokens_per_day,
            "concurrency": slots_taken + slots > self.limits.concurrency,
        }
        return {name for name, is_over in exceeded.items() if is_over}

    def settle_expired(self, now: float) -> None:
        for row in self.rows.values():
            if row.settled is None and row.lease <= now:
                row.settled = row.written

    def usage(self) -> dict[str, tuple[int, int, int, int]]:
        sums: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
        for row in self.rows.values():
            is_open = row.settled is None
            parts = (0, 0, 0, 1) if is_open else (1, row.prompt, row.settled or 0, 0)
            sums[row.key] = [a + b for a, b in zip(sums[row.key], parts, strict=True)]
        return {key: (a, b, c, d) for key, (a, b, c, d) in sums.items()}


KEY = st.sampled_from(["ak-1", "ak-2"])
EVENT = st.one_of(
    st.tuples(st.just("reserve"), KEY, st.integers(0, 40), st.integers(0, 60), st.integers(1, 3)),
    st.tuples(st.just("settle"), st.integers(0, 30), st.integers(0, 60)),
    st.tuples(st.just("progress"), st.integers(0, 30), st.integers(0, 60)),
    st.tuples(st.just("wait"), st.sampled_from([0.001, 1.0, 19.5, 45.0, 60.0, 40_000.0])),
    st.tuples(st.just("sweep")),
)


@settings(max_examples=40)
@given(events=st.lists(EVENT, min_size=5, max_size=40))
def check_any_order(empty_ledger: LedgerOpener, events: list[tuple[Any, ...]]) -> None:
    limits = Limits(5, 200, 400, 6)
    clock, model, ids = Clock(NOON), LedgerModel(limits), itertools.count()
    with empty_ledger(clock) as ledger:
        for event in events:
            act(ledger, model, clock, ids, event)
            for key in ("ak-1", "ak-2"):
                requests, minute, day, slots = model.counts(key, clock.now)
                assert requests <= limits.requests_per_minute
                assert minute <= limits.tokens_per_minute
                assert day <= limits.tokens_per_day
                assert slots <= limits.concurrency
        sums: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
        for row in ledger.usage():
            parts = (row.requests, row.prompt_tokens, row.completion_tokens, row.open_requests)
            sums[row.key] = [a + b for a, b in zip(sums[row.key], parts, strict=True)]
        assert {key: tuple(values) for key, values in sums.items()} == model.usage()


def act(
    ledger: Ledger, model: LedgerModel, clock: Clock, ids: Iterator[int], event: tuple[Any, ...]
) -> None:
    """Apply one event to both; the answers of the ledger must follow from the model."""
    match event:
        case "wait", seconds:
            clock.now = round(clock.now + seconds, 3)
        case "sweep":
            rows = model.rows.values()
            expired = [row for row in rows if row.settled is None and row.lease <= clock.now]
            assert ledger.sweep() == len(expired)
            model.settle_expired(clock.now)
        case "settle", number, tokens:
            ledger.settle(str(number), min(tokens, reserved_of(model, number)))
            row = model.rows.get(str(number))
            if row is not None and row.settled is None:
                row.settled = min(tokens, row.reserved)
        case "progress", number, tokens:
            written = min(tokens, reserved_of(model, number))
            ledger.progress("replica", {str(number): written}, lease_s=50.0)
            row = model.rows.get(str(number))
            if row is not None and row.settled is None:
                row.written, row.lease = max(row.written, written), clock.now + 50
        case "reserve", key, prompt, completion, slots:
            request, now, tokens = str(next(ids)), clock.now, prompt + completion
            model.settle_expired(now)
            over = model.over(key, now, tokens, slots)
            answer = reserve(
                *(ledger, request, model.limits),
                key=key,
                prompt=prompt,
                completion=completion,
                slots=slots,
                lease_s=50.0,
            )
            if not over:
                model.rows[request] = ModelRequest(key, now, prompt, completion, slots, now + 50)
            requests, minute, _, _ = model.counts(key, now)
            standing = answer.standing if isinstance(answer, Refusal) else answer
            assert standing.remaining_requests == model.limits.requests_per_minute - requests
            assert standing.remaining_tokens == model.limits.tokens_per_minute - minute
            assert isinstance(answer, Refusal) == bool(over)
            if isinstance(answer, Refusal):
                assert answer.limit in over
                assert not answer.never
                if answer.limit in ("requests", "tokens", "tokens_day"):
                    # At this time no timed limit refuses it, and a millisecond earlier one does.
                    then = round(now + answer.retry_after_s, 3)
                    timed = {"requests", "tokens", "tokens_day"}
                    assert not model.over(key, then, tokens, slots) & timed
                    early = model.over(key, round(then - 0.001, 3), tokens, slots)
                    assert answer.limit in early


def reserved_of(model: LedgerModel, number: int) -> int:
    row = model.rows.get(str(number))
    return 60 if row is None else row.reserved


def test_any_order_of_events_keeps_limits_and_sums(empty_ledger: LedgerOpener) -> None:
    check_any_order(empty_ledger)
