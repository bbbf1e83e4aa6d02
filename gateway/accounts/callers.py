"""Authentication: from the headers of a request to the record of its key."""

import asyncio
import logging
from collections.abc import Collection, Mapping

from gateway.accounts.key_records import KeyRecord
from gateway.accounts.keys import KeyStore
from gateway.errors import ApiError
from gateway.metrics import Metrics

logger = logging.getLogger(__name__)


class Callers:
    """Identifies callers by their keys, and refuses all invalid keys in the same words.

    One message for all reasons, so that a stolen or guessed token cannot be told from one that
    never existed.
    """

    def __init__(self, keys: KeyStore, metrics: Metrics) -> None:
        self._keys, self._metrics = keys, metrics
        self._warned: set[str] = set()

    async def identify(
        self, headers: Mapping[str, str], tiers: Collection[str], feature: str | None = None
    ) -> KeyRecord:
        """The key of a request.

        Args:
            tiers: those of the policy; a key of another tier counts as invalid.
            feature: what the request uses; None needs no permission.

        Raises:
            ApiError: 401 for a key that is missing, unknown, revoked or expired; 403 for one that
                may not use this feature.
        """
        scheme, _, token = headers.get("authorization", "").partition(" ")
        record = None
        if scheme.lower() == "bearer" and token.strip():
            # The store may read a file or ask Redis, and other streams must go on meanwhile.
            record = await asyncio.to_thread(self._keys.find, token.strip())
        if record is not None and record.tier not in tiers:
            self._warn_of_tier(record)
            record = None
        if record is None:
            self._metrics.refused("key")
            raise no_key()
        if feature is not None and feature not in record.features:
            self._metrics.refused("scope")
            raise ApiError(
                403,
                f"this key may not use {feature}; its scopes: {', '.join(record.features)}",
                kind="permission_error",
                code="insufficient_scope",
            )
        return record

    def forget_warnings(self) -> None:
        """Warn again about every key: the policy changed, and the reasons may have too."""
        self._warned.clear()

    def _warn_of_tier(self, key: KeyRecord) -> None:
        """Tell the operator, once for each key and policy, why it is refused."""
        if key.id in self._warned:
            return
        self._warned.add(key.id)
        logger.warning("key %s is refused: the policy has no tier %r", key.id, key.tier)


def no_key() -> ApiError:
    return ApiError(
        401,
        "a valid API key is needed: Authorization: Bearer KEY",
        kind="authentication_error",
        code="invalid_api_key",
        headers={"www-authenticate": "Bearer"},
    )
