"""The model that a gateway serves, and a request that it admitted."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from openai.types.completion_usage import CompletionUsage
from transformers import PreTrainedTokenizerBase

from azeotrope.defenses.base import Defense
from azeotrope.engine.protocol import Engine
from azeotrope.tokens import Boundary
from gateway.accounts.key_records import KeyRecord
from gateway.coarse import coarse_length
from gateway.http.responses import AnswerFormat, usage
from gateway.plan import Plan
from gateway.policy import Tier


@dataclass(frozen=True)
class Model:
    """A model that is served, under one name for clients."""

    name: str
    tokenizer: PreTrainedTokenizerBase
    context: int
    """The most tokens of prompt and completion together."""
    engine: Engine
    undefended: Engine | None = None
    """The teacher without defenses, for keys with a distillation licence and the demonstration."""
    boundary: Boundary = field(default_factory=Boundary)
    rewriting: tuple[Defense, ...] = ()
    """Text-stage defenses, in order. They need the whole answer, so it is not streamed."""


@dataclass(frozen=True)
class Admitted:
    """A request that passed every check and whose quota is reserved."""

    id: str
    key: KeyRecord
    tier: Tier
    plan: Plan
    engine: Engine
    undefended: bool
    format: AnswerFormat
    stream: bool
    wants_usage: bool
    stops: tuple[str, ...]
    headers: Mapping[str, str]
    deadline: float
    """When the answer must be complete, on the clock of the event loop (seconds)."""

    def shown_usage(self, tokens: int) -> CompletionUsage:
        """The tokens of the answer as the client sees them; bills have the exact number.

        Where the reasoning is hidden, the number is rounded up.
        """
        shown = tokens
        if self.tier.reasoning != "shown":
            shown = coarse_length(tokens, self.plan.usage_shift)
        return usage(self.plan.prompt_tokens, shown)
