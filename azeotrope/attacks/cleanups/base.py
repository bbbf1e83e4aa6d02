"""What a clean-up is: how an attacker changes observed traces before a student learns from them.

A clean-up called `digits` is the module `azeotrope/attacks/cleanups/digits.py` with a class
`Config` (its `name` is a literal) and a function `build(config)`; see `azeotrope.plugins`. Several
clean-ups may act one after another.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import Field

import azeotrope.attacks.cleanups
from azeotrope.config import Config, ConfigError
from azeotrope.plugins import Plugins
from azeotrope.tokens import Boundary
from azeotrope.traces import Trace

CleanupSpec = str | dict[str, Any] | list[str | dict[str, Any]]
"""A clean-up in a configuration: its name, its settings, or several of these in their order."""
NO_CLEANUP = "none"
"""The specification and the label of traces that are used as they are."""
_CLEANUPS = Plugins(azeotrope.attacks.cleanups, "clean-up")


class CleanupConfig(Config):
    """Settings that every clean-up has."""

    name: str
    label: str | None = Field(
        default=None,
        pattern=r"^[^\s+]+$",
        description="name in result tables, to tell settings of one clean-up apart; null takes "
        "the clean-up's name",
    )


@dataclass(frozen=True)
class AttackerAssets:
    """What the attacker owns besides the observed traces."""

    base_student: str | None = None
    """Name or path of the model that the attacker is about to train, before its training."""
    paraphraser: str | None = None
    """Name or path of a model that rewrites texts, or the URL of its endpoint."""
    ground_truth: tuple[Trace, ...] = ()
    """Reference solutions."""
    extra_queries: int = 0
    """Requests that the attacker may still send to the teacher."""


@dataclass(frozen=True)
class CleanupCost:
    """What clean-ups used up. Requests and tokens are those of every model that they asked."""

    queries: int = 0
    tokens: int = 0
    """Tokens that the models wrote."""
    seconds: float = 0.0
    """Wall time, measured by `CleanupChain.clean`."""


@dataclass(frozen=True)
class CleanedTraces:
    """The traces after a clean-up, which may be fewer, and what it cost."""

    traces: list[Trace]
    cost: CleanupCost = field(default_factory=CleanupCost)


class Cleanup:
    """A function from traces to traces with settings.

    A clean-up must be deterministic: each process of a distributed training cleans its own copy.
    """

    def __init__(self, config: Any) -> None:
        self.config = config

    def clean(
        self, traces: Sequence[Trace], boundary: Boundary, assets: AttackerAssets
    ) -> CleanedTraces:
        """The cleaned traces, and the queries and tokens that were spent on them.

        Raises:
            ValueError: if the attacker does not own what this clean-up needs.
            TypeError: if a subclass does not override it.
        """
        raise TypeError(f"{type(self).__name__} does not say how it cleans traces")


@dataclass(frozen=True)
class CleanupChain:
    """Clean-ups that are applied in order; without any, traces stay as they are."""

    parts: tuple[Cleanup, ...] = ()

    @property
    def label(self) -> str:
        """The name in result tables: labels joined with `+`, or `none`."""
        return "+".join(part.config.label or part.config.name for part in self.parts) or NO_CLEANUP

    @property
    def spec(self) -> CleanupSpec:
        """The shortest specification that resolves to this chain; stages are described by it."""
        specs = [_shortest(part.config) for part in self.parts]
        if not specs:
            return NO_CLEANUP
        return specs[0] if len(specs) == 1 else specs

    def clean(
        self, traces: Sequence[Trace], boundary: Boundary, assets: AttackerAssets
    ) -> CleanedTraces:
        """Apply every clean-up; queries and tokens are summed, and the time is measured.

        Raises:
            ValueError: if the attacker does not own what a clean-up needs.
        """
        started = time.perf_counter()
        cleaned, queries, tokens = list(traces), 0, 0
        for part in self.parts:
            result = part.clean(cleaned, boundary, assets)
            cleaned = result.traces
            queries += result.cost.queries
            tokens += result.cost.tokens
        seconds = round(time.perf_counter() - started, 3) if self.parts else 0.0
        return CleanedTraces(cleaned, CleanupCost(queries, tokens, seconds))


def _shortest(config: CleanupConfig) -> str | dict[str, Any]:
    changed = config.model_dump(exclude_defaults=True)
    return config.name if set(changed) <= {"name"} else config.dump()


def names() -> list[str]:
    """The names of all clean-ups."""
    return _CLEANUPS.names()


def resolve(spec: CleanupSpec) -> CleanupChain:
    """Build the clean-ups of a specification.

    Raises:
        ConfigError: if there is no module of a name, a key or value does not fit, or the list is
            empty.
    """
    if spec == NO_CLEANUP:
        return CleanupChain()
    if isinstance(spec, list):
        if not spec:
            raise ConfigError(
                f"a list of clean-ups is empty; name at least one of {', '.join(names())}"
            )
        return CleanupChain(tuple(_resolve_one(part) for part in spec))
    return CleanupChain((_resolve_one(spec),))


def _resolve_one(spec: str | dict[str, Any]) -> Cleanup:
    return _CLEANUPS.build({"name": spec} if isinstance(spec, str) else spec)
