"""What is known of an API key, and what one may be."""

import hashlib
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from azeotrope.config import ConfigError
from gateway.accounts.database import StoreError

Licence = Literal["usage", "distillation"]
FEATURES = ("chat", "completions", "metrics")
ORDINARY = ("chat", "completions")
"""What a key may use unless it is said otherwise."""
UNDEFENDED = ":undefended"
"""Ends the name of the licensed model, and of the account whose quota and bill it goes to."""


@dataclass(frozen=True)
class KeyRecord:
    """What is known of a key; the token is not. Times are seconds since 1970."""

    id: str
    """Public: it may stand in logs and bills."""
    account: str
    """The customer: the id of the first key, whatever it was rotated to since. Quotas, usage and
    the extraction score go by it."""
    name: str
    tier: str
    licence: Licence
    """`distillation` permits what the defenses prevent: the key gets the undefended teacher."""
    models: tuple[str, ...]
    """() permits all."""
    features: tuple[str, ...]
    created: float
    expires: float | None
    revoked: float | None
    watermark_key: str = field(repr=False)
    """Secret: decoding defenses mark each customer's text with it."""

    def is_active(self, now: float) -> bool:
        return self.revoked is None and (self.expires is None or now < self.expires)

    def revoked_at(self, now: float) -> "KeyRecord":
        """The same key, ended; one that was ended already keeps the time of the first."""
        return self if self.revoked is not None else replace(self, revoked=now)

    def replaced_at(self, now: float, overlap_s: float) -> "KeyRecord":
        """The same key once another has taken its place: ended, or after the overlap."""
        if not overlap_s:
            return self.revoked_at(now)
        ends = now + overlap_s
        return replace(self, expires=ends if self.expires is None else min(ends, self.expires))

    def plain(self) -> dict[str, Any]:
        """Columns for a store: text, numbers and None."""
        lists = {"models": json.dumps(self.models), "features": json.dumps(self.features)}
        return vars(self) | lists

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> "KeyRecord":
        """What `plain` gave.

        Raises:
            StoreError: if it is something else, so that nobody is let in by half a record.
        """
        try:
            lists = {name: tuple(json.loads(str(plain[name]))) for name in ("models", "features")}
            return cls(**{**plain, **lists})
        except (ValueError, TypeError, KeyError) as error:
            raise StoreError(f"the record of a key cannot be read: {error}") from error


def new_id() -> str:
    return f"ak-{secrets.token_hex(4)}"


def new_token() -> str:
    return f"az-{secrets.token_urlsafe(32)}"


def digest(token: str) -> bytes:
    """What is kept of a token: its SHA-256, without a salt and without a slow hash.

    Both protect what people choose and others guess; a token is 256 random bits, so there is
    nothing to guess, no two are equal, and a slow hash would only help whoever floods the gateway.
    """
    # A header may hold anything; what no token holds is simply unknown.
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


def licence_of(given: str) -> Licence:
    """Raises ConfigError for what is no licence."""
    if given == "usage" or given == "distillation":
        return given
    raise ConfigError(f"licence must be usage or distillation, got {given!r}")


def check(name: str, features: Sequence[str], expires_in_s: float | None) -> None:
    """Raises ConfigError for what no key may be."""
    if not name.strip():
        raise ConfigError("a key needs a name, such as that of the customer or the program")
    unknown = sorted(set(features) - set(FEATURES))
    if unknown or not features:
        raise ConfigError(f"features are {', '.join(FEATURES)}, got {list(features)}")
    if expires_in_s is not None and not expires_in_s > 0:
        raise ConfigError(f"a key must end in the future, got {expires_in_s} seconds")
