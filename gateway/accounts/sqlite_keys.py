"""API keys in a SQLite file, for the command line and the gateways of one machine."""

import secrets
import sqlite3
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from gateway.accounts.database import Database, StoreError
from gateway.accounts.key_records import KeyRecord
from gateway.accounts.keys import CACHE_S, SECRET_BYTES, Keys, Shelf, T

KEYS_FILE = "keys.sqlite"
"""In the folder of a gateway's stores."""

_COLUMNS = (
    "id, account, name, tier, licence, models, features, created, expires, revoked, watermark_key"
)
_ALL = f"SELECT {_COLUMNS} FROM keys ORDER BY created, id"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS keys (
    id TEXT PRIMARY KEY,
    account TEXT,
    digest BLOB NOT NULL UNIQUE,
    name TEXT NOT NULL,
    tier TEXT NOT NULL,
    licence TEXT NOT NULL,
    models TEXT NOT NULL,
    features TEXT NOT NULL,
    created REAL NOT NULL,
    expires REAL,
    revoked REAL,
    watermark_key TEXT NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS secrets (
    name TEXT PRIMARY KEY,
    value BLOB NOT NULL
) STRICT, WITHOUT ROWID;
"""


class KeyStore(Keys):
    """Keys in a SQLite file of mode 0600."""

    def __init__(
        self,
        path: Path,
        *,
        must_exist: bool = False,
        clock: Callable[[], float] = time.time,
        cache_s: float = CACHE_S,
    ) -> None:
        """Open the store, or make it; one of an earlier version is brought up to date.

        Args:
            must_exist: for gateways: a missing file is an error, and the store is only read.
            cache_s: at most 1 s.

        Raises:
            StoreError: if the file is missing (`must_exist`), broken, or open to other users; if it
                is of an earlier version and may not be written.
        """
        super().__init__(clock, cache_s)
        self._database = Database(path, _SCHEMA, ["keys"], read_only=must_exist)
        # quick_check finds nothing wrong with a table that is not there.
        self._database.rows("SELECT digest FROM keys LIMIT 1")
        if not must_exist:
            self._complete()
        self._secret = self._stored_secret()

    def secret(self) -> bytes:
        return self._secret

    def _look_up(self, digest: bytes) -> KeyRecord | None:
        sql = f"SELECT {_COLUMNS} FROM keys WHERE digest = ?"
        rows = self._database.rows(sql, (digest,))
        return _record(rows[0]) if rows else None

    def _change(self, act: Callable[[Shelf], T]) -> T:
        with self._database.transaction() as connection:
            return act(_Rows(connection))

    def _complete(self) -> None:
        """Add what stores of earlier versions do not have."""
        if self._is_complete():
            return
        with self._database.transaction() as connection:
            # Another process may have done it since.
            if not self._has_accounts():
                connection.execute("ALTER TABLE keys ADD COLUMN account TEXT")
                connection.execute("UPDATE keys SET account = id")
            connection.execute(
                "INSERT OR IGNORE INTO secrets VALUES ('server', ?)",
                (secrets.token_bytes(SECRET_BYTES),),
            )

    def _has_accounts(self) -> bool:
        columns = self._database.rows("SELECT name FROM pragma_table_info('keys')")
        return ("account",) in columns

    def _is_complete(self) -> bool:
        tables = self._database.rows("SELECT name FROM sqlite_schema WHERE name = 'secrets'")
        if not tables or not self._has_accounts():
            return False
        self._database.check("secrets")
        return bool(self._database.rows("SELECT 1 FROM secrets WHERE name = 'server'"))

    def _stored_secret(self) -> bytes:
        if not self._is_complete():
            raise StoreError(
                f"{self._database.path} is of an earlier version and may only be read here; "
                "`azeotrope keys list` brings it up to date"
            )
        [(value,)] = self._database.rows("SELECT value FROM secrets WHERE name = 'server'")
        return value

    def list(self) -> Sequence[KeyRecord]:
        return [_record(row) for row in self._database.rows(_ALL)]


class _Rows:
    """The keys within a transaction."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def get(self, id: str) -> KeyRecord | None:
        sql = f"SELECT {_COLUMNS} FROM keys WHERE id = ?"
        row = self._connection.execute(sql, (id,)).fetchone()
        return None if row is None else _record(row)

    def all(self) -> Sequence[KeyRecord]:
        return [_record(row) for row in self._connection.execute(_ALL)]

    def add(self, record: KeyRecord, digest: bytes) -> None:
        row = record.plain() | {"digest": digest}
        self._connection.execute(
            f"INSERT INTO keys ({', '.join(row)}) VALUES ({', '.join('?' * len(row))})",
            tuple(row.values()),
        )

    def put(self, record: KeyRecord) -> None:
        self._connection.execute(
            "UPDATE keys SET expires = ?, revoked = ? WHERE id = ?",
            (record.expires, record.revoked, record.id),
        )


def _record(row: Sequence[object]) -> KeyRecord:
    values: dict[str, object] = dict(zip(_COLUMNS.split(", "), row, strict=True))
    # A process of an earlier version that is still running adds keys without one.
    values["account"] = values["account"] or values["id"]
    return KeyRecord.of(values)
