"""Limits of an account, its standing, and the time until a refused request would fit."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from gateway.policy import Tier

WINDOW_MS = 60_000
DAY_MS = 86_400_000
SLOT_RETRY_MS = 1_000
"""Retry time for `concurrency`. The end of a completion is unknown, so this is a guess."""

LimitName = Literal["requests", "tokens", "tokens_day", "concurrency"]


@dataclass(frozen=True)
class Limits:
    """What one account may use. A minute is the last 60 s, a day is one of UTC."""

    requests_per_minute: int
    tokens_per_minute: int
    tokens_per_day: int
    concurrency: int
    """Completions under way."""

    @classmethod
    def of(cls, tier: Tier, share: float = 1.0) -> "Limits":
        """The quotas of a tier, or the share of them that a throttled key keeps (at least 1 each).

        Raises:
            ValueError: if the share is not above 0 and at most 1.
        """
        if not 0 < share <= 1:
            raise ValueError(f"share must be above 0 and at most 1, got {share}")
        return cls(
            requests_per_minute=max(1, int(tier.requests_per_minute * share)),
            tokens_per_minute=max(1, int(tier.tokens_per_minute * share)),
            tokens_per_day=max(1, int(tier.tokens_per_day * share)),
            concurrency=max(1, int(tier.concurrency * share)),
        )


@dataclass(frozen=True)
class Standing:
    """The state of an account's minute, as the `x-ratelimit-*` headers report it.

    A reset is the time until everything is free again if no other request arrives; it is 0 if
    everything is free now.
    """

    limit_requests: int
    remaining_requests: int
    reset_requests_s: float
    limit_tokens: int
    remaining_tokens: int
    reset_tokens_s: float


@dataclass(frozen=True)
class Refusal:
    """Why a request may not start now; nothing was reserved."""

    limit: LimitName
    """If several limits are exceeded, the one with the longest wait."""
    retry_after_s: float
    """When the request fits if no other arrives meanwhile: exact to the millisecond, but a guess
    for `concurrency`, and 0 with `never`."""
    standing: Standing
    never: bool
    """The request alone is larger than the limit, so waiting does not help."""


@dataclass(frozen=True)
class Minute:
    """What counts against an account at one moment, before a request is admitted."""

    now: int
    """Milliseconds since 1970."""
    requests: int
    tokens: int
    """Tokens of the last 60 s: reserved ones of open requests, used ones of settled requests."""
    newest: int
    """Arrival of the last request in the window, in milliseconds since 1970."""
    day_tokens: int
    slots: int

    def after(self, tokens: int, slots: int) -> "Minute":
        """The same moment, with a request admitted."""
        return replace(
            self,
            requests=self.requests + 1,
            tokens=self.tokens + tokens,
            newest=self.now,
            day_tokens=self.day_tokens + tokens,
            slots=self.slots + slots,
        )

    def excess(self, limits: Limits) -> dict[LimitName, int]:
        """The limits that are exceeded, and by how much."""
        over: dict[LimitName, int] = {
            "requests": self.requests - limits.requests_per_minute,
            "tokens": self.tokens - limits.tokens_per_minute,
            "tokens_day": self.day_tokens - limits.tokens_per_day,
            "concurrency": self.slots - limits.concurrency,
        }
        return {name: amount for name, amount in over.items() if amount > 0}

    def standing(self, limits: Limits) -> Standing:
        # Everything is free when the newest request has left the window.
        reset_s = (self.newest + WINDOW_MS - self.now) / 1000 if self.requests else 0.0
        # A throttled account may already be above its new limits; nothing remains then.
        return Standing(
            limit_requests=limits.requests_per_minute,
            remaining_requests=max(0, limits.requests_per_minute - self.requests),
            reset_requests_s=reset_s,
            limit_tokens=limits.tokens_per_minute,
            remaining_tokens=max(0, limits.tokens_per_minute - self.tokens),
            reset_tokens_s=reset_s,
        )

    def refusal(
        self, limits: Limits, tokens: int, slots: int, leaving: Mapping[LimitName, int]
    ) -> Refusal:
        """Why a request does not fit.

        Args:
            leaving: for each exceeded limit of the minute, the arrival of the request whose leaving
                the window makes room.
        """
        standing = self.standing(limits)
        alone = replace(self, requests=0, tokens=0, day_tokens=0, slots=0).after(tokens, slots)
        for name in alone.excess(limits):
            return Refusal(name, 0.0, standing, never=True)
        waits: dict[LimitName, int] = {}
        for name in self.after(tokens, slots).excess(limits):
            if name == "tokens_day":
                waits[name] = DAY_MS - self.now % DAY_MS
            elif name == "concurrency":
                waits[name] = SLOT_RETRY_MS
            else:
                waits[name] = leaving[name] + WINDOW_MS - self.now
        longest = max(waits, key=lambda name: waits[name])
        return Refusal(longest, waits[longest] / 1000, standing, never=False)
