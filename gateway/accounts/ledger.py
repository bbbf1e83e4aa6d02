"""Quotas: tokens are reserved before an engine writes them and settled to what it wrote.

How many tokens an answer has is unknown before it ends, so the most that it may have is taken
first and what was not used is given back. A gateway that dies gives nothing back: its reservations
carry a lease, and whoever comes next settles those that ran out.
"""

import sqlite3
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Protocol, runtime_checkable

from gateway.accounts.database import Database
from gateway.accounts.quotas import DAY_MS, WINDOW_MS, LimitName, Limits, Minute, Refusal, Standing

LEDGER_FILE = "ledger.sqlite"
"""In the folder of a gateway's stores."""


@dataclass(frozen=True)
class Usage:
    """What one customer used on one day of UTC; a request belongs to the day it arrived on."""

    key: str
    """The account: the id of the customer's first key."""
    day: date
    requests: int
    """Settled ones; the tokens are theirs."""
    prompt_tokens: int
    completion_tokens: int
    open_requests: int


@runtime_checkable
class Ledger(Protocol):
    """Every operation is one transaction, over all processes that share the ledger.

    Each raises StoreError if the ledger cannot be read or written; who serves must refuse then.
    """

    def reserve(
        self,
        key: str,
        request: str,
        *,
        prompt: int,
        completion: int,
        slots: int,
        limits: Limits,
        owner: str,
        lease_s: float,
    ) -> Standing | Refusal:
        """Let a request in, or say why not.

        Args:
            key: the account that pays, which a rotated key shares with the one before it.
            request: an id that was never used before.
            prompt: tokens.
            completion: the most tokens that may be written, of all completions together.
            slots: completions under way.
            owner: the replica that will settle it.
            lease_s: if the owner is not heard of for so long, others settle it.
        """
        ...

    def progress(self, owner: str, written: Mapping[str, int], *, lease_s: float) -> None:
        """Say that these requests of an owner live, and what they have written so far.

        Requests that are settled already, and those of another owner, stay as they are.
        """
        ...

    def settle(self, request: str, completion: int) -> None:
        """End a request with the tokens it wrote; give back the rest and the slots.

        The first settlement counts, by whomever: a second one, or an unknown request, changes
        nothing.
        """
        ...

    def sweep(self) -> int:
        """Settle what lost its lease, at the prompt and what it had written; how many these were.

        Reservations do so too; a sweep serves keys that ask for nothing any more.
        """
        ...

    def usage(self, key: str | None = None) -> list[Usage]:
        """Day by day, of one account or of all."""
        ...


def check_reservation(prompt: int, completion: int, slots: int, lease_s: float) -> None:
    """Raises ValueError for numbers that no request has."""
    if prompt < 0 or completion < 0 or slots < 1 or lease_s <= 0:
        raise ValueError(
            "a reservation has 0 tokens or more, 1 slot or more and a lease above 0 s, got "
            f"prompt={prompt}, completion={completion}, slots={slots}, lease_s={lease_s}"
        )


def day_of(number: int) -> date:
    """The date of a day counted from 1970."""
    return datetime.fromtimestamp(number * DAY_MS / 1000, UTC).date()


# `requests` holds those that are open or in the last minute, `days` the sums of settled ones, so
# no look-up grows with the days. The first is stored in the order in which a window is read.
_SCHEMA = """
CREATE TABLE IF NOT EXISTS requests (
    key TEXT NOT NULL,
    arrived INTEGER NOT NULL,
    request TEXT NOT NULL,
    prompt INTEGER NOT NULL,
    reserved INTEGER NOT NULL,
    written INTEGER NOT NULL DEFAULT 0,
    slots INTEGER NOT NULL,
    owner TEXT NOT NULL,
    lease INTEGER NOT NULL,
    open INTEGER NOT NULL DEFAULT 1,
    cost INTEGER NOT NULL AS (prompt + iif(open, reserved, written)) VIRTUAL,
    PRIMARY KEY (key, arrived, request)
) STRICT, WITHOUT ROWID;
CREATE UNIQUE INDEX IF NOT EXISTS requests_by_id ON requests (request);
CREATE INDEX IF NOT EXISTS requests_open ON requests (key) WHERE open = 1;
CREATE INDEX IF NOT EXISTS requests_leased ON requests (lease) WHERE open = 1;
CREATE TABLE IF NOT EXISTS days (
    key TEXT NOT NULL,
    day INTEGER NOT NULL,
    requests INTEGER NOT NULL,
    prompt INTEGER NOT NULL,
    completion INTEGER NOT NULL,
    PRIMARY KEY (key, day)
) STRICT, WITHOUT ROWID;
"""


