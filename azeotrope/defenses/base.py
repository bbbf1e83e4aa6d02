"""What a defense is. Workflows look at its stage, never at its name.

A defense called `doge` is the module `azeotrope/defenses/doge.py` with a class `Config` (its
`name` is a literal) and a function `build(config)`. There is no registry: the name is the module.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, SupportsInt, runtime_checkable

from pydantic import Field

import azeotrope.defenses
from azeotrope.config import Config
from azeotrope.decoding import DecodingHooks
from azeotrope.heads.features import FeatureBatch
from azeotrope.heads.head import Head
from azeotrope.plugins import Plugins
from azeotrope.tokens import Boundary
from azeotrope.training import TokenSum

Stage = Literal["weights", "decoding", "text"]
RewriteStatus = Literal["unchanged", "changed", "verified", "fell_back"]
"""What a text defense did with one text. `changed`: rewritten, and its answer was not compared;
`verified`: rewritten, and its answer is still that of the original; `fell_back`: no acceptable
rewriting was made, so the text is what the defense shows in that case."""
_DEFENSES = Plugins(azeotrope.defenses, "defense", frozenset({"base", "proxied"}))


class DefenseConfig(Config):
    """Settings that every defense has."""

    name: str
    strength: float = Field(default=1.0, ge=0, description="0 is the identity")


@dataclass(frozen=True)
class FinishedText:
    """A finished completion, with what the provider knows of its problem."""

    text: str
    question: str | None = None
    """The user's words; None where the completion continues a bare prompt."""
    reference: str | None = None
    """The right answer; None when users are served."""


@dataclass(frozen=True)
class RewriteContext:
    """What a text defense may use besides the texts."""

    boundary: Boundary
    has_answer: Callable[[str, str], bool] | None = None
    """Whether a text (the first argument) gives an answer (the second); None when users are
    served, because an arbitrary prompt has no task that could compare answers."""


@dataclass(frozen=True)
class RewrittenText:
    """A text after a defense of stage `text`, and what happened to it."""

    text: str
    status: RewriteStatus
    reason: str = ""
    """For `fell_back`: why, in a few words that are the same for all texts with this cause."""

    @classmethod
    def compared(cls, before: str, after: str) -> "RewrittenText":
        """`unchanged` or `changed`, by comparison with the text before."""
        return cls(after, "unchanged" if after == before else "changed")


TokenizedTexts = Iterable[Iterable[SupportsInt]]
"""Token ids of the teacher's tokenizer, one sequence per text, without prompts."""


@runtime_checkable
class Suspect(Protocol):
    """A model that may have learned from a defended teacher."""

    def complete(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """One completion per prompt, in token ids of the teacher's tokenizer."""
        ...


@dataclass(frozen=True, kw_only=True)
class Detection:
    """How surely a defense finds its mark."""

    scored: int
    """Independent observations that were counted; 0 if the evidence is too short."""
    p_value: float
    """The probability of at least as strong evidence if the mark is absent."""
    z: float = field(default=0.0, compare=False)
    """Standard deviations above the mean without a mark. It is there to be read and to order
    results; decisions use the p-value, which is exact where the normal distribution is not."""


class Defense(DecodingHooks):
    """Hooks that do nothing by default; a defense overrides those of its stage.

    - `weights`: `loss` trains the head once, before serving.
    - `decoding`: `adjust_logits` acts on every token. A defense that needs the prompt, or keeps
      something for each row, implements `add_rows`, `adjust_rows` and `drop_rows` instead.
    - `text`: `rewrite` acts on the finished completion.

    A defense that leaves a mark in what it defends also implements `detect`.
    """

    stage: ClassVar[Stage]
    needs_proxies: ClassVar[bool] = False
    is_baseline: ClassVar[bool] = False
    """Other defenses are compared with it. It is measured at one budget, without clean-ups."""
    layer: str | None = None
    """The layer of the proxies whose gradients the loss needs. The loss then gets `Surrogate`s, and
    features that enter that layer. With None it gets `ProxyHead`s and last hidden states."""
    needs_truth: bool = False
    """The loss needs ground-truth texts; without any it would be zero."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.strength: float = config.strength
        """The weight of the adversarial term in the summed loss (stage `weights`)."""

    def scaled(self, factor: float) -> "Defense":
        """The same defense with its strength multiplied by `factor` (stage `weights`)."""
        changed = copy.copy(self)
        changed.strength = self.strength * factor
        return changed

    def check(self, hidden_size: int) -> None:
        """Refuse settings that do not fit a teacher of this hidden size (stage `weights`).

        Raises:
            ValueError: if a setting does not fit.
        """

    def parametrise(self, head: Head, clean: Head, rows: int) -> Head:
        """The head whose parameters are trained in place of the whole head (stage `weights`).

        Args:
            clean: the undefended teacher's head, to compare with.
            rows: rows of the head that belong to tokens; the others pad it.
        """
        return head

    @property
    def uses_public_key(self) -> bool:
        """Whether its key is the default one, which is public and protects nothing."""
        return False

    @property
    def is_identity(self) -> bool:
        return self.config.strength == 0

    def calibrate(self, completion_tokens: int, reasoning_tokens: int, sequences: int) -> None:
        """Learn the shape of the training data before the first step (stage `weights`)."""

    def loss(self, head: Any, proxies: tuple[Any, ...], batch: FeatureBatch) -> TokenSum:
        """The objective to minimise over the head's parameters (stage `weights`).

        Raises:
            TypeError: if the defense is of another stage.
        """
        raise TypeError(f"{type(self).__name__} of stage {self.stage!r} has no training loss")

    def score(self, head: Any, proxies: tuple[Any, ...], batch: FeatureBatch) -> float | None:
        """How much an attacker learns from held-out texts; lower is better (stage `weights`).

        The search takes the head with the lowest score among those that keep the utility floor. If
        the score is None it takes the last one.
        """
        return None

    def detect(self, evidence: TokenizedTexts | Suspect) -> Detection:
        """Look for this defense's mark, all texts together.

        Args:
            evidence: texts, or a model that is asked for texts. Each defense says which it takes.

        Raises:
            TypeError: if the defense leaves no mark, or takes the other kind of evidence.
            ValueError: if the evidence cannot be read.
        """
        raise TypeError(f"{type(self).__name__} leaves no mark that could be detected")

    def rewrite(
        self, texts: Sequence[FinishedText], context: RewriteContext
    ) -> list[RewrittenText]:
        """Change finished completions without changing their answers (stage `text`).

        All texts of a batch are given at once, so that a defense with a writer of its own (a
        model, or an endpoint) can have them written side by side. The writer is named by the
        defense's settings and is loaded at the first call.

        Returns:
            One result per text, in the same order.
        """
        return [RewrittenText(item.text, "unchanged") for item in texts]

    def close(self) -> None:
        """Release what `rewrite` opened or loaded, such as a writer."""


def strength_label(name: str, strength: float | None) -> str:
    """How tables, figures and `points.json` name a defense: `doge (0.1)`, or `none` alone."""
    return name if strength is None or name == "none" else f"{name} ({strength:g})"


def names() -> list[str]:
    """The names of all defenses."""
    return _DEFENSES.names()


def resolve(data: dict[str, Any]) -> Defense:
    """Build a defense from plain configuration.

    Raises:
        ConfigError: if there is no module of that name, or a key or value does not fit.
    """
    return _DEFENSES.build(data)
