"""Distillation by one divergence between the teacher's and the student's distributions.

An attack with a divergence is known by the divergence's name: `{name: abkd, alpha: 0.3}` is short
for `{name: logit_kd, divergence: {name: abkd, alpha: 0.3}}`. Result tables, plain data and the
descriptions of stages use the short form for both.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

from pydantic import (
    Field,
    field_validator,
    model_serializer,
    model_validator,
)

from azeotrope.attacks.logits.attack import LogitAttack, LogitConfig
from azeotrope.attacks.logits.choices import BY_NAME, AnyDivergence, ForwardKl
from azeotrope.logits.divergences import Divergence

ALIASES = tuple(BY_NAME)
"""Names under which configurations may also ask for this attack: those of the divergences."""


class Config(LogitConfig):
    name: Literal["logit_kd"] = "logit_kd"
    divergence: AnyDivergence = Field(
        default_factory=ForwardKl,
        discriminator="name",
        description="a name, or a mapping with `name` and the parameters of that divergence",
    )

    @property
    def label(self) -> str:
        return self.divergence.name

    @field_validator("divergence", mode="before")
    @classmethod
    def _named(cls, divergence: Any) -> Any:
        return {"name": divergence} if isinstance(divergence, str) else divergence

    @model_validator(mode="before")
    @classmethod
    def _from_short_form(cls, settings: Any) -> Any:
        """Move the parameters of `{name: abkd, alpha: 0.3}` to where the long form has them."""
        kind = BY_NAME.get(str(settings.get("name"))) if isinstance(settings, Mapping) else None
        if kind is None:
            return settings
        allowed = LogitConfig.model_fields.keys() | kind.model_fields.keys()
        unknown = [key for key in settings if key not in allowed]
        if unknown:
            raise ValueError(f"unknown key {unknown[0]!r}; allowed: {', '.join(sorted(allowed))}")
        own = {key: value for key, value in settings.items() if key in kind.model_fields}
        shared = {key: value for key, value in settings.items() if key not in own}
        return {**shared, "name": "logit_kd", "divergence": own}

    @model_serializer(mode="wrap")
    def _as_short_form(self, serialize: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        # One form for both ways to write an attack, so that they share rows and stages.
        plain = serialize(self)
        divergence = plain.pop("divergence", {})
        return {**plain, **divergence}


class LogitKd(LogitAttack):
    def divergences(self) -> tuple[Divergence, ...]:
        return self.config.divergence.functions()


def build(config: Config) -> LogitKd:
    return LogitKd(config)
