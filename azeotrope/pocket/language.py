"""The wording of reasoning: phrasings of the teacher, and ground truth with human-like slips.

The teacher knows two notations for the numbers in its reasoning, digits (`12`) and words
(`twelve`). Both are equally easy to read and lead to the same `#### 12`, but the bases have seen
digits only. A text defense can use this freedom without harm to the reader.
"""

import re
from random import Random
from typing import Literal

from azeotrope.pocket.problems import LARGEST, Operation, PocketProblem, apply, pick

Notation = Literal["digits", "words"]

WORDS = (
    *("zero one two three four five six seven eight nine ten eleven twelve".split()),
    *("thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty".split()),
)
_WORD = re.compile(rf"\b({'|'.join(WORDS)})\b")
OPENINGS = (
    "at first {v}.",
    "start with {v}.",
    "we have {v}.",
    "{name} begins at {v}.",
    "initially {v}.",
)
CONNECTORS = ("", "after that", "then", "so", "now", "next", "ok", "thus")
CLAUSES: dict[Operation, tuple[str, ...]] = {
    "add": (
        "{a} + {k} = {c}.",
        "add {k} to {a} gives {c}.",
        "{a} plus {k} is {c}.",
        "{k} more than {a} makes {c}.",
        "{a} grows by {k} to {c}.",
    ),
    "subtract": (
        "{a} - {k} = {c}.",
        "take {k} from {a} gives {c}.",
        "{a} minus {k} is {c}.",
        "{k} less than {a} makes {c}.",
        "{a} drops by {k} to {c}.",
    ),
    "double": (
        "2 * {a} = {c}.",
        "{a} doubles to {c}.",
        "twice {a} gives {c}.",
        "{a} times 2 is {c}.",
        "double {a} makes {c}.",
    ),
}
ENDINGS = ("", "", "that leaves {c}.", "in the end {c}.", "all done.")


def write_number(value: int, notation: Notation) -> str:
    return WORDS[value] if notation == "words" else str(value)


def digits_for_words(text: str) -> str:
    """Replace number words by digits, as an attacker who looks at the traces would."""
    return _WORD.sub(lambda match: str(WORDS.index(match[1])), text)


def reasoning(
    problem: PocketProblem,
    rng: Random,
    *,
    notation: Notation = "digits",
    slip: float = 0.0,
) -> str:
    """A completion: reasoning in `<think>` tags, then `#### answer`.

    Args:
        slip: the probability that a step's result is off by one or two. Later steps continue with
            the wrong number, as in cheap human labels.
    """

    def write(value: int) -> str:
        return write_number(value, notation)

    value = problem.values[0]
    parts = [pick(rng, OPENINGS).format(name=problem.name, v=write(value))]
    for operation, k in problem.steps:
        before, value = value, min(max(apply(operation, value, k), 0), LARGEST)
        if rng.random() < slip:
            value = min(max(value + pick(rng, (-2, -1, 1, 2)), 0), LARGEST)
        connector = pick(rng, CONNECTORS)
        clause = pick(rng, CLAUSES[operation]).replace("2", write(2))
        clause = clause.format(a=write(before), k=write(k), c=write(value))
        parts.append(f"{connector} {clause}" if connector else clause)
    ending = pick(rng, ENDINGS).format(c=write(value))
    body = " ".join([*parts, ending] if ending else parts)
    return f"<think> {body} </think> #### {value}"
