"""The decision about each field and route of vLLM's own server, as a reviewed list."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from pydantic import Field, model_validator

from azeotrope.config import Config, load

FILE = Path(__file__).with_name("engine_fields.yaml")


class Rulings(Config):
    """Decisions about one class of requests, or about the routes.

    Names that clients may not use are grouped by the reason.
    """

    allowed: tuple[str, ...]
    fixed: dict[str, tuple[str, ...]]
    refused: dict[str, tuple[str, ...]]

    @property
    def names(self) -> list[str]:
        """Every name that the list decides about."""
        groups = [self.allowed, *self.fixed.values(), *self.refused.values()]
        return [name for group in groups for name in group]

    @model_validator(mode="after")
    def _once(self) -> "Rulings":
        twice = sorted(name for name, count in Counter(self.names).items() if count > 1)
        if twice:
            raise ValueError(f"each name must have one ruling; several for {', '.join(twice)}")
        return self


class EngineFields(Config):
    """The whole list. The aliases are the names of vLLM's classes."""

    vllm: str
    chat: Rulings = Field(alias="ChatCompletionRequest")
    completion: Rulings = Field(alias="CompletionRequest")
    sampling: Rulings = Field(alias="SamplingParams")
    routes: Rulings


def read() -> EngineFields:
    """The list in this package.

    Raises:
        ConfigError: if the file does not have this form.
    """
    return load(EngineFields, FILE)


def differences(kind: str, rulings: Rulings, installed: Iterable[str]) -> list[str]:
    """A sentence for each name that only vLLM has or only the list has.

    Args:
        kind: the section of the file.
        installed: names of the installed vLLM.
    """
    in_vllm, in_list = set(installed), set(rulings.names)
    new = [
        f"{kind}: vLLM has {name!r}, and {FILE.name} has no ruling; find out whether it reveals or "
        "steers the undefended model, then put it under allowed, fixed or refused"
        for name in sorted(in_vllm - in_list)
    ]
    gone = [
        f"{kind}: {FILE.name} rules on {name!r}, which this vLLM does not have; remove it, "
        "and find out what replaces it"
        for name in sorted(in_list - in_vllm)
    ]
    return new + gone
