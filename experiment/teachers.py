"""What one teacher wrote in a run, defended or not."""

from dataclasses import dataclass
from typing import Any

from experiment.settings import DefenseChoice
from experiment.stages import Stage, describe


@dataclass(frozen=True)
class TeacherResult:
    """The traces that an attacker observes and the teacher's own exams."""

    choice: DefenseChoice | None
    """None for the undefended teacher."""
    traces: Stage
    greedy: Stage
    sampled: Stage
    heads: tuple[Stage, ...] = ()
    decoding: tuple[dict[str, Any], ...] = ()
    """The decoding defenses as they act, with the proxies that were prepared for them."""

    @property
    def label(self) -> str:
        """The defense's name in result tables."""
        return self.choice.label if self.choice else "none"

    @property
    def checkpoint(self) -> str | None:
        """The exported teacher; None if the weights are the undefended ones."""
        return str(self.heads[-1].path / "teacher") if self.heads else None

    @property
    def serves_own_logits(self) -> bool:
        """Whether the exported checkpoint computes the logits that clients see."""
        choice = self.choice
        return self.checkpoint is not None and choice is not None and choice.changes_weights_alone

    @property
    def strength(self) -> float:
        """The strength in force: for a searched head the one that was accepted last."""
        passes = [describe(stage, "head.json") for stage in self.heads]
        if not passes:
            return self.choice.strength if self.choice else 0.0
        # A pass that ended with the undefended head discards the passes before it.
        start = max((i for i, head in enumerate(passes) if head.get("undefended")), default=0)
        return max(head["strength"] for head in passes[start:])
