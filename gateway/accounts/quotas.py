"""What a key may use, where it stands, and when a request that does not fit would fit."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from gateway.policy import Tier

WINDOW_MS = 60_000
DAY_MS = 86_400_000
PLACE_MS = 1_000
"""When a completion will end is unknown; who waits for its place asks again so often."""

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
        """A tier's quotas, or the share of them that a throttled key keeps (at least 1 of each)."""
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
    """A key's minute, as the `x-ratelimit-*` headers tell it.

    A reset is the time until all is free again if nothing more is asked: 0 where all is free.
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
    """Of several, the one that takes longest."""
    retry_after_s: float
    """Then it fits if nothing else is asked meanwhile (exact to the millisecond; for `concurrency`
    a guess); 0 where `never`."""
    standing: Standing
    never: bool
    """The request is larger than the limit alone, so waiting does not help."""


@dataclass(frozen=True)
class Minute:
    """What counts against a key at one moment, in ms since 1970, before a request is let in."""

    now: int
    requests: int
    tokens: int
    """Of the last 60 s: reserved ones of open requests, used ones of settled requests."""
    newest: int
    """Arrival of the last request in the window."""
    day_tokens: int
    slots: int

    def after(self, tokens: int, slots: int) -> "Minute":
        """The same moment, with a request let in."""
        return replace(
            self,
            requests=self.requests + 1,
            tokens=self.tokens + tokens,
            newest=self.now,
            day_tokens=self.day_tokens + tokens,
            slots=self.slots + slots,
        )

    def excess(self, limits: Limits) -> dict[LimitName, int]:
        """By how much each limit is overstepped; those that are kept are left out."""
        over: dict[LimitName, int] = {
            "requests": self.requests - limits.requests_per_minute,
            "tokens": self.tokens - limits.tokens_per_minute,
            "tokens_day": self.day_tokens - limits.tokens_per_day,
            "concurrency": self.slots - limits.concurrency,
        }
        return {name: amount for name, amount in over.items() if amount > 0}

    def standing(self, limits: Limits) -> Standing:
        reset_s = (self.newest + WINDOW_MS - self.now) / 1000 if self.requests else 0.0
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
            leaving: for limits of the minute that are overstepped, the arrival of the request
                whose leaving makes room.
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
                waits[name] = PLACE_MS
            else:
                waits[name] = leaving[name] + WINDOW_MS - self.now
        longest = max(waits, key=lambda name: waits[name])
        return Refusal(longest, waits[longest] / 1000, standing, never=False)
