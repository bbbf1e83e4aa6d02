"""The pocket family of models: its members, their sizes and their training.

`pretrain.py` trains teacher and bases from scratch. A base has seen easy problems only (no value
above 10), in digits: it knows the language and the procedure, but no arithmetic of larger numbers.
"""

from dataclasses import dataclass
from typing import Literal

from pydantic import Field
from transformers import Olmo2Config, PreTrainedConfig, Qwen2Config

from azeotrope.config import Config
from azeotrope.pocket.tokenizer import Kind
from azeotrope.training import FitConfig


class Phase(Config):
    """A stretch of pre-training on one mixture of problems."""

    fit: FitConfig
    full: float = Field(default=0.0, description="share of problems with values above 10")
    words: float = Field(default=0.0, description="share of reasoning in number words")


@dataclass(frozen=True)
class Member:
    """One checkpoint of the family and the recipe that makes it."""

    name: str
    role: Literal["teacher", "proxy", "student"]
    architecture: Literal["qwen2", "olmo2"]
    tokenizer: Kind
    layers: int
    hidden: int
    heads: int
    feed_forward: int
    phases: tuple[Phase, ...]

    def config(self, vocab: int, eos: int, bos: int, pad: int) -> PreTrainedConfig:
        kind = Qwen2Config if self.architecture == "qwen2" else Olmo2Config
        return kind(
            vocab_size=vocab,
            hidden_size=self.hidden,
            intermediate_size=self.feed_forward,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            max_position_embeddings=256,
            tie_word_embeddings=False,
            bos_token_id=bos,
            eos_token_id=eos,
            pad_token_id=pad,
        )


def _base(seed: int, steps: int = 1000) -> tuple[Phase, ...]:
    fit = FitConfig(
        steps=steps, batch_size=32, learning_rate=4e-3, seed=seed, checkpoint_every=10_000
    )
    return (Phase(fit=fit),)


def _teacher(steps: int, schedule: Literal["constant", "linear"], words: float, warmup: float):
    fit = FitConfig(
        steps=steps,
        batch_size=48,
        learning_rate=2.5e-3,
        warmup=warmup,
        schedule=schedule,
        checkpoint_every=10_000,
    )
    return Phase(fit=fit, full=0.85, words=words)


FAMILY: tuple[Member, ...] = (
    # Both notations are learned well first. Then words become rare, so that the undefended teacher
    # writes digits when it takes the likeliest token, and a defense can change that.
    Member(
        "teacher", "teacher", "qwen2", "word", 4, 160, 5, 416,
        (_teacher(1300, "constant", 0.4, 0.1), _teacher(600, "linear", 0.1, 0.0)),
    ),
    Member("proxy-a", "proxy", "qwen2", "word", 2, 112, 4, 288, _base(11)),
    Member("proxy-b", "proxy", "qwen2", "word", 3, 96, 4, 256, _base(12)),
    Member("small", "student", "qwen2", "word", 2, 96, 4, 256, _base(21)),
    Member("large", "student", "qwen2", "word", 3, 128, 4, 320, _base(22)),
    Member("other", "student", "olmo2", "pieces", 2, 128, 4, 320, _base(23, steps=1300)),
)  # fmt: skip
