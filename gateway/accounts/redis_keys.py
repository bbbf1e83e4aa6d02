"""API keys in Redis, for gateways on several nodes.

    :api-keys     hash: SHA-256 of a token -> its record, as JSON
    :api-ids      hash: id -> SHA-256 of its token
    :api-secret   the secret of this store; who finds it finds a store that was begun

A revocation is as durable as Redis: one that is copied to a replica too late, or lost with the last
second of its log, is a revocation to repeat.
"""

import json
import secrets
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from gateway.accounts.database import StoreError
from gateway.accounts.key_records import KeyRecord
from gateway.accounts.keys import CACHE_S, SECRET_BYTES, Keys, Shelf, T
from gateway.accounts.redis_connection import TAG, RedisConnection, text

if TYPE_CHECKING:
    from redis import Redis

_KEYS, _IDS, _SECRET = f"{TAG}:api-keys", f"{TAG}:api-ids", f"{TAG}:api-secret"


class RedisKeyStore(Keys):
    """Keys that gateways on several nodes share; needs the extra `redis`."""

    def __init__(
        self,
        url_or_client: "str | Redis",
        *,
        must_exist: bool = False,
        clock: Callable[[], float] = time.time,
        cache_s: float = CACHE_S,
    ) -> None:
        """Open the store, or begin it.

        Args:
            must_exist: for gateways: a store that nobody began is an error, and it is only read.
            cache_s: at most 1 s.

        Raises:
            ConfigError: if the package is not installed or the URL is not one.
            StoreError: if Redis does not answer, or has no store (`must_exist`).
        """
        super().__init__(clock, cache_s)
        self._redis, self._read_only = RedisConnection(url_or_client, "the keys"), must_exist
        self._client: Any = self._redis.client
        with self._redis.asked():
            if not must_exist:
                # As text: a client may have been told to read everything as such.
                self._client.set(_SECRET, secrets.token_hex(SECRET_BYTES), nx=True)
            found = self._client.get(_SECRET)
        if found is None:
            raise StoreError(
                "no keys in this Redis; `azeotrope keys create NAME --redis URL` begins a store"
            )
        self._secret = bytes.fromhex(text(found))

    def secret(self) -> bytes:
        return self._secret

    def _look_up(self, digest: bytes) -> KeyRecord | None:
        with self._redis.asked():
            found = self._client.hget(_KEYS, digest.hex())
        return None if found is None else _record(found)

    def _change(self, act: Callable[[Shelf], T]) -> T:
        if self._read_only:
            raise StoreError("the keys in Redis are readonly here: gateways do not change them")

        def attempt(pipe: Any) -> T:
            shelf = _Hashes(pipe)
            answer = act(shelf)
            # Until here the pipe has answered at once; from here on it collects.
            pipe.multi()
            for name, field, value in shelf.writes:
                pipe.hset(name, field, value)
            return answer

        with self._redis.asked():
            # Begins again if another process wrote between the reading and the writing.
            return self._client.transaction(attempt, _KEYS, _IDS, value_from_callable=True)

    def list(self) -> Sequence[KeyRecord]:
        with self._redis.asked():
            return _all(self._client)


class _Hashes:
    """The keys within a transaction: read as they are, written at its end."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self.writes: list[tuple[str, str, str]] = []

    def get(self, id: str) -> KeyRecord | None:
        digest = self._pipe.hget(_IDS, id)
        found = None if digest is None else self._pipe.hget(_KEYS, text(digest))
        return None if found is None else _record(found)

    def all(self) -> Sequence[KeyRecord]:
        return _all(self._pipe)

    def add(self, record: KeyRecord, digest: bytes) -> None:
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
        return KeyRecord.of(json.loads(value))
    except ValueError as error:
        raise StoreError(f"the record of a key cannot be read: {error}") from error
