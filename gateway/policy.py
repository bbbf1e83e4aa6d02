"""The rules of a gateway: what each tier of keys may request, and how much of it."""

from typing import Literal

from pydantic import Field, model_validator

from azeotrope.config import Config

MOST_LOGPROBS = 5


class Tier(Config):
    """The rules of one group of keys."""

    logprobs: Literal["none", "top1", "topk"] = Field(
        default="none",
        description="log-probabilities beside the text, always of the defended distribution: none; "
        "those of the tokens in the answer; or those of the likeliest `top_k` too",
    )
    top_k: int = Field(default=MOST_LOGPROBS, ge=1, le=MOST_LOGPROBS)
    decimals: int = Field(
        default=2, ge=0, le=4, description="log-probabilities are rounded to this many decimals"
    )
    bans: bool = Field(
        default=False,
        description="whether logit_bias may forbid tokens (-100 is the only value); it is never "
        "accepted together with logprobs",
    )
    temperature: tuple[float, float] = Field(
        default=(0.0, 2.0),
        description="least and greatest; a watermark needs a least value above 0",
    )
    top_p: tuple[float, float] = Field(
        default=(0.0, 1.0),
        description="least and greatest; a tiny top_p is greedy at any temperature, so a watermark "
        "needs a least value above 0 here too",
    )
    n: int = Field(default=4, ge=1, le=16, description="completions of one request")
    max_tokens: int = Field(default=2048, ge=1, description="the longest completion")
    reasoning: Literal["shown", "summary", "cut"] = Field(
        default="shown",
        description="`cut` shows the answer alone, like the baseline `answers_only`; `summary` "
        "replaces the reasoning by one line that says how long it was",
    )
    strength: float | None = Field(
        default=None,
        gt=0,
        description="of decoding defenses; null takes the configured one. 0 is not allowed, "
        "because access to the undefended teacher needs a licence",
    )
    requests_per_minute: int = Field(default=600, ge=1)
    tokens_per_minute: int = Field(default=200_000, ge=1)
    tokens_per_day: int = Field(default=5_000_000, ge=1)
    concurrency: int = Field(default=64, ge=1, description="the most completions at once")

    @model_validator(mode="after")
    def _ordered(self) -> "Tier":
        least, greatest = self.temperature
        if not 0 <= least <= greatest:
            raise ValueError(f"temperature must be [least, greatest], got [{least}, {greatest}]")
        least, greatest = self.top_p
        if not (0 <= least <= greatest <= 1 and greatest > 0):
            raise ValueError(
                f"top_p must be [least, greatest] within 0 and 1, got [{least}, {greatest}]"
            )
        return self


class Extraction(Config):
    """How to react to keys whose requests look like the collection of training data."""

    action: Literal["observe", "throttle", "block"] = Field(
        default="observe", description="`observe` writes to the audit log and changes nothing"
    )
    threshold: float = Field(default=0.7, gt=0, le=1, description="score from which to act")
    window: int = Field(
        default=500, ge=10, description="a score covers the last so many requests of a key"
    )
    every: int = Field(default=20, ge=1, description="requests between two scores")
    throttle: float = Field(
        default=0.1, gt=0, le=1, description="the share of its quotas that a throttled key keeps"
    )


class Audit(Config):
    """How long the audit log is kept."""

    retention_days: int | None = Field(
        default=90,
        ge=1,
        description="older files of the audit log are removed when a gateway starts and once per "
        "day after that; null keeps all",
    )


class Policy(Config):
    """All rules of one gateway."""

    tiers: dict[str, Tier] = Field(
        default_factory=lambda: {
            "standard": Tier(),
            "trusted": Tier(logprobs="topk", bans=True),
            "answers": Tier(reasoning="cut"),
        },
        min_length=1,
    )
    extraction: Extraction = Field(default_factory=Extraction)
    audit: Audit = Field(default_factory=Audit)
    in_flight: int = Field(
        default=128,
        ge=1,
        description="the most requests at once in one gateway replica; more are refused before "
        "they reach the engine",
    )
    most_bytes: int = Field(default=1 << 20, ge=1024, description="the largest body of a request")
    timeout_s: float = Field(
        default=120.0, gt=0, description="from the admission of a request to its last token"
    )
