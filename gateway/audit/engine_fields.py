"""What becomes of each field and route of vLLM's own server: the list that was looked through."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from pydantic import Field, model_validator

from azeotrope.config import Config, load

PLACE = Path(__file__).with_name("engine_fields.yaml")


class Rulings(Config):
    """Of one class of requests, or of the routes; names that are not allowed stand by reason."""

    allowed: tuple[str, ...]
    fixed: dict[str, tuple[str, ...]]
    refused: dict[str, tuple[str, ...]]

    @property
    def names(self) -> list[str]:
        groups = [self.allowed, *self.fixed.values(), *self.refused.values()]
        return [name for group in groups for name in group]

    @model_validator(mode="after")
    def _once(self) -> "Rulings":
        twice = sorted(name for name, count in Counter(self.names).items() if count > 1)
        if twice:
            raise ValueError(f"one ruling for each name; more for {', '.join(twice)}")
        return self


class EngineFields(Config):
    """The whole list; the three classes have vLLM's names."""

    vllm: str
    chat: Rulings = Field(alias="ChatCompletionRequest")
    completion: Rulings = Field(alias="CompletionRequest")
    sampling: Rulings = Field(alias="SamplingParams")
    routes: Rulings


def read() -> EngineFields:
    """The list of this package.

    Raises:
        ConfigError: if the file does not fit.
    """
    return load(EngineFields, PLACE)


def differences(kind: str, rulings: Rulings, found: Iterable[str]) -> list[str]:
    """A sentence for each name that vLLM has and nobody ruled on, or the other way round.

    Args:
        kind: the section of the file.
        found: names of the installed vLLM.
    """
    there, ruled = set(found), set(rulings.names)
    new = [
        f"{kind}: vLLM has {name!r}, and {PLACE.name} has no ruling; find out whether it shows or "
        "steers the undefended model, then put it under allowed, fixed or refused"
        for name in sorted(there - ruled)
    ]
    gone = [
        f"{kind}: {PLACE.name} rules on {name!r}, which this vLLM does not have; take it out, and "
        "see what came in its place"
        for name in sorted(ruled - there)
    ]
    return new + gone
