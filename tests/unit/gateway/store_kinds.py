"""What tests of keys and quotas share: the kinds of stores, a clock, and short reservations."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import fakeredis

if TYPE_CHECKING:
    from gateway.accounts.keys import KeyStore
    from gateway.accounts.ledger import Ledger
    from gateway.accounts.quotas import Limits, Refusal, Standing

KINDS = ["sqlite", "imitation", "redis"]
"""SQLite, an imitation of Redis in Python, and a real `redis-server` if there is one."""
MIDNIGHT = 20_000 * 86_400.0
"""The start of 2024-10-04 UTC, in seconds since 1970."""
NOON = MIDNIGHT + 43_200

StoreOpener = Callable[..., "KeyStore"]
LedgerOpener = Callable[[Callable[[], float] | None], AbstractContextManager["Ledger"]]


@dataclass
class Clock:
    """Seconds since 1970, moved by hand."""

    now: float = NOON

    def __call__(self) -> float:
        return self.now


def redis_imitation(*, decode_responses: bool = False) -> fakeredis.FakeStrictRedis:
    """A client of an empty Redis in the memory of this process."""
    server = fakeredis.FakeServer()
    return fakeredis.FakeStrictRedis(server=server, decode_responses=decode_responses)


def reserve(
    ledger: "Ledger",
    request: str,
    limits: "Limits | None" = None,
    *,
    key: str = "ak-1",
    prompt: int = 10,
    completion: int = 90,
    slots: int = 1,
    lease_s: float = 1000.0,
    owner: str = "replica",
) -> "Standing | Refusal":
    """Reserve 100 tokens, by default under limits that no test reaches."""
    from gateway.accounts.ledger import Reservation
    from gateway.accounts.quotas import Limits

    wide = Limits(1000, 1_000_000, 10_000_000, 1000)
    reservation = Reservation(key, request, prompt, completion, slots)
    return ledger.reserve(reservation, limits or wide, owner=owner, lease_s=lease_s)


def refused(answer: "Standing | Refusal") -> tuple[str, float, bool]:
    """Limit, retry time and `never` of an answer that must be a refusal."""
    from gateway.accounts.quotas import Refusal

    assert isinstance(answer, Refusal)
    return answer.limit, answer.retry_after_s, answer.never
