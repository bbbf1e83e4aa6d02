"""What every store of API keys does, wherever it keeps them."""

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
    check,
    digest,
    licence_of,
    new_id,
    new_token,
)

CACHE_S = 1.0
"""For so long a process may believe what it read, so a revocation works everywhere in a second."""
SECRET_BYTES = 32

T = TypeVar("T")


@runtime_checkable
class Shelf(Protocol):
    """The keys within one change."""

    def get(self, id: str) -> KeyRecord | None: ...

    def all(self) -> Sequence[KeyRecord]: ...

    def add(self, record: KeyRecord, digest: bytes) -> None:
        """Keep a new key. An id that is taken (once in four thousand million, for one other key)
        fails the change."""
        ...

    def put(self, record: KeyRecord) -> None:
        """Keep a new end (`expires`, `revoked`) of a key that is there."""
        ...


class Keys(ABC):
    """Tokens that are shown once, and records that say what each may do.

    Everything raises StoreError if the store cannot be read or written; who serves must refuse
    then.
    """

    def __init__(self, clock: Callable[[], float], cache_s: float) -> None:
        if not 0 <= cache_s <= CACHE_S:
            raise ValueError(f"cache_s must be from 0 to {CACHE_S}, got {cache_s}")
        self._clock, self._cache_s = clock, cache_s
        self._cache: dict[bytes, tuple[float, KeyRecord]] = {}

    @abstractmethod
    def secret(self) -> bytes:
        """32 random bytes of this store alone, made with it and the same ever since.

        Never shown: gateways key with it what clients must not be able to compute.
        """

    def find(self, token: str) -> KeyRecord | None:
        """The record of an active key; None for tokens unknown, expired or revoked.

        The look-up is an index of digests: how long it takes depends on the digest, which nobody
        can steer towards a stored one, so time tells nothing about tokens.
        """
        record = self._read(digest(token))
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
        """
        check(name, features, expires_in_s)
        now, id = self._clock(), new_id()
        record = KeyRecord(
            id=id,
            account=id,
            name=name,
            tier=tier,
            licence=licence_of(licence),
            models=tuple(models),
            features=tuple(features),
            created=now,
            expires=None if expires_in_s is None else now + expires_in_s,
            revoked=None,
            watermark_key=secrets.token_hex(32),
        )
        return record, self._change(lambda shelf: _add(shelf, record))

    def revoke(self, id: str) -> KeyRecord:
        """End a key at once; a key that is revoked already keeps the time of the first.

        Raises:
            ConfigError: if no key has this id.
        """

        def end(shelf: Shelf) -> KeyRecord:
            record = _known(shelf, id).revoked_at(self._clock())
            shelf.put(record)
            return record

        return self._ended(end)

    def revoke_account(self, id: str) -> Sequence[KeyRecord]:
        """End every key of a customer at once, given the id of any of them.

        Raises:
            ConfigError: if no key has this id.
        """

        def end(shelf: Shelf) -> Sequence[KeyRecord]:
            account = _known(shelf, id).account
            mine = [record for record in shelf.all() if record.account == account]
            records = [record.revoked_at(self._clock()) for record in mine]
            for record in records:
                shelf.put(record)
            return records

        return self._ended(end)

    def rotate(self, id: str, *, overlap_s: float = 0.0) -> tuple[KeyRecord, str]:
        """A new token with the account, the rights, the end and the watermark of an active key.

        The old key is revoked, or ends after the overlap if that is not 0.

        Raises:
            ConfigError: if no key has this id, it is not active, or the overlap is negative.
        """
        if overlap_s < 0:
            raise ConfigError(f"the overlap is 0 seconds or more, got {overlap_s}")
        now = self._clock()

        def turn(shelf: Shelf) -> tuple[KeyRecord, str]:
            old = _known(shelf, id)
            if not old.is_active(now):
                raise ConfigError(f"key {id} has ended and cannot be rotated; create a new one")
            new = replace(old, id=new_id(), created=now)
            token = _add(shelf, new)
            shelf.put(old.replaced_at(now, overlap_s))
            return new, token

        return self._ended(turn)

    def _ended(self, act: Callable[[Shelf], T]) -> T:
        """A change that ends keys, so that this process stops believing in them at once."""
        try:
            return self._change(act)
        finally:
            self._cache.clear()

    def _read(self, digest: bytes) -> KeyRecord | None:
        """What the store says, or said less than `cache_s` ago.

        Only what was found is remembered, so guessed tokens cannot fill the memory.
        """
        now = time.monotonic()
        cached = self._cache.get(digest)
        if cached is not None and now - cached[0] < self._cache_s:
            return cached[1]
        record = self._look_up(digest)
        if record is not None:
            self._cache[digest] = (now, record)
        return record

    @abstractmethod
    def _look_up(self, digest: bytes) -> KeyRecord | None:
        """What the store says now."""

    @abstractmethod
    def _change(self, act: Callable[[Shelf], T]) -> T:
        """Do a change whole or not at all, and as if nobody else wrote meanwhile.

        It may be done several times until it succeeds; the last time counts.
        """

    # Below this line `list` is the method.
    @abstractmethod
    def list(self) -> Sequence[KeyRecord]:
        """All keys, those that ended too, oldest first."""


def _add(shelf: Shelf, record: KeyRecord) -> str:
    token = new_token()
    shelf.add(record, digest(token))
    return token


def _known(shelf: Shelf, id: str) -> KeyRecord:
    record = shelf.get(id)
    if record is None:
        raise ConfigError(f"no key has the id {id!r}; `azeotrope keys list` shows all")
    return record
