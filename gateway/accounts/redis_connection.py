"""A connection to a Redis that the gateways of several nodes share; needs the extra `redis`.

This Redis must not lose data: it needs `appendonly yes` and `maxmemory-policy noeviction`. On a
network that is not trusted, pass a `rediss://` URL (TLS) or a client of your own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from azeotrope.config import ConfigError
from gateway.accounts.database import StoreError

if TYPE_CHECKING:
    from redis import Redis

TAG = "{azeotrope}"
"""Prefix of every name. A Redis cluster hashes the part in braces alone, so all names are on one
node, where a transaction or a script can change them together."""
TIMEOUT_S = 2.0


class RedisConnection:
    """A client, and errors that say which store they concern."""

    def __init__(self, url_or_client: "str | Redis", store: str) -> None:
        """Prepare a connection; no command is sent yet.

        Args:
            store: what is kept there, for messages.

        Raises:
            ConfigError: if the package is not installed or the URL is not one.
        """
        try:
            import redis
        except ImportError as error:
            raise ConfigError(
                f"{store} in Redis need the package redis: pip install 'azeotrope[redis]'"
            ) from error
        self._error_type, self._store = redis.RedisError, store
        if not isinstance(url_or_client, str):
            self.client = url_or_client
            return
        try:
            self.client = redis.Redis.from_url(
                url_or_client, socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S
            )
        except ValueError as error:
            # The message does not repeat the URL: there may be a password in it.
            raise ConfigError(
                "the URL given is not one of Redis; it looks like rediss://host:6379/0"
            ) from error

    @contextmanager
    def explaining_errors(self) -> Iterator[None]:
        """Turn errors of Redis in the block into errors of the store.

        Raises:
            StoreError: if Redis does not answer or refuses a command.
        """
        try:
            yield
        except self._error_type as error:
            raise StoreError(f"{self._store} in Redis cannot be used: {error}") from error


def text(value: bytes | str) -> str:
    """A reply as text: clients return bytes or text, depending on their settings."""
    return value.decode() if isinstance(value, bytes) else value
