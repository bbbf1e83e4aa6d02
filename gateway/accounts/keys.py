"""API keys: what every key store does, whether it keeps them in SQLite or in Redis."""

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol, TypeVar, runtime_checkable

from azeotrope.config import ConfigError
from gateway.accounts.key_records import (
    ORDINARY,
    KeyRecord,
    check_rights,
    digest,
    new_id,
    new_token,
    parse_licence,
)

CACHE_S = 1.0
"""How long a process may rely on a record that it read. A revocation therefore reaches every
gateway within one second."""
SECRET_BYTES = 32

T = TypeVar("T")


@runtime_checkable
class KeyTransaction(Protocol):
    """The keys during one change, which succeeds whole or not at all."""

    def get(self, id: str) -> KeyRecord | None: ...

    def all(self) -> Sequence[KeyRecord]: ...

    def add(self, record: KeyRecord, digest: bytes) -> None:
        """Store a new key. The change fails if the id is taken (ids have 32 random bits)."""
        ...

    def put(self, record: KeyRecord) -> None:
        """Store a new end (`expires`, `revoked`) of a key that exists."""
        ...


class KeyStore(ABC):
    """Records of API keys, and digests of their tokens; a token is shown once and not stored.

    Every method raises StoreError if the store cannot be read or written. A gateway must refuse
    requests then.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._cache: dict[bytes, tuple[float, KeyRecord]] = {}

    @abstractmethod
    def secret(self) -> bytes:
        """32 random bytes that belong to this store and never change.

        They are never shown. Gateways derive from them what clients must not be able to compute.
        """

    def find(self, token: str) -> KeyRecord | None:
        """The record of an active key; None if the token is unknown, expired or revoked.

        The time of the look-up reveals nothing about stored tokens: it depends on the digest, and
        a client cannot choose a token whose digest is close to a stored one.
        """
        record = self._read(digest(token))
        # The cache may hold a record that has expired since: the check is made for each request.
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
        """A new key and its token, which is stored nowhere.

        The store does not know which tiers and models exist, so the caller must check them.

        Raises:
            ConfigError: if the name is blank, or a licence, a feature or a time is not allowed.
        """
        check_rights(name, features, expires_in_s)
        now, id = self._clock(), new_id()
        record = KeyRecord(
            id=id,
            account=id,
            name=name,
            tier=tier,
            licence=parse_licence(licence),
            models=tuple(models),
            features=tuple(features),
            created=now,
            expires=None if expires_in_s is None else now + expires_in_s,
            revoked=None,
            watermark_key=secrets.token_hex(32),
        )
        return record, self._change(lambda keys: _add(keys, record))

    def revoke(self, id: str) -> KeyRecord:
        """End a key at once; a key that is revoked already keeps its first time.

        Raises:
            ConfigError: if no key has this id.
        """

        def end(keys: KeyTransaction) -> KeyRecord:
            record = _existing(keys, id).revoked_at(self._clock())
            keys.put(record)
            return record

        return self._change_and_forget(end)

    def revoke_account(self, id: str) -> Sequence[KeyRecord]:
        """End every key of a customer at once, given the id of any of them.

        Raises:
            ConfigError: if no key has this id.
        """

        def end(keys: KeyTransaction) -> Sequence[KeyRecord]:
            # The keys are listed within the change: a rotation at the same moment could otherwise
            # add one that stays active.
            account = _existing(keys, id).account
            siblings = [record for record in keys.all() if record.account == account]
            revoked = [record.revoked_at(self._clock()) for record in siblings]
            for record in revoked:
                keys.put(record)
            return revoked

        return self._change_and_forget(end)

    def rotate(self, id: str, *, overlap_s: float = 0.0) -> tuple[KeyRecord, str]:
        """A new token with the account, the rights, the end and the watermark of an active key.

        The old key is revoked, or expires after the overlap if that is not 0.

        Raises:
            ConfigError: if no key has this id, it is not active, or the overlap is negative.
        """
        if overlap_s < 0:
            raise ConfigError(f"the overlap is 0 seconds or more, got {overlap_s}")
        now = self._clock()

        # One change for both keys. If the process dies in between two changes, the customer would
        # have two keys without an end, or none.
        def turn(keys: KeyTransaction) -> tuple[KeyRecord, str]:
            old = _existing(keys, id)
            if not old.is_active(now):
                raise ConfigError(f"key {id} has ended and cannot be rotated; create a new one")
            new = replace(old, id=new_id(), created=now)
            token = _add(keys, new)
            keys.put(old.replaced_at(now, overlap_s))
            return new, token

        return self._change_and_forget(turn)

    def _change_and_forget(self, act: Callable[[KeyTransaction], T]) -> T:
        """Make a change that ends keys, and drop the cache so that this process refuses them now.

        The cache is dropped after an error too: the change may have reached the store before the
        connection broke.
        """
        try:
            return self._change(act)
        finally:
            self._cache.clear()

    def _read(self, digest: bytes) -> KeyRecord | None:
        """The record in the store, or the one that was read less than `CACHE_S` ago.

        Only existing keys are cached, so guessed tokens cannot fill the memory.
        """
        # Ages of cache entries are measured on the monotonic clock: a step of the wall clock
        # backwards must not keep a revoked key alive.
        now = time.monotonic()
        cached = self._cache.get(digest)
        if cached is not None and now - cached[0] < CACHE_S:
            return cached[1]
        record = self._look_up(digest)
        if record is not None:
            self._cache[digest] = (now, record)
        return record

    @abstractmethod
    def _look_up(self, digest: bytes) -> KeyRecord | None:
        """The record in the store now."""

    @abstractmethod
    def _change(self, act: Callable[[KeyTransaction], T]) -> T:
        """Make a change whole or not at all, isolated from other writers.

        `act` may be called several times until the change succeeds; the last call counts.
        """

    # Below this line `list` is the method.
    @abstractmethod
    def list(self) -> Sequence[KeyRecord]:
        """All keys, including those that ended, oldest first."""


def _add(keys: KeyTransaction, record: KeyRecord) -> str:
    token = new_token()
    keys.add(record, digest(token))
    return token


def _existing(keys: KeyTransaction, id: str) -> KeyRecord:
    record = keys.get(id)
    if record is None:
        raise ConfigError(f"no key has the id {id!r}; `azeotrope keys list` shows all")
    return record
