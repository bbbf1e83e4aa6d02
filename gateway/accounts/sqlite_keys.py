"""API keys in a SQLite file, for the command line and the gateways of one machine."""

import secrets
import sqlite3
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from gateway.accounts.database import Database, StoreError
from gateway.accounts.key_records import KeyRecord
from gateway.accounts.keys import SECRET_BYTES, KeyStore, KeyTransaction, T

KEYS_FILE = "keys.sqlite"
"""Name of the file in a gateway's folder."""

_COLUMNS = (
    "id, account, name, tier, licence, models, features, created, expires, revoked, watermark_key"
)
_ALL = f"SELECT {_COLUMNS} FROM keys ORDER BY created, id"
# The unique digest is the index that `find` reads: a request never searches the table.
_SCHEMA = """
CREATE TABLE IF NOT EXISTS keys (
    id TEXT PRIMARY KEY,
    account TEXT NOT NULL,
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


class SqliteKeyStore(KeyStore):
    """Keys in a SQLite file of mode 0600."""

    def __init__(
        self,
        path: Path,
        *,
        must_exist: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Open the store, or create it.

        Args:
            must_exist: for gateways: a missing file is an error, and the store is only read.

        Raises:
            StoreError: if the file is missing or incomplete (`must_exist`), damaged, or open to
                other users.
        """
        super().__init__(clock)
        self._database = Database(path, _SCHEMA, ["keys", "secrets"], read_only=must_exist)
        # The check of pages reports no error for a missing table, so this query asks for one.
        self._database.rows("SELECT digest FROM keys LIMIT 1")
        if not must_exist and self._stored_secret() is None:
            self._add_secret()
        secret = self._stored_secret()
        if secret is None:
            raise StoreError(f"{path} has no secret; `azeotrope keys list` adds one")
        self._secret = secret

    def secret(self) -> bytes:
        return self._secret

    def _look_up(self, digest: bytes) -> KeyRecord | None:
        sql = f"SELECT {_COLUMNS} FROM keys WHERE digest = ?"
        rows = self._database.rows(sql, (digest,))
        return _record(rows[0]) if rows else None

    def _change(self, act: Callable[[KeyTransaction], T]) -> T:
        with self._database.transaction() as connection:
            return act(_SqliteTransaction(connection))

    def _add_secret(self) -> None:
        with self._database.transaction() as connection:
            # Two processes may create the store together. The first secret stays, and both read it
            # back from the file.
            connection.execute(
                "INSERT OR IGNORE INTO secrets VALUES ('server', ?)",
                (secrets.token_bytes(SECRET_BYTES),),
            )

    def _stored_secret(self) -> bytes | None:
        rows = self._database.rows("SELECT value FROM secrets WHERE name = 'server'")
        return rows[0][0] if rows else None

    def list(self) -> Sequence[KeyRecord]:
        return [_record(row) for row in self._database.rows(_ALL)]


class _SqliteTransaction:
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
        # The end of a key is all that may change: an update cannot widen its rights.
        self._connection.execute(
            "UPDATE keys SET expires = ?, revoked = ? WHERE id = ?",
            (record.expires, record.revoked, record.id),
        )


def _record(row: Sequence[object]) -> KeyRecord:
    return KeyRecord.from_plain(dict(zip(_COLUMNS.split(", "), row, strict=True)))
