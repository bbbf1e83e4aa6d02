"""Who asks: the key in a request's headers."""

import asyncio
import logging
from collections.abc import Collection, Mapping

from gateway.accounts.key_records import KeyRecord
from gateway.accounts.keys import Keys
from gateway.errors import ApiError
from gateway.metrics import Metrics

logger = logging.getLogger(__name__)


class Callers:
    """Knows callers by their keys, and refuses everybody else in the same words."""

    def __init__(self, keys: Keys, metrics: Metrics) -> None:
        self._keys, self._metrics = keys, metrics
        self._warned: set[str] = set()

    async def identify(
        self, headers: Mapping[str, str], tiers: Collection[str], feature: str | None = None
    ) -> KeyRecord:
        """The key behind a request.

        Args:
            tiers: those of the policy; a key of another is as good as none.

        Raises:
            ApiError: 401 for a key that is missing, unknown, revoked or expired; 403 for one that
                may not use this endpoint.
        """
        scheme, _, token = headers.get("authorization", "").partition(" ")
        found = None
        if scheme.lower() == "bearer" and token.strip():
            found = await asyncio.to_thread(self._keys.find, token.strip())
        if found is not None and found.tier not in tiers:
            self._warn_of_tier(found)
            found = None
        if found is None:
            self._metrics.refused("key")
            raise no_key()
        if feature is not None and feature not in found.features:
            self._metrics.refused("scope")
            raise ApiError(
                403,
                f"this key may not use {feature}; its scopes: {', '.join(found.features)}",
                kind="permission_error",
                code="insufficient_scope",
            )
        return found

    def forget_warnings(self) -> None:
        """The policy is another, and keys may be refused for another reason."""
        self._warned.clear()

    def _warn_of_tier(self, key: KeyRecord) -> None:
        """Tell the operator, once for each key and policy, what its owner is not told."""
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
