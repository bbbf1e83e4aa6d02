"""What an attack is: what it observes, and the loss by which a student learns from it.

An attack called `text_sft` is the module `azeotrope/attacks/text_sft.py` with a class `Config` and
a function `build(config)`; see `azeotrope.plugins`.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

import azeotrope.attacks
from azeotrope.config import Config
from azeotrope.generation import context_of
from azeotrope.models import Loaded
from azeotrope.plugins import Plugins
from azeotrope.problems import Task
from azeotrope.tokens import Boundary, Example
from azeotrope.traces import Trace
from azeotrope.training import FitConfig, TokenSum

Observes = Literal["text", "logits", "topk", "teacher"]
"""What an attack sees: texts, full or truncated distributions on given texts, or a teacher that is
queried at every step of training about what the student writes."""
_ATTACKS = Plugins(azeotrope.attacks, "attack", frozenset({"base", "cleanups", "logits"}))


class AttackConfig(Config):
    """Settings that every attack has."""

    name: str
    fit: FitConfig = Field(default_factory=FitConfig)
    max_length: int | None = Field(
        default=None,
        ge=8,
        description="tokens of prompt and completion together, in the student's tokenizer; null "
        "takes the student's context",
    )
    too_long: Literal["drop", "error"] = Field(
        default="drop", description="what happens to longer traces; those dropped are counted"
    )
    variant: str = Field(
        default="none",
        pattern=r"^\S+$",
        description="tells settings of one attack apart in result tables: `top_k=5`, "
        "`temperature=4`",
    )
    on_clean: bool = Field(
        default=True, description="attack the undefended teacher in this way too, to compare"
    )

    @property
    def label(self) -> str:
        """The attack's name in messages and result tables."""
        return self.name


def longest(config: AttackConfig, student: Loaded) -> int:
    """The most tokens of a text that a student learns from."""
    context = context_of(student.model)
    return context if config.max_length is None else min(config.max_length, context)


class Attack:
    """A student's training objective and the form in which it reads its data."""

    needs: ClassVar[Observes]

    def __init__(self, config: Any) -> None:
        self.config = config

    def examples(
        self, student: Loaded, traces: Sequence[Trace], task: Task, boundary: Boundary
    ) -> list[Example]:
        """Observed traces as training samples of this student.

        Raises:
            ValueError: if a trace cannot be read as the attack needs it.
            TypeError: if a subclass does not override it.
        """
        raise TypeError(f"{type(self).__name__} does not say how it reads traces")

    def loss(self, student: Loaded, examples: list[Example]) -> TokenSum:
        """The summed loss of some samples.

        Raises:
            TypeError: if a subclass does not override it.
        """
        raise TypeError(f"{type(self).__name__} has no loss")


def names() -> list[str]:
    """The names of all attacks, those of the divergences included."""
    return _ATTACKS.names()


def resolve(data: dict[str, Any]) -> Attack:
    """Build an attack from plain configuration.

    Raises:
        ConfigError: if there is no module of that name, or a key or value does not fit.
    """
    return _ATTACKS.build(data)
