"""Errors of the stores in Redis when the server, the URL or the package is missing."""

import socket
import sys
from collections.abc import Callable

import pytest

from azeotrope.config import ConfigError
from gateway.accounts.database import StoreError
from gateway.accounts.redis_keys import RedisKeyStore
from gateway.accounts.redis_ledger import RedisLedger

Store = Callable[[str], object]
every_store = pytest.mark.parametrize("store", [RedisKeyStore, RedisLedger])


@every_store
def test_a_redis_that_does_not_answer_is_an_error(store: Store) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(StoreError, match="Redis cannot be used"):
        store(f"redis://127.0.0.1:{port}/0")


@every_store
def test_a_wrong_url_is_refused_without_its_password(store: Store) -> None:
    with pytest.raises(ConfigError, match="rediss://") as error:
        store("http://user:secret@host")
    assert "secret" not in str(error.value)


@every_store
def test_without_the_package_the_error_names_the_extra(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(ConfigError, match=r"azeotrope\[redis\]"):
        store("redis://127.0.0.1:1/0")
