"""Where keys and quotas are: on one node in files of a folder, on several in Redis."""

import os
from pathlib import Path

from gateway.accounts.keys import Keys
from gateway.accounts.ledger import LEDGER_FILE, Ledger, SqliteLedger
from gateway.accounts.redis_keys import RedisKeyStore
from gateway.accounts.redis_ledger import RedisLedger
from gateway.accounts.sqlite_keys import KEYS_FILE, KeyStore


def default_store() -> Path:
    """The folder of keys, quotas and logs: $AZEOTROPE_HOME or ~/.azeotrope."""
    home = os.environ.get("AZEOTROPE_HOME")
    return Path(home).expanduser() if home else Path.home() / ".azeotrope"


def open_keys(folder: Path, redis: str | None = None, *, must_exist: bool = False) -> Keys:
    """The keys that gateways of this folder, or of this Redis, look at.

    Args:
        redis: a URL; the folder is not looked at then.
        must_exist: a store that nobody began is an error, and it is only read.

    Raises:
        ConfigError: if the package redis is missing or the URL is not one.
        StoreError: if the store cannot be opened.
    """
    if redis is not None:
        return RedisKeyStore(redis, must_exist=must_exist)
    return KeyStore(folder / KEYS_FILE, must_exist=must_exist)


def open_ledger(folder: Path, redis: str | None = None) -> Ledger:
    """The quotas of the same gateways; raises as `open_keys` does."""
    return SqliteLedger(folder / LEDGER_FILE) if redis is None else RedisLedger(redis)
