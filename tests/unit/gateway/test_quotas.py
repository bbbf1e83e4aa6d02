"""The limits of an account."""

import pytest

from gateway.accounts.quotas import Limits
from gateway.policy import Tier


def test_a_tier_gives_its_limits_or_a_share_of_them() -> None:
    tier = Tier(
        requests_per_minute=15, tokens_per_minute=1000, tokens_per_day=20_000, concurrency=4
    )
    assert Limits.of(tier) == Limits(15, 1000, 20_000, 4)
    assert Limits.of(tier, 0.1) == Limits(1, 100, 2000, 1)
    with pytest.raises(ValueError, match="share"):
        Limits.of(tier, 0.0)
