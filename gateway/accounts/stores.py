"""Where keys and quotas are: on one node in files of a folder, on several nodes in Redis."""

from dataclasses import dataclass, field
from pathlib import Path

from azeotrope.environment import Environment
from gateway.accounts.keys import KeyStore
from gateway.accounts.ledger import Ledger
from gateway.accounts.redis_keys import RedisKeyStore
from gateway.accounts.redis_ledger import RedisLedger
from gateway.accounts.sqlite_keys import KEYS_FILE, SqliteKeyStore
from gateway.accounts.sqlite_ledger import LEDGER_FILE, SqliteLedger


def default_store() -> Path:
    """The folder of keys, quotas and logs: $AZEOTROPE_HOME or ~/.azeotrope."""
    return Environment().home


@dataclass(frozen=True)
class StoreLocation:
    """Where one deployment of gateways keeps its keys and quotas."""

    folder: Path
    """Holds them as files, unless `redis` is set."""
    redis: str | None = field(default=None, repr=False)
    """URL of a Redis that holds them. Not in the `repr`: there may be a password in it."""

    @classmethod
    def of_options(cls, store: Path | None, redis: str | None) -> "StoreLocation":
        """The location that the options `--store` and `--redis` name; None takes the defaults."""
        return cls(store or default_store(), redis)


def open_keys(location: StoreLocation, *, must_exist: bool = False) -> KeyStore:
    """The keys of the gateways at a location.

    Args:
        must_exist: a missing store is an error, and the store is only read.

    Raises:
        ConfigError: if the package redis is missing or the URL is not one.
        StoreError: if the store cannot be opened.
    """
    if location.redis is not None:
        return RedisKeyStore(location.redis, must_exist=must_exist)
    return SqliteKeyStore(location.folder / KEYS_FILE, must_exist=must_exist)


def open_ledger(location: StoreLocation) -> Ledger:
    """The quotas of the gateways at a location.

    Raises:
        ConfigError: if the package redis is missing or the URL is not one.
        StoreError: if the ledger cannot be opened.
    """
    if location.redis is not None:
        return RedisLedger(location.redis)
    return SqliteLedger(location.folder / LEDGER_FILE)
