"""The control that every decoding defense must beat: sample at a higher temperature.

    x_t ~ softmax( z_T / ((1 + strength) tau) )

Any noise in the teacher's text costs it accuracy and students too. A decoding defense is worth its
price only if students lose more than they do at the temperature that costs the teacher as much.
"""

from collections.abc import Sequence
from typing import Literal

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from azeotrope.decoding import DecodingRow
from azeotrope.defenses.base import Defense, DefenseConfig


class Config(DefenseConfig):
    name: Literal["temperature"] = "temperature"
    strength: float = Field(
        default=0.2, ge=0, allow_inf_nan=False, description="added to 1, it multiplies temperatures"
    )


class Temperature(Defense):
    """Divides the logits; greedy rows write what they wrote before."""

    stage = "decoding"
    config: Config

    def adjust_rows(
        self, logits: Float[Tensor, "rows vocab"], rows: Sequence[DecodingRow]
    ) -> Float[Tensor, "rows vocab"]:
        return logits / (1.0 + self.config.strength)


def build(config: Config) -> Temperature:
    return Temperature(config)
