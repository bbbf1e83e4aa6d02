"""API keys in Redis, for gateways on several nodes.

    :api-keys     hash: SHA-256 of a token -> its record, as JSON
    :api-ids      hash: id -> SHA-256 of its token
    :api-secret   the secret of this store; its presence says that the store exists

A revocation is only as durable as Redis. Repeat it if a failover or a crash of Redis lost the last
second of writes.
"""

import json
import secrets
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from gateway.accounts.database import StoreError
from gateway.accounts.key_records import KeyRecord
from gateway.accounts.keys import SECRET_BYTES, KeyStore, KeyTransaction, T
from gateway.accounts.redis_connection import TAG, RedisConnection, text

if TYPE_CHECKING:
    from redis import Redis

_KEYS, _IDS, _SECRET = f"{TAG}:api-keys", f"{TAG}:api-ids", f"{TAG}:api-secret"


class RedisKeyStore(KeyStore):
    """Keys that gateways on several nodes share; needs the extra `redis`."""

    def __init__(
        self,
        url_or_client: "str | Redis",
        *,
        must_exist: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Open the store, or create it.

        Args:
            must_exist: for gateways: a missing store is an error, and the store is only read.

        Raises:
            ConfigError: if the package is not installed or the URL is not one.
            StoreError: if Redis does not answer, or has no store (`must_exist`).
        """
        super().__init__(clock)
        self._redis, self._read_only = RedisConnection(url_or_client, "the keys"), must_exist
        self._client: Any = self._redis.client
        with self._redis.explaining_errors():
            if not must_exist:
                # `nx` keeps an existing secret, and of two processes that create the store together
                # only the first one writes. Hexadecimal digits, because a client may decode all
                # replies as UTF-8.
                self._client.set(_SECRET, secrets.token_hex(SECRET_BYTES), nx=True)
            stored_secret = self._client.get(_SECRET)
        if stored_secret is None:
            raise StoreError(
                "no keys in this Redis; `azeotrope keys create NAME --redis URL` begins a store"
            )
        self._secret = bytes.fromhex(text(stored_secret))

    def secret(self) -> bytes:
        return self._secret

    def _look_up(self, digest: bytes) -> KeyRecord | None:
        with self._redis.explaining_errors():
            value = self._client.hget(_KEYS, digest.hex())
        return None if value is None else _record(value)

    def _change(self, act: Callable[[KeyTransaction], T]) -> T:
        # SQLite itself refuses to write through a read-only connection; Redis has no such mode.
        if self._read_only:
            raise StoreError("the keys in Redis are readonly here: gateways do not change them")

        def attempt(pipe: Any) -> T:
            keys = _RedisTransaction(pipe)
            answer = act(keys)
            # The pipe executed each read at once; after MULTI it queues the writes, and EXEC makes
            # them all together.
            pipe.multi()
            for name, field, value in keys.writes:
                pipe.hset(name, field, value)
            return answer

        with self._redis.explaining_errors():
            # Optimistic locking: `transaction` watches both hashes and calls `attempt` again if
            # another process wrote to either between the first read and EXEC.
            return self._client.transaction(attempt, _KEYS, _IDS, value_from_callable=True)

    def list(self) -> Sequence[KeyRecord]:
        with self._redis.explaining_errors():
            return _all(self._client)


class _RedisTransaction:
    """The keys within a transaction: reads are made at once, writes are collected for its end."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self.writes: list[tuple[str, str, str]] = []

    def get(self, id: str) -> KeyRecord | None:
        digest = self._pipe.hget(_IDS, id)
        value = None if digest is None else self._pipe.hget(_KEYS, text(digest))
        return None if value is None else _record(value)

    def all(self) -> Sequence[KeyRecord]:
        return _all(self._pipe)

    def add(self, record: KeyRecord, digest: bytes) -> None:
        """Queue a new key.

        Raises:
            StoreError: if its id is taken.
        """
        # A hash has no unique constraint: without this check a second key of the same id would hide
        # the first, which then could not be revoked.
        if self._pipe.hexists(_IDS, record.id):
            raise StoreError(f"the id {record.id} is taken; try again")
        self.writes.append((_IDS, record.id, digest.hex()))
        self.writes.append((_KEYS, digest.hex(), json.dumps(record.plain())))

    def put(self, record: KeyRecord) -> None:
        digest = text(self._pipe.hget(_IDS, record.id))
        self.writes.append((_KEYS, digest, json.dumps(record.plain())))


def _all(client: Any) -> Sequence[KeyRecord]:
    records = [_record(value) for value in client.hvals(_KEYS)]
    return sorted(records, key=lambda record: (record.created, record.id))


def _record(value: bytes | str) -> KeyRecord:
    try:
        return KeyRecord.from_plain(json.loads(value))
    except ValueError as error:
        raise StoreError(f"the record of a key cannot be read: {error}") from error
