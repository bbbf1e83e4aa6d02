"""The quota ledger of one machine: a SQLite file that its gateway processes share."""

import sqlite3
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from gateway.accounts.database import Database
from gateway.accounts.ledger import (
    Reservation,
    Usage,
    check_completion,
    date_of_day,
    lease_ms,
    milliseconds,
)
from gateway.accounts.quotas import DAY_MS, WINDOW_MS, LimitName, Limits, Minute, Refusal, Standing

LEDGER_FILE = "ledger.sqlite"
"""Name of the file in a gateway's folder."""

# `requests` holds the requests that are open or arrived in the last minute; `days` holds the sums
# of settled ones. A look-up therefore takes the same time after a year as on the first day.
# - The primary key stores `requests` in the order in which a window is read, without a rowid.
# - `cost` is what a request counts in its window: the reservation while it is open, then its usage.
# - The partial indices contain open requests only, which `concurrency` and expired leases ask for.
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
        """Open the file, or create it.

        Raises:
            StoreError: if it is damaged or open to other users.
        """
        self._clock = clock
        self._database = Database(path, _SCHEMA, ["requests", "days"], read_only=False)

    def reserve(
        self, reservation: Reservation, limits: Limits, *, owner: str, lease_s: float
    ) -> Standing | Refusal:
        """Admit a request, or say why it does not fit; see `Ledger.reserve`.

        Raises:
            StoreError: if the file cannot be written, or the id of the request was used before.
            ValueError: if the lease is not above 0 s.
        """
        lease = lease_ms(lease_s)
        key, tokens, slots = reservation.key, reservation.tokens, reservation.slots
        # The counts are read and the request is inserted under one write lock. Otherwise two
        # processes could both see the last free slot and both take it.
        with self._database.transaction() as db:
            # The clock is read under the lock too, so that arrivals are in the order of commits.
            now = self._now()
            # First give back what dead replicas hold: it may be what this request needs.
            _settle_expired(db, now)
            _delete_old(db, now, key)
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
            # The unique index on the id fails this statement, and with it the reservation, if the
            # id was used before.
            db.execute(
                "INSERT INTO requests"
                " (key, arrived, request, prompt, reserved, slots, owner, lease)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    *(key, now, reservation.request, reservation.prompt, reservation.completion),
                    *(slots, owner, now + lease),
                ),
            )
        return after.standing(limits)

    def progress(self, owner: str, written: Mapping[str, int], *, lease_s: float) -> None:
        with self._database.transaction() as db:
            lease = self._now() + milliseconds(lease_s)
            # `max`, because a report may arrive after a later one. `open = 1`, because a request
            # whose lease ran out is settled and its late report must not change the bill.
            db.executemany(
                "UPDATE requests SET written = max(written, ?), lease = ?"
                " WHERE request = ? AND owner = ? AND open = 1",
                [(tokens, lease, request, owner) for request, tokens in written.items()],
            )

    def settle(self, request: str, completion: int) -> None:
        check_completion(completion)
        with self._database.transaction() as db:
            _settle(db, request, completion)

    def sweep(self) -> int:
        with self._database.transaction() as db:
            now = self._now()
            count = _settle_expired(db, now)
            _delete_old(db, now)
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
        return [Usage(key, date_of_day(day), *counts) for key, day, *counts in rows]

    def _now(self) -> int:
        return milliseconds(self._clock())


def _minute(db: sqlite3.Connection, key: str, now: int) -> Minute:
    day = now // DAY_MS
    requests, tokens, newest = db.execute(
        "SELECT count(*), coalesce(sum(cost), 0), coalesce(max(arrived), 0)"
        " FROM requests WHERE key = ? AND arrived > ?",
        (key, now - WINDOW_MS),
    ).fetchone()
    # Slots are held as long as a request is open, however long ago it arrived. Its tokens count on
    # the day of its arrival only.
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
    """Arrival of the request whose leaving the window removes the excess.

    If the whole window is too little, it is the arrival of the last request.
    """
    last = 0
    for arrived, weight in window:
        last = arrived
        excess -= weight
        if excess <= 0:
            break
    return last


def _settle(db: sqlite3.Connection, request: str, completion: int) -> None:
    # The condition `open = 1` makes the first settlement the only one: a second one updates no row,
    # so it adds nothing to the day.
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


def _settle_expired(db: sqlite3.Connection, now: int) -> int:
    """Settle every request whose lease ran out, at the tokens that its owner reported last."""
    expired = db.execute(
        "SELECT request, written FROM requests WHERE open = 1 AND lease <= ?", (now,)
    ).fetchall()
    for request, written in expired:
        _settle(db, request, written)
    return len(expired)


def _delete_old(db: sqlite3.Connection, now: int, key: str | None = None) -> None:
    """Delete settled requests that have left the window; their tokens are in `days`."""
    sql = "DELETE FROM requests WHERE open = 0 AND arrived <= ?"
    if key is None:
        db.execute(sql, (now - WINDOW_MS,))
    else:
        db.execute(f"{sql} AND key = ?", (now - WINDOW_MS, key))
