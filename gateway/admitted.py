"""What is served, and a request that was let in: what the stations of a gateway hand on."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from azeotrope.defenses.base import Defense
from azeotrope.engine.protocol import Engine
from azeotrope.tokens import Boundary
from gateway.accounts.key_records import KeyRecord
from gateway.http.responses import Format
from gateway.plan import Plan
from gateway.policy import Tier


@dataclass(frozen=True)
class Model:
    """What is served, under which name."""

    name: str
    tokenizer: PreTrainedTokenizerBase
    context: int
    """Tokens that prompt and completion may have together."""
    engine: Engine
    undefended: Engine | None = None
    """The clean teacher: for keys with a distillation licence, and for the marked demonstration."""
    boundary: Boundary = field(default_factory=Boundary)
    rewriting: tuple[Defense, ...] = ()
    """Text-stage defenses, in order. They need the whole answer, so it does not stream."""


@dataclass(frozen=True)
class Admitted:
    """A request that may be answered: its quota is reserved."""

    id: str
    key: KeyRecord
    tier: Tier
    plan: Plan
    engine: Engine
    undefended: bool
    format: Format
    stream: bool
    wants_usage: bool
    stops: tuple[str, ...]
    headers: Mapping[str, str]
    deadline: float
    """On the event loop's clock."""
