"""Quotas: one contract over both ledgers, numbers worked out by hand, and many processes.

The contract runs over SQLite, over an imitation of Redis, and over a real `redis-server` if there
is one on the PATH.
"""

import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.accounts.database import StoreError
from gateway.accounts.ledger import Ledger, Reservation, Usage
from gateway.accounts.quotas import Limits, Refusal, Standing
from gateway.accounts.redis_ledger import RedisLedger
from gateway.accounts.sqlite_ledger import SqliteLedger
from gateway.policy import Tier

ROOT = Path(__file__).parents[3]
MIDNIGHT = 20_000 * 86_400.0
"""The start of 2024-10-04 UTC."""
NOON = MIDNIGHT + 43_200
WIDE = Limits(1000, 1_000_000, 10_000_000, 1000)
KINDS = ["sqlite", "imitation", "redis"]


@dataclass
class Clock:
    """Seconds since 1970, moved by hand."""

    now: float = NOON

    def __call__(self) -> float:
        return self.now


Opener = Callable[[Callable[[], float] | None], Any]


@pytest.fixture(params=KINDS)
def opener(request: pytest.FixtureRequest) -> Opener:
    """Opens an empty ledger of each kind."""
    kind = request.param
    url = request.getfixturevalue("redis_url") if kind == "redis" else ""

    @contextmanager
    def opened(clock: Callable[[], float] | None) -> Iterator[Ledger]:
        if kind == "sqlite":
            with tempfile.TemporaryDirectory() as folder:
                yield SqliteLedger(Path(folder) / "ledger.sqlite", clock or time.time)
        elif kind == "imitation":
            import fakeredis

            yield RedisLedger(fakeredis.FakeStrictRedis(server=fakeredis.FakeServer()), clock)
        else:
            import redis

            redis.Redis.from_url(url).flushall()
            yield RedisLedger(url, clock)

    return opened


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ledger(opener: Opener, clock: Clock) -> Iterator[Ledger]:
    with opener(clock) as opened:
        yield opened


def reserve(
    ledger: Ledger,
    request: str,
    limits: Limits = WIDE,
    *,
    key: str = "ak-1",
    prompt: int = 10,
    completion: int = 90,
    slots: int = 1,
    owner: str = "replica",
    lease_s: float = 1000.0,
) -> Standing | Refusal:
    reservation = Reservation(key, request, prompt, completion, slots)
    return ledger.reserve(reservation, limits, owner=owner, lease_s=lease_s)


def refused(answer: Standing | Refusal) -> tuple[str, float, bool]:
    assert isinstance(answer, Refusal)
    return answer.limit, answer.retry_after_s, answer.never


# The contract --------------------------------------------------------------------------------


