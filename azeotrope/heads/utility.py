"""How useful a teacher is, and how useful a defended one must stay."""

from dataclasses import dataclass

from pydantic import Field

from azeotrope.config import Config


@dataclass(frozen=True)
class Utility:
    """Accuracy of the teacher's own generated answers."""

    greedy: float
    sampled: float
    begun: float | None = None
    """Accuracy when the ground truth begins the answer; None if the floor does not ask for it."""


class UtilityFloor(Config):
    """The constraint on generated accuracy, as shares of the clean teacher's.

    The head is chosen on a few hundred problems, so its accuracy on new problems is a little
    lower: set the floor above the accuracy that must be kept.
    """

    greedy: float = Field(default=0.98, gt=0, le=1)
    sampled: float = Field(default=0.95, gt=0, le=1)
    begun: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="for greedy answers that the ground truth begins, in its own words; null does "
        "not check them, and accepts a head that is useful in its own style alone",
    )
    problems: int = Field(default=300, ge=1, description="held-out validation problems")
    temperature: float = Field(default=1.0, gt=0, description="of the sampled check")
    rounds: int = Field(default=4, ge=1)
    raise_by: float = Field(
        default=1.25, ge=1, description="factor on the strength after a good round"
    )
    lower_by: float = Field(default=0.5, gt=0, lt=1, description="factor after a bad one")
    from_pass: int = Field(
        default=0,
        ge=0,
        description="the first pass that is held to the floor. Earlier ones may fall below it "
        "if later ones repair the teacher on what it writes then",
    )

    def holds(self, defended: Utility, clean: Utility) -> bool:
        """Whether a defended teacher keeps every share of the clean teacher's accuracy."""
        requirements = [
            (self.greedy, defended.greedy, clean.greedy),
            (self.sampled, defended.sampled, clean.sampled),
        ]
        if self.begun is not None:
            requirements.append((self.begun, defended.begun or 0.0, clean.begun or 0.0))
        return all(after >= share * before for share, after, before in requirements)
