"""Refusals that several checks of a request share, and the headers about quotas."""

import logging
import math

from gateway.accounts.quotas import Refusal, Standing
from gateway.errors import ApiError

logger = logging.getLogger(__name__)


def overloaded(message: str = "too many requests at once", code: str = "overloaded") -> ApiError:
    return ApiError(503, message, kind="server_error", code=code, headers={"retry-after": "1"})


def store_failed(error: Exception) -> ApiError:
    """The answer when keys, quotas or the log fail. The details go to the operator's log only."""
    logger.error("refusing: %s", error)
    return overloaded("keys, quotas or the log cannot be reached", "store_unavailable")


def suspended() -> ApiError:
    return ApiError(
        403,
        "this key is suspended: its requests look like the collection of training data; "
        "ask the issuer of the key",
        kind="permission_error",
        code="key_suspended",
    )


def crowded() -> ApiError:
    return ApiError(
        429,
        "this key's limit of completions at once is reached; try again later",
        kind="rate_limit_error",
        code="rate_limit_exceeded",
        headers={"retry-after": "1"},
    )


def over_quota(refusal: Refusal) -> ApiError:
    names = {
        "requests": "requests per minute",
        "tokens": "tokens per minute",
        "tokens_day": "tokens per day",
        "concurrency": "completions at once",
    }
    limit = names[refusal.limit]
    if refusal.never:
        message = f"this request alone is more than this key's {limit}; ask for fewer tokens"
    else:
        message = f"this key's limit of {limit} is reached; try again later"
    return ApiError(
        429,
        message,
        kind="rate_limit_error",
        code="rate_limit_exceeded",
        headers={
            # Whole seconds, rounded up: a client that waits for less is refused again.
            "retry-after": str(max(1, math.ceil(refusal.retry_after_s))),
            **rate_headers(refusal.standing),
        },
    )


def rate_headers(standing: Standing, *, shows_tokens: bool = True) -> dict[str, str]:
    """What is left of a key's quotas.

    Args:
        shows_tokens: False where the reasoning is hidden, whose length the difference of two
            answers would tell.
    """
    headers = {
        "x-ratelimit-limit-requests": str(standing.limit_requests),
        "x-ratelimit-remaining-requests": str(standing.remaining_requests),
        "x-ratelimit-reset-requests": f"{standing.reset_requests_s:.1f}s",
        "x-ratelimit-limit-tokens": str(standing.limit_tokens),
        "x-ratelimit-remaining-tokens": str(standing.remaining_tokens),
        "x-ratelimit-reset-tokens": f"{standing.reset_tokens_s:.1f}s",
    }
    hidden = () if shows_tokens else ("remaining-tokens", "reset-tokens")
    return {
        name: value
        for name, value in headers.items()
        if name.removeprefix("x-ratelimit-") not in hidden
    }
