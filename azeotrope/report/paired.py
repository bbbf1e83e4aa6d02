"""A paired test beside utility kept, for two teachers that answered the same problems."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import Field, ValidationError
from scipy import stats

from azeotrope.config import Config, explain

PAIRED = "paired"
"""Key of the tests among the run's facts in `results.json`."""


class PairedTest(Config):
    """McNemar's test of a defended teacher against the clean one."""

    defense: str
    strength: float | None = None
    decoding: str
    n: int = Field(ge=1, description="problems that both answered")
    p: float = Field(ge=0, le=1, description="of equal accuracy, two-sided")

    @classmethod
    def of(
        cls, clean: Mapping[str, bool], defended: Mapping[str, bool], **columns: Any
    ) -> "PairedTest | None":
        """The test of two exams, given as problem -> correct; None if the problems differ.

        Args:
            columns: the columns that name the defended teacher.
        """
        if not clean or clean.keys() != defended.keys():
            return None
        pairs = [(clean[problem], defended[problem]) for problem in clean]
        p = mcnemar_p([before for before, _ in pairs], [after for _, after in pairs])
        return cls(**columns, n=len(pairs), p=p)


def mcnemar_p(correct_a: Sequence[bool], correct_b: Sequence[bool]) -> float:
    """Exact two-sided McNemar test that two models solve the same share of the same problems.

    Only the problems that exactly one model solved count; under the null hypothesis each of the
    two is equally likely to be that model. Without such problems the value is 1.

    Raises:
        ValueError: if the two lists are not of one length.

    Reference:
        McNemar 1947, "Note on the sampling error of the difference between correlated proportions
        or percentages".
    """
    if len(correct_a) != len(correct_b):
        raise ValueError(
            f"a paired test needs the same problems: {len(correct_a)} against {len(correct_b)}"
        )
    only_a = sum(a and not b for a, b in zip(correct_a, correct_b, strict=True))
    only_b = sum(b and not a for a, b in zip(correct_a, correct_b, strict=True))
    if only_a + only_b == 0:
        return 1.0
    return float(stats.binomtest(only_a, only_a + only_b, 0.5).pvalue)


def read_paired(run: Mapping[str, Any]) -> list[PairedTest]:
    """The tests among a run's facts; none in files that are older than the tests.

    Raises:
        ValueError: if an entry does not fit.
    """
    try:
        return [PairedTest.model_validate(entry) for entry in run.get(PAIRED, [])]
    except ValidationError as error:
        raise ValueError(f"run.{PAIRED}: {explain(error, PairedTest, whole='test')}") from None


def find_test(
    tests: Iterable[PairedTest], defense: str, strength: float | None
) -> PairedTest | None:
    """The test of one defended teacher: of its greedy answers if there is one."""
    matching = [t for t in tests if (t.defense, t.strength) == (defense, strength)]
    return min(matching, key=lambda t: t.decoding != "greedy", default=None)
