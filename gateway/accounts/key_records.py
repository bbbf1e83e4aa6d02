"""The record of an API key, and the rules for what a key may be."""

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
"""The features of a key by default."""
UNDEFENDED = ":undefended"
"""Suffix of the licensed model's name, and of the account that its use is counted on."""


@dataclass(frozen=True)
class KeyRecord:
    """What the store knows about a key, which is not the token. Times are seconds since 1970."""

    id: str
    """Public: it may appear in logs and bills."""
    account: str
    """The customer: the id of their first key, which all keys rotated from it share. Quotas, usage
    and the extraction score are counted per account."""
    name: str
    tier: str
    licence: Licence
    """`distillation` permits what the defenses prevent: the key gets the undefended teacher."""
    models: tuple[str, ...]
    """Permitted models; () permits all."""
    features: tuple[str, ...]
    created: float
    expires: float | None
    revoked: float | None
    watermark_key: str = field(repr=False)
    """Secret: decoding defenses mark each customer's text with it."""

    def is_active(self, now: float) -> bool:
        return self.revoked is None and (self.expires is None or now < self.expires)

    def revoked_at(self, now: float) -> "KeyRecord":
        """The same key, revoked; a key that is revoked already keeps its first time."""
        return self if self.revoked is not None else replace(self, revoked=now)

    def replaced_at(self, now: float, overlap_s: float) -> "KeyRecord":
        """The same key after its rotation: revoked now, or expiring when the overlap ends.

        An overlap never prolongs a key that would expire before its end.
        """
        if not overlap_s:
            return self.revoked_at(now)
        ends = now + overlap_s
        return replace(self, expires=ends if self.expires is None else min(ends, self.expires))

    def plain(self) -> dict[str, Any]:
        """Columns for a store: text, numbers and None."""
        lists = {"models": json.dumps(self.models), "features": json.dumps(self.features)}
        return vars(self) | lists

    @classmethod
    def from_plain(cls, columns: Mapping[str, Any]) -> "KeyRecord":
        """The inverse of `plain`.

        Raises:
            StoreError: if a column is missing, unknown or malformed. A partial record grants
                nothing.
        """
        try:
            lists = {name: tuple(json.loads(str(columns[name]))) for name in ("models", "features")}
            return cls(**{**columns, **lists})
        except (ValueError, TypeError, KeyError) as error:
            raise StoreError(f"the record of a key cannot be read: {error}") from error


def new_id() -> str:
    return f"ak-{secrets.token_hex(4)}"


def new_token() -> str:
    return f"az-{secrets.token_urlsafe(32)}"


def digest(token: str) -> bytes:
    """The SHA-256 of a token, which is all that a store keeps of it.

    Passwords need a salt and a slow hash because people choose them and attackers guess them. A
    token is 256 random bits: it cannot be guessed and no two are equal, so neither would help. A
    slow hash would only make it cheaper to overload the gateway with wrong tokens.
    """
    # A header may contain any characters. Text that no token contains gets a digest that is in no
    # store, and not an error.
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


def parse_licence(name: str) -> Licence:
    """The licence of this name.

    Raises:
        ConfigError: if there is no such licence.
    """
    if name == "usage" or name == "distillation":
        return name
    raise ConfigError(f"licence must be usage or distillation, got {name!r}")


def check_rights(name: str, features: Sequence[str], expires_in_s: float | None) -> None:
    """Refuse a key that could not be used.

    Raises:
        ConfigError: if the name is blank, a feature is unknown or missing, or the key would expire
            at once.
    """
    if not name.strip():
        raise ConfigError("a key needs a name, such as that of the customer or the program")
    unknown = sorted(set(features) - set(FEATURES))
    if unknown or not features:
        raise ConfigError(f"features are {', '.join(FEATURES)}, got {list(features)}")
    if expires_in_s is not None and not expires_in_s > 0:
        raise ConfigError(f"a key must end in the future, got {expires_in_s} seconds")