def test_a_reservation_takes_the_most_and_settling_gives_back_the_rest(
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
    # 35.25 s after the first, which leaves at 60 s.
    answer = reserve(ledger, "d", limits)
    assert refused(answer) == ("requests", 24.75, False)
    assert isinstance(answer, Refusal)
    assert answer.standing == Standing(3, 0, 55.0, 100_000, 99_700, 55.0)
    clock.now += 24.749
    assert refused(reserve(ledger, "d", limits)) == ("requests", 0.001, False)
    clock.now += 0.001
    assert isinstance(reserve(ledger, "d", limits), Standing)
    # b came at 10 s, and it is 60 s now.
    assert refused(reserve(ledger, "e", limits)) == ("requests", 10.0, False)


def test_tokens_are_free_again_when_enough_requests_have_left(ledger: Ledger, clock: Clock) -> None:
    limits = Limits(100, 300, 100_000, 100)
    for name in "abc":
        reserve(ledger, name, limits)
        clock.now += 7
    # 300 of 300: 150 want two requests to leave; the second came at 7 s, it is 21 s.
    assert refused(reserve(ledger, "d", limits, completion=140)) == ("tokens", 46.0, False)
    # b used 20 in place of 100, so 80 are free and 70 are missing: now the first is enough.
    ledger.settle("b", 10)
    assert refused(reserve(ledger, "d", limits, completion=140)) == ("tokens", 39.0, False)
    clock.now += 39
    assert isinstance(reserve(ledger, "d", limits, completion=140), Standing)


def test_the_longest_wait_is_told(ledger: Ledger, clock: Clock) -> None:
    limits = Limits(2, 200, 100_000, 2)
    reserve(ledger, "a", limits)
    clock.now += 10
    reserve(ledger, "b", limits)
    # A request asks for a to leave, 150 tokens for b too, a slot for nobody knows what.
    assert refused(reserve(ledger, "c", limits, completion=140)) == ("tokens", 60.0, False)
    assert refused(reserve(ledger, "c", limits, completion=40)) == ("requests", 50.0, False)


def test_a_throttled_key_waits_for_more_to_leave(ledger: Ledger, clock: Clock) -> None:
    for name in "abcd":
        reserve(ledger, name)
        clock.now += 1
    answer = reserve(ledger, "e", Limits(2, 1000, 100_000, 100))
    # Three of four must leave, and the third came at 2 s.
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
    # Out of the minute, but of the day still: one settled, one open.
    ledger.settle("a", 50)
    assert refused(reserve(ledger, "c", limits)) == ("tokens_day", 59.5, False)
    assert isinstance(reserve(ledger, "c", limits, completion=80), Standing)
    clock.now += 59.5
    assert isinstance(reserve(ledger, "d", limits), Standing)
    # What arrived before midnight and ends after it is of the day before.
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
def test_what_can_never_fit_is_told_so(ledger: Ledger, limits: Limits, name: str) -> None:
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
    ledger.settle("nobody", 10)
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
    # Others cannot speak for a request, and counts do not go back.
    ledger.progress("dead", {"a": 20, "b": 80, "nobody": 5}, lease_s=10.0)
    ledger.progress("dead", {"a": 15}, lease_s=10.0)
    ledger.progress("alive", {"b": 3}, lease_s=12.0)
    clock.now += 9.999
    assert refused(reserve(ledger, "c", limits))[0] == "tokens"
    clock.now += 0.001
    # a is settled at 10 + 20 by whoever comes next, so 70 are free.
    assert isinstance(reserve(ledger, "c", limits, completion=60), Standing)
    assert ledger.usage() == [Usage("ak-1", date(2024, 10, 4), 1, 10, 20, 2)]
    # It was only slow; its late word changes nothing.
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


def test_the_time_of_the_machine_serves_as_well(opener: Opener) -> None:
    with opener(None) as ledger:
        limits = Limits(1, 1000, 1000, 1)
        assert reserve(ledger, "a", limits) == Standing(1, 0, 60.0, 1000, 900, 60.0)
        limit, wait, never = refused(reserve(ledger, "b", limits))
        assert (limit, never) == ("requests", False)
        assert 50 < wait <= 60
        ledger.settle("a", 5)
        [row] = ledger.usage()
        assert abs((row.day - date.today()).days) <= 1


# Any order of events -------------------------------------------------------------------------


@dataclass
class Row:
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
class Plain:
    """The same rules in the plainest way: nothing is ever forgotten or summed beforehand."""

    limits: Limits
    rows: dict[str, Row] = field(default_factory=dict)

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
        requests, minute, day, under_way = self.counts(key, now)
        found = {
            "requests": requests + 1 > self.limits.requests_per_minute,
            "tokens": minute + tokens > self.limits.tokens_per_minute,
            "tokens_day": day + tokens > self.limits.tokens_per_day,
            "concurrency": under_way + slots > self.limits.concurrency,
        }
        return {name for name, is_over in found.items() if is_over}

    def settle_lapsed(self, now: float) -> None:
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
def check_any_order(opener: Opener, events: list[tuple[Any, ...]]) -> None:
    limits = Limits(5, 200, 400, 6)
    clock, plain, ids = Clock(NOON), Plain(limits), itertools.count()
    with opener(clock) as ledger:
        for event in events:
            act(ledger, plain, clock, ids, event)
            for key in ("ak-1", "ak-2"):
                requests, minute, day, slots = plain.counts(key, clock.now)
                assert requests <= limits.requests_per_minute
                assert minute <= limits.tokens_per_minute
                assert day <= limits.tokens_per_day
                assert slots <= limits.concurrency
        sums: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
        for row in ledger.usage():
            parts = (row.requests, row.prompt_tokens, row.completion_tokens, row.open_requests)
            sums[row.key] = [a + b for a, b in zip(sums[row.key], parts, strict=True)]
        assert {key: tuple(values) for key, values in sums.items()} == plain.usage()


def act(
    ledger: Ledger, plain: Plain, clock: Clock, ids: Iterator[int], event: tuple[Any, ...]
) -> None:
    """One event on both; what the ledger answers must follow from the plain rules."""
    match event:
        case "wait", seconds:
            clock.now = round(clock.now + seconds, 3)
        case "sweep":
            lapsed = [r for r in plain.rows.values() if r.settled is None and r.lease <= clock.now]
            assert ledger.sweep() == len(lapsed)
            plain.settle_lapsed(clock.now)
        case "settle", number, tokens:
            ledger.settle(str(number), min(tokens, reserved_of(plain, number)))
            row = plain.rows.get(str(number))
            if row is not None and row.settled is None:
                row.settled = min(tokens, row.reserved)
        case "progress", number, tokens:
            written = min(tokens, reserved_of(plain, number))
            ledger.progress("replica", {str(number): written}, lease_s=50.0)
            row = plain.rows.get(str(number))
            if row is not None and row.settled is None:
                row.written, row.lease = max(row.written, written), clock.now + 50
        case "reserve", key, prompt, completion, slots:
            request, now, tokens = str(next(ids)), clock.now, prompt + completion
            plain.settle_lapsed(now)
            over = plain.over(key, now, tokens, slots)
            answer = reserve(
                *(ledger, request, plain.limits),
                key=key,
                prompt=prompt,
                completion=completion,
                slots=slots,
                lease_s=50.0,
            )
            if not over:
                plain.rows[request] = Row(key, now, prompt, completion, slots, now + 50)
            requests, minute, _, _ = plain.counts(key, now)
            standing = answer.standing if isinstance(answer, Refusal) else answer
            assert standing.remaining_requests == plain.limits.requests_per_minute - requests
            assert standing.remaining_tokens == plain.limits.tokens_per_minute - minute
            assert isinstance(answer, Refusal) == bool(over)
            if isinstance(answer, Refusal):
                assert answer.limit in over
                assert not answer.never
                if answer.limit in ("requests", "tokens", "tokens_day"):
                    # Then it fits as far as time goes, and a millisecond earlier it does not.
                    then = round(now + answer.retry_after_s, 3)
                    timed = {"requests", "tokens", "tokens_day"}
                    assert not plain.over(key, then, tokens, slots) & timed
                    early = plain.over(key, round(then - 0.001, 3), tokens, slots)
                    assert answer.limit in early


def reserved_of(plain: Plain, number: int) -> int:
    row = plain.rows.get(str(number))
    return 60 if row is None else row.reserved


def test_any_order_of_events_keeps_limits_and_sums(opener: Opener) -> None:
    check_any_order(opener)


# What one ledger alone has -------------------------------------------------------------------

PROGRAM = """
import json, random, sys
from pathlib import Path
from gateway.accounts.ledger import Reservation
from gateway.accounts.quotas import Limits, Standing
from gateway.accounts.sqlite_ledger import SqliteLedger

path, me = Path(sys.argv[1]), sys.argv[2]
ledger, chance = SqliteLedger(path), random.Random(me)
sums, limits = {"ak-full": [0, 0], "ak-some": [0, 0]}, set()
for i in range(50):
    for key, sum_ in sums.items():
        request, written = f"{me}-{i}-{key}", 90 if key == "ak-full" else chance.randint(0, 90)
        answer = ledger.reserve(
            Reservation(key, request, prompt=10, completion=90, slots=1),
            Limits(1000, 6000, 1_000_000, 1000), owner=me, lease_s=60.0,
        )
        if isinstance(answer, Standing):
            ledger.progress(me, {request: written // 2}, lease_s=60.0)
            ledger.settle(request, written)
            sum_[0], sum_[1] = sum_[0] + 1, sum_[1] + 10 + written
        else:
            limits.add(answer.limit)
print(json.dumps([sums, sorted(limits)]))
"""


def test_four_processes_end_exact_to_the_token(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(path), f"w{i}"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(4)
    ]
    answers = [json.loads(worker.communicate(timeout=60)[0]) for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * 4
    for key in ("ak-full", "ak-some"):
        requests, tokens = (sum(sums[key][part] for sums, _ in answers) for part in (0, 1))
        rows = SqliteLedger(path).usage(key)
        assert sum(row.requests for row in rows) == requests
        assert sum(row.prompt_tokens + row.completion_tokens for row in rows) == tokens <= 6000
        assert sum(row.open_requests for row in rows) == 0
        # Of 200 requests of 100 tokens each, 6000 tokens let in 60 and not one more.
        assert requests == 60 if key == "ak-full" else requests > 60
    assert {limit for _, limits in answers for limit in limits} == {"tokens"}


def test_threads_share_a_ledger(tmp_path: Path) -> None:
    ledger = SqliteLedger(tmp_path / "ledger.sqlite", Clock())

    def one(number: int) -> bool:
        answer = reserve(ledger, str(number), Limits(1000, 2000, 10_000, 1000))
        if isinstance(answer, Standing):
            ledger.settle(str(number), 90)
        return isinstance(answer, Standing)

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(one, range(60))) == 20
    [row] = ledger.usage()
    assert (row.requests, row.prompt_tokens, row.completion_tokens) == (20, 200, 1800)


def test_settled_requests_are_forgotten_but_their_sums(tmp_path: Path, clock: Clock) -> None:
    ledger = SqliteLedger(tmp_path / "ledger.sqlite", clock)
    for number in range(50):
        reserve(ledger, str(number), key=f"ak-{number % 2}")
        ledger.settle(str(number), 1)
        clock.now += 30
    count = "SELECT count(*) FROM requests"
    # Each key's own reservations clean up behind it: a minute is never more than three requests.
    assert ledger._database.rows(count)[0][0] <= 3
    clock.now += 60
    ledger.sweep()
    assert ledger._database.rows(count) == [(0,)]
    assert sum(row.requests for row in ledger.usage()) == 50


def test_no_look_up_reads_a_whole_table(tmp_path: Path) -> None:
    ledger = SqliteLedger(tmp_path / "ledger.sqlite")
    seen: list[str] = []
    ledger._database._connection().set_trace_callback(seen.append)
    limits = Limits(1, 100, 1000, 9)
    reserve(ledger, "a", limits)
    reserve(ledger, "b", limits)
    ledger.progress("replica", {"a": 3}, lease_s=5.0)
    ledger.settle("a", 5)
    asked = [sql for sql in seen if sql.split()[0] in ("SELECT", "UPDATE", "DELETE")]
    assert len(asked) > 8
    for sql in asked:
        plan = [row[3] for row in ledger._database.rows(f"EXPLAIN QUERY PLAN {sql}")]
        assert all(step.startswith("SEARCH") for step in plan), (sql, plan)


def test_a_tier_gives_its_limits_or_a_share_of_them() -> None:
    tier = Tier(
        requests_per_minute=15, tokens_per_minute=1000, tokens_per_day=20_000, concurrency=4
    )
    assert Limits.of(tier) == Limits(15, 1000, 20_000, 4)
    assert Limits.of(tier, 0.1) == Limits(1, 100, 2000, 1)
    with pytest.raises(ValueError, match="share"):
        Limits.of(tier, 0.0)


def test_a_broken_or_lost_ledger_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    ledger = SqliteLedger(path)
    reserve(ledger, "a")
    path.unlink()
    with pytest.raises(StoreError, match="no store"):
        reserve(ledger, "b")
    broken = tmp_path / "broken.sqlite"
    broken.write_bytes(b"nonsense" * 1000)
    broken.chmod(0o600)
    with pytest.raises(StoreError, match="not a database"):
        SqliteLedger(broken)


def test_all_names_in_redis_share_one_hash_tag(clock: Clock) -> None:
    import fakeredis

    server = fakeredis.FakeServer()
    # A client that answers with str serves as well as one that answers with bytes.
    client = fakeredis.FakeStrictRedis(server=server, decode_responses=True)
    ledger = RedisLedger(client, clock)
    reserve(ledger, "a")
    kinds = ("request:a", "window:ak-1", "minute:ak-1", "usage:ak-1", "leases", "keys")
    assert set(client.keys("*")) == {f"{{azeotrope}}:{kind}" for kind in kinds}
    # Settled and out of the minute, only what does not grow with requests is left.
    ledger.settle("a", 5)
    clock.now += 61
    ledger.sweep()
    assert ledger.usage("ak-1") == [Usage("ak-1", date(2024, 10, 4), 1, 10, 5, 0)]
    assert set(client.keys("*")) == {
        f"{{azeotrope}}:{kind}" for kind in ("minute:ak-1", "usage:ak-1", "keys")
    }
