"""A Redis that the gateways of several nodes share; needs the extra `redis`.

It must keep what it is given: `appendonly yes` and `maxmemory-policy noeviction`. Pass a client or
a `rediss://` URL where the network is not trusted.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from azeotrope.config import ConfigError
from gateway.accounts.database import StoreError

if TYPE_CHECKING:
    from redis import Redis

TAG = "{azeotrope}"
"""Begins every name, so that a Redis cluster keeps all of them on one node, where they can be
changed together."""
TIMEOUT_S = 2.0


class RedisConnection:
    """A client, and errors that say which store they concern."""

    def __init__(self, url_or_client: "str | Redis", store: str) -> None:
        """Prepare a connection; nothing is asked yet.

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
        self._broken, self._store = redis.RedisError, store
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
    def asked(self) -> Iterator[None]:
        """What Redis does not answer within is a StoreError."""
        try:
            yield
        except self._broken as error:
            raise StoreError(f"{self._store} in Redis cannot be used: {error}") from error


def text(value: bytes | str) -> str:
    """Clients answer with the one or the other, as they were told to."""
    return value.decode() if isinstance(value, bytes) else value
