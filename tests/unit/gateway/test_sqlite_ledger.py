"""The ledger in a file: many processes and threads, its size, its queries, and damage."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from store_kinds import Clock, reserve

from gateway.accounts.database import StoreError
from gateway.accounts.quotas import Limits, Standing
from gateway.accounts.sqlite_ledger import SqliteLedger

ROOT = Path(__file__).parents[3]

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
    for key, total in sums.items():
        request, written = f"{me}-{i}-{key}", 90 if key == "ak-full" else chance.randint(0, 90)
        answer = ledger.reserve(
            Reservation(key, request, prompt=10, completion=90, slots=1),
            Limits(1000, 6000, 1_000_000, 1000), owner=me, lease_s=60.0,
        )
        if isinstance(answer, Standing):
            ledger.progress(me, {request: written // 2}, lease_s=60.0)
            ledger.settle(request, written)
            total[0], total[1] = total[0] + 1, total[1] + 10 + written
        else:
            limits.add(answer.limit)
print(json.dumps([sums, sorted(limits)]))
"""


def test_four_processes_count_exactly_to_the_token(tmp_path: Path) -> None:
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
        # There are 200 requests of 100 tokens each; a limit of 6000 tokens admits exactly 60.
        assert requests == 60 if key == "ak-full" else requests > 60
    assert {limit for _, limits in answers for limit in limits} == {"tokens"}


def test_threads_share_a_ledger(tmp_path: Path) -> None:
    ledger = SqliteLedger(tmp_path / "ledger.sqlite", Clock())

    def answer_one(number: int) -> bool:
        answer = reserve(ledger, str(number), Limits(1000, 2000, 10_000, 1000))
        if isinstance(answer, Standing):
            ledger.settle(str(number), 90)
        return isinstance(answer, Standing)

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(answer_one, range(60))) == 20
    [row] = ledger.usage()
    assert (row.requests, row.prompt_tokens, row.completion_tokens) == (20, 200, 1800)


def test_settled_requests_are_deleted_and_their_sums_remain(tmp_path: Path, clock: Clock) -> None:
    ledger = SqliteLedger(tmp_path / "ledger.sqlite", clock)
    for number in range(50):
        reserve(ledger, str(number), key=f"ak-{number % 2}")
        ledger.settle(str(number), 1)
        clock.now += 30
    count = "SELECT count(*) FROM requests"
    # Each reservation deletes the old requests of its key; a minute has at most three here.
    assert ledger._database.rows(count)[0][0] <= 3
    clock.now += 60
    ledger.sweep()
    assert ledger._database.rows(count) == [(0,)]
    assert sum(row.requests for row in ledger.usage()) == 50


def test_no_look_up_reads_a_whole_table(tmp_path: Path) -> None:
    ledger = SqliteLedger(tmp_path / "ledger.sqlite")
    statements: list[str] = []
    ledger._database._connection().set_trace_callback(statements.append)
    limits = Limits(1, 100, 1000, 9)
    reserve(ledger, "a", limits)
    reserve(ledger, "b", limits)
    ledger.progress("replica", {"a": 3}, lease_s=5.0)
    ledger.settle("a", 5)
    queries = [sql for sql in statements if sql.split()[0] in ("SELECT", "UPDATE", "DELETE")]
    assert len(queries) > 8
    for sql in queries:
        plan = [row[3] for row in ledger._database.rows(f"EXPLAIN QUERY PLAN {sql}")]
        assert all(step.startswith("SEARCH") for step in plan), (sql, plan)


def test_a_damaged_or_missing_ledger_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    ledger = SqliteLedger(path)
    reserve(ledger, "a")
    path.unlink()
    with pytest.raises(StoreError, match="no store"):
        reserve(ledger, "b")
    damaged = tmp_path / "damaged.sqlite"
    damaged.write_bytes(b"nonsense" * 1000)
    damaged.chmod(0o600)
    with pytest.raises(StoreError, match="not a database"):
        SqliteLedger(damaged)