class SqliteLedger:
    """A ledger for the processes of one machine, in a SQLite file of mode 0600."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        """Open the file, or make it.

        Raises:
            StoreError: if it is broken or open to other users.
        """
        self._clock = clock
        self._database = Database(path, _SCHEMA, ["requests", "days"], read_only=False)

    def reserve(
        self,
        key: str,
        request: str,
        *,
        prompt: int,
        completion: int,
        slots: int,
        limits: Limits,
        owner: str,
        lease_s: float,
    ) -> Standing | Refusal:
        check_reservation(prompt, completion, slots, lease_s)
        tokens = prompt + completion
        with self._database.transaction() as db:
            now = self._now()
            _settle_lapsed(db, now)
            _forget(db, now, key)
            minute = _minute(db, key, now)
            after = minute.after(tokens, slots)
            excess = after.excess(limits)
            if excess:
                leaving: dict[LimitName, int] = {
                    name: _leaving(_window(db, key, now, name), amount)
                    for name, amount in excess.items()
                    if name in ("requests", "tokens")
                }
                return minute.refusal(limits, tokens, slots, leaving)
            db.execute(
                "INSERT INTO requests"
                " (key, arrived, request, prompt, reserved, slots, owner, lease)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (key, now, request, prompt, completion, slots, owner, now + _ms(lease_s)),
            )
        return after.standing(limits)

    def progress(self, owner: str, written: Mapping[str, int], *, lease_s: float) -> None:
        with self._database.transaction() as db:
            lease = self._now() + _ms(lease_s)
            db.executemany(
                "UPDATE requests SET written = max(written, ?), lease = ?"
                " WHERE request = ? AND owner = ? AND open = 1",
                [(tokens, lease, request, owner) for request, tokens in written.items()],
            )

    def settle(self, request: str, completion: int) -> None:
        if completion < 0:
            raise ValueError(f"a completion has 0 tokens or more, got {completion}")
        with self._database.transaction() as db:
            _settle(db, request, completion)

    def sweep(self) -> int:
        with self._database.transaction() as db:
            now = self._now()
            count = _settle_lapsed(db, now)
            _forget(db, now)
        return count

    def usage(self, key: str | None = None) -> list[Usage]:
        where, values = ("", ()) if key is None else ("WHERE key = ?", (key,))
        rows = self._database.rows(
            "SELECT key, day, sum(requests), sum(prompt), sum(completion), sum(open) FROM ("
            "  SELECT key, day, requests, prompt, completion, 0 AS open FROM days"
            "  UNION ALL"
            f"  SELECT key, arrived / {DAY_MS}, 0, 0, 0, 1 FROM requests WHERE open = 1"
            f") {where} GROUP BY key, day ORDER BY day, key",
            values,
        )
        return [Usage(key, day_of(day), *counts) for key, day, *counts in rows]

    def _now(self) -> int:
        return _ms(self._clock())


def _ms(seconds: float) -> int:
    return round(seconds * 1000)


def _minute(db: sqlite3.Connection, key: str, now: int) -> Minute:
    day = now // DAY_MS
    requests, tokens, newest = db.execute(
        "SELECT count(*), coalesce(sum(cost), 0), coalesce(max(arrived), 0)"
        " FROM requests WHERE key = ? AND arrived > ?",
        (key, now - WINDOW_MS),
    ).fetchone()
    slots, reserved = db.execute(
        "SELECT coalesce(sum(slots), 0), coalesce(sum(iif(arrived >= ?, cost, 0)), 0)"
        " FROM requests WHERE key = ? AND open = 1",
        (day * DAY_MS, key),
    ).fetchone()
    settled = db.execute(
        "SELECT prompt + completion FROM days WHERE key = ? AND day = ?", (key, day)
    ).fetchone()
    return Minute(now, requests, tokens, newest, reserved + (settled or (0,))[0], slots)


def _window(
    db: sqlite3.Connection, key: str, now: int, limit: LimitName
) -> Iterable[tuple[int, int]]:
    """Arrival and weight of each request of the last minute, oldest first."""
    weight = "cost" if limit == "tokens" else "1"
    return db.execute(
        f"SELECT arrived, {weight} FROM requests WHERE key = ? AND arrived > ? ORDER BY arrived",
        (key, now - WINDOW_MS),
    )


def _leaving(window: Iterable[tuple[int, int]], excess: int) -> int:
    """Arrival of the request with which enough has left; of the last one if that is too little."""
    last = 0
    for arrived, weight in window:
        last = arrived
        excess -= weight
        if excess <= 0:
            break
    return last


def _settle(db: sqlite3.Connection, request: str, completion: int) -> None:
    rows = db.execute(
        "UPDATE requests SET open = 0, written = ? WHERE request = ? AND open = 1"
        " RETURNING key, arrived, prompt",
        (completion, request),
    ).fetchall()
    for key, arrived, prompt in rows:
        db.execute(
            "INSERT INTO days VALUES (?, ?, 1, ?, ?) ON CONFLICT (key, day) DO UPDATE SET"
            " requests = requests + 1, prompt = prompt + excluded.prompt,"
            " completion = completion + excluded.completion",
            (key, arrived // DAY_MS, prompt, completion),
        )


def _settle_lapsed(db: sqlite3.Connection, now: int) -> int:
    """Settle every request whose owner was not heard of in time, at what it said last."""
    lapsed = db.execute(
        "SELECT request, written FROM requests WHERE open = 1 AND lease <= ?", (now,)
    ).fetchall()
    for request, written in lapsed:
        _settle(db, request, written)
    return len(lapsed)


def _forget(db: sqlite3.Connection, now: int, key: str | None = None) -> None:
    """Drop settled requests that no window holds any more; their tokens are in `days`."""
    sql = "DELETE FROM requests WHERE open = 0 AND arrived <= ?"
    if key is None:
        db.execute(sql, (now - WINDOW_MS,))
    else:
        db.execute(f"{sql} AND key = ?", (now - WINDOW_MS, key))
