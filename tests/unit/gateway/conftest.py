"""Fixtures for the tests of keys and quotas: every kind of store, with a clock moved by hand."""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from store_kinds import KINDS, Clock, LedgerOpener, StoreOpener, redis_imitation

if TYPE_CHECKING:
    from gateway.accounts.keys import KeyStore
    from gateway.accounts.ledger import Ledger


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look-up of a key reads the store."""
    from gateway.accounts import keys

    monkeypatch.setattr(keys, "CACHE_S", 0.0)


@pytest.fixture(params=KINDS)
def open_store(request: pytest.FixtureRequest, tmp_path: Path, clock: Clock) -> StoreOpener:
    """Opens the same key store at each call, as several processes would."""
    import redis

    from gateway.accounts.redis_keys import RedisKeyStore
    from gateway.accounts.sqlite_keys import KEYS_FILE, SqliteKeyStore

    if request.param == "sqlite":
        return partial(SqliteKeyStore, tmp_path / "home" / KEYS_FILE, clock=clock)
    if request.param == "imitation":
        return partial(RedisKeyStore, redis_imitation(), clock=clock)
    url = request.getfixturevalue("redis_url")
    redis.Redis.from_url(url).flushall()
    return partial(RedisKeyStore, url, clock=clock)


@pytest.fixture
def store(open_store: StoreOpener) -> "KeyStore":
    return open_store()


@pytest.fixture(params=KINDS)
def empty_ledger(request: pytest.FixtureRequest) -> LedgerOpener:
    """Opens an empty ledger at each call; None takes the clock of the machine, or of Redis."""
    import redis

    from gateway.accounts.redis_ledger import RedisLedger
    from gateway.accounts.sqlite_ledger import SqliteLedger

    kind = request.param
    url = request.getfixturevalue("redis_url") if kind == "redis" else ""

    @contextmanager
    def opened(clock: Callable[[], float] | None) -> "Iterator[Ledger]":
        if kind == "sqlite":
            with tempfile.TemporaryDirectory() as folder:
                yield SqliteLedger(Path(folder) / "ledger.sqlite", clock or time.time)
        elif kind == "imitation":
            yield RedisLedger(redis_imitation(), clock)
        else:
            redis.Redis.from_url(url).flushall()
            yield RedisLedger(url, clock)

    return opened


@pytest.fixture
def ledger(empty_ledger: LedgerOpener, clock: Clock) -> "Iterator[Ledger]":
    with empty_ledger(clock) as opened:
        yield opened
