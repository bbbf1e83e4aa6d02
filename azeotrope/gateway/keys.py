"""API keys: tokens that are shown once, and records that say what each may do."""

import hashlib
import json
import secrets
import sqlite3
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from azeotrope.config import ConfigError
from azeotrope.gateway.database import Database

KEYS_FILE = "keys.sqlite"
"""In the folder of a gateway's stores."""

Licence = Literal["usage", "distillation"]
FEATURES = ("chat", "completions", "metrics")
ORDINARY = ("chat", "completions")
"""What a key may use unless it is said otherwise."""
CACHE_S = 1.0
"""For so long a process may believe what it read, so a revocation works everywhere in a second."""

_COLUMNS = "id, name, tier, licence, models, features, created, expires, revoked, watermark_key"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS keys (
    id TEXT PRIMARY KEY,
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
"""


@dataclass(frozen=True)
class KeyRecord:
    """What is known of a key; the token is not. Times are seconds since 1970."""

    id: str
    """Public: it may stand in logs and bills."""
    name: str
    tier: str
    licence: Licence
    """`distillation` permits what the defenses prevent: the key gets the undefended teacher."""
    models: tuple[str, ...]
    """() permits all."""
    features: tuple[str, ...]
    created: float
    expires: float | None
    revoked: float | None
    watermark_key: str = field(repr=False)
    """Secret: decoding defenses mark each customer's text with it."""

    def is_active(self, now: float) -> bool:
        return self.revoked is None and (self.expires is None or now < self.expires)


class KeyStore:
    """Keys in a SQLite file of mode 0600, shared by the command line and gateway processes."""

    def __init__(
        self,
        path: Path,
        *,
        must_exist: bool = False,
        clock: Callable[[], float] = time.time,
        cache_s: float = CACHE_S,
    ) -> None:
        """Open the store, or make it.

        Args:
            must_exist: for gateways: a missing file is an error, and the store is only read.
            cache_s: at most 1 s.

        Raises:
            StoreError: if the file is missing (`must_exist`), broken, or open to other users.
        """
        if not 0 <= cache_s <= CACHE_S:
            raise ValueError(f"cache_s must be from 0 to {CACHE_S}, got {cache_s}")
        self._database = Database(path, _SCHEMA, ["keys"], read_only=must_exist)
        if must_exist:
            # quick_check finds nothing wrong with a table that is not there.
            self._database.rows("SELECT digest FROM keys LIMIT 1")
        self._clock, self._cache_s = clock, cache_s
        self._cache: dict[bytes, tuple[float, KeyRecord]] = {}

    def find(self, token: str) -> KeyRecord | None:
        """The record of an active key; None for tokens unknown, expired or revoked.

        A token is found by its SHA-256, without a salt and without a slow hash. Both protect what
        people choose and others guess; a token is 256 random bits, so there is nothing to guess,
        no two are equal, and a slow hash would only help whoever floods the gateway. The look-up
        is an index of digests: how long it takes depends on the digest, which nobody can steer
        towards a stored one, so time tells nothing about tokens.

        Raises:
            StoreError: if the store cannot be read. Whoever serves must refuse then.
        """
        record = self._read(_digest(token))
        return record if record is not None and record.is_active(self._clock()) else None

    def create(
        self,
        name: str,
        *,
        tier: str = "standard",
        licence: str = "usage",
        models: Sequence[str] = (),
        features: Sequence[str] = ORDINARY,
        expires_in_s: float | None = None,
    ) -> tuple[KeyRecord, str]:
        """A new key and its token, which exists nowhere else from here on.

        Whether the tier and the models exist is for the caller to know.

        Raises:
            ConfigError: if a licence, a feature or a time is not allowed.
            StoreError: if the store cannot be written.
        """
        _check(name, features, expires_in_s)
        now = self._clock()
        record = KeyRecord(
            id=_new_id(),
            name=name,
            tier=tier,
            licence=_licence(licence),
            models=tuple(models),
            features=tuple(features),
            created=now,
            expires=None if expires_in_s is None else now + expires_in_s,
            revoked=None,
            watermark_key=secrets.token_hex(32),
        )
        with self._database.transaction() as connection:
            return record, _insert(connection, record)

    def revoke(self, id: str) -> KeyRecord:
        """End a key at once; a key that is revoked already keeps the time of the first.

        Raises:
            ConfigError: if no key has this id.
            StoreError: if the store cannot be written.
        """
        with self._database.transaction() as connection:
            _get(connection, id)
            connection.execute(
                "UPDATE keys SET revoked = coalesce(revoked, ?) WHERE id = ?", (self._clock(), id)
            )
            record = _get(connection, id)
        self._cache.clear()
        return record

    def rotate(self, id: str, *, overlap_s: float = 0.0) -> tuple[KeyRecord, str]:
        """A new token with the rights, the end and the watermark of an active key.

        The old key is revoked, or ends after the overlap if that is not 0.

        Raises:
            ConfigError: if no key has this id, it is not active, or the overlap is negative.
            StoreError: if the store cannot be written.
        """
        if overlap_s < 0:
            raise ConfigError(f"the overlap is 0 seconds or more, got {overlap_s}")
        now = self._clock()
        with self._database.transaction() as connection:
            old = _get(connection, id)
            if not old.is_active(now):
                raise ConfigError(f"key {id} has ended and cannot be rotated; create a new one")
            new = KeyRecord(**{**vars(old), "id": _new_id(), "created": now})
            token = _insert(connection, new)
            if overlap_s:
                ends = now + overlap_s if old.expires is None else min(now + overlap_s, old.expires)
                connection.execute("UPDATE keys SET expires = ? WHERE id = ?", (ends, id))
            else:
                connection.execute("UPDATE keys SET revoked = ? WHERE id = ?", (now, id))
        self._cache.clear()
        return new, token

    def list(self) -> list[KeyRecord]:
        """All keys, those that ended too, oldest first."""
        rows = self._database.rows(f"SELECT {_COLUMNS} FROM keys ORDER BY created, id")
        return [_record(row) for row in rows]

    def _read(self, digest: bytes) -> KeyRecord | None:
        """What the store says, or said less than `cache_s` ago.

        Only what was found is remembered, so guessed tokens cannot fill the memory.
        """
        now = time.monotonic()
        cached = self._cache.get(digest)
        if cached is not None and now - cached[0] < self._cache_s:
            return cached[1]
        rows = self._database.rows(f"SELECT {_COLUMNS} FROM keys WHERE digest = ?", (digest,))
        if not rows:
            return None
        record = _record(rows[0])
        self._cache[digest] = (now, record)
        return record


def _digest(token: str) -> bytes:
    # A header may hold anything; what no token holds is simply unknown.
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


def _new_id() -> str:
    return f"ak-{secrets.token_hex(4)}"


def _insert(connection: sqlite3.Connection, record: KeyRecord) -> str:
    """Store a record under the digest of a new token.

    An id that is taken (once in four thousand million, for one other key) fails the transaction.
    """
    token = f"az-{secrets.token_urlsafe(32)}"
    row = vars(record) | {
        "models": json.dumps(record.models),
        "features": json.dumps(record.features),
        "digest": _digest(token),
    }
    connection.execute(
        f"INSERT INTO keys ({', '.join(row)}) VALUES ({', '.join('?' * len(row))})",
        tuple(row.values()),
    )
    return token


def _get(connection: sqlite3.Connection, id: str) -> KeyRecord:
    row = connection.execute(f"SELECT {_COLUMNS} FROM keys WHERE id = ?", (id,)).fetchone()
    if row is None:
        raise ConfigError(f"no key has the id {id!r}; `azeotrope keys list` shows all")
    return _record(row)


def _record(row: Sequence[object]) -> KeyRecord:
    values = dict(zip(_COLUMNS.split(", "), row, strict=True))
    for name in ("models", "features"):
        values[name] = tuple(json.loads(str(values[name])))
    return KeyRecord(**values)  # type: ignore[arg-type]


def _licence(given: str) -> Licence:
    if given == "usage" or given == "distillation":
        return given
    raise ConfigError(f"licence must be usage or distillation, got {given!r}")


def _check(name: str, features: Sequence[str], expires_in_s: float | None) -> None:
    if not name.strip():
        raise ConfigError("a key needs a name, such as that of the customer or the program")
    unknown = sorted(set(features) - set(FEATURES))
    if unknown or not features:
        raise ConfigError(f"features are {', '.join(FEATURES)}, got {list(features)}")
    if expires_in_s is not None and not expires_in_s > 0:
        raise ConfigError(f"a key must end in the future, got {expires_in_s} seconds")
