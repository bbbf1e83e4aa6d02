"""Finding the final answer in a completion, and telling whether two answers are the same.

Where a published harness has a rule it is followed: `####` as in GSM8K's strict extraction, the
last number as in its flexible one (lm-evaluation-harness), `\\boxed{}` as in MATH, and math-verify
for the equality of expressions.
"""

import logging
import re
import unicodedata
from collections.abc import Iterator
from fractions import Fraction

from azeotrope.tasks import quantities
from azeotrope.tasks.quantities import Quantity

_MARKED = re.compile(r"####[ \t]*\n?\s*(\S[^\n]*)")
# A Markdown heading of the fourth level, and not the mark of an answer.
_HEADING = re.compile(
    r"(?:step|part|section|phase|case|stage|method|approach|solution|problem|question|task|note"
    r"|explanation|verification|check|example|option)s?\b(?!\s*(?:is|=))",
    re.IGNORECASE,
)
_TAGGED = re.compile(r"<answer>(.+?)</answer>", re.DOTALL)
_SENTENCE = re.compile(
    r"(?:final\s+answer|answer)(?:\*\*|__)?\s*(?:is\b\s*:?|:|=)\s*(?:\*\*|__)?\s*(\S[^\n]*)",
    re.IGNORECASE,
)
_NEGATION = re.compile(r"(?:not|never|n't)\b", re.IGNORECASE)
_NEXT_TURN = re.compile(
    r"\n\s*(?:user|human|question|q|problem)\s*:|<\|im_(?:start|end)\|>|</s>", re.IGNORECASE
)
_COMMAND = re.compile(r"\\[A-Za-z]+")
_ARITHMETIC = re.compile(r"[\d\s.+\-*/()]*\d\s*[+\-*/][\d\s.+\-*/()]*")
_SAFE_POWER = re.compile(r"\^\{?-?\w{1,2}\}?(?![\w^!{])")
_LONGEST_EXPRESSION = 100
_MOST_POWERS = 3
_CHOICE = re.compile(r"\(?([A-Za-z])\)?[.:)]?")


def extract(completion: str, *, numeric: bool) -> str | None:
    r"""The final answer of a completion, or None.

    It is what stands after `####`, in `\boxed{}`, in `<answer>` tags, or after "answer is" or
    "Answer:". The first of these marks that is there decides, and of several its last: a model may
    correct itself. Reasoning in `<think>` tags is not searched, so a completion that never closes
    it has no answer; text after the beginning of another turn is not searched either.

    Args:
        numeric: the task's answers are numbers. Other words are then passed over, numbers come back
            in one spelling (`$1,000.00` as `1000`), and without a mark the last number counts.
    """
    text = visible(completion)
    for candidate in _candidates(text):
        answer = _numeric(candidate) if numeric else _words_of(candidate)
        if answer is not None:
            return answer
    return _unmarked(text) if numeric else None


def visible(completion: str) -> str:
    """What follows the reasoning, up to the beginning of another turn."""
    _, closed, rest = completion.rpartition("</think>")
    if not closed and "<think>" in completion:
        return ""
    text = rest if closed else completion
    turn = _NEXT_TURN.search(text)
    return text if turn is None or not text[: turn.start()].strip() else text[: turn.start()]


def same(candidate: str, reference: str) -> bool:
    """Whether two answers mean the same: as quantities, as words, or as short expressions.

    Quantities are compared exactly, and units must not contradict each other: `18 pears` are not
    `18 apples`, and `18` may be either. `math-verify` decides about expressions only. Its time
    limit uses a signal, which fails in threads, so it runs without one and gets nothing that could
    take long to evaluate.
    """
    first, second = quantities.whole(candidate), quantities.whole(reference)
    if first is not None and second is not None:
        return first.equals(second)
    if _folded(candidate) == _folded(reference):
        return True
    return _is_expression(candidate) and _is_expression(reference) and _equal(candidate, reference)


def number(text: str) -> Fraction | None:
    """The exact value of a number in everyday spelling: `$1,000.00`, `18 eggs`, `50%`."""
    quantity = quantities.whole(text)
    return None if quantity is None else quantity.value


def spell(text: str) -> str:
    """A number without commas, currency, units and needless zeros; other text as it is."""
    quantity = quantities.whole(text)
    return text if quantity is None else _spelled(Quantity(quantity.value))


def _spelled(quantity: Quantity) -> str:
    """The exact value as an integer, a decimal or a fraction, and the unit if it measures."""
    value = quantity.value
    places = next((n for n in range(31) if (value * 10**n).denominator == 1), None)
    if places is None:
        text = f"{value.numerator}/{value.denominator}"
    elif places == 0:
        text = str(value.numerator)
    else:
        digits = str(abs(value.numerator) * 10**places // value.denominator).rjust(places + 1, "0")
        text = f"{'-' * (value < 0)}{digits[:-places]}.{digits[-places:]}"
    return f"{text} {quantity.unit}" if quantity.unit in _MEASURES else text


# Units that change what a number means; those of counting (eggs, dollars) do not.
_MEASURES = frozenset(
    "mm cm m km in inch ft feet yd mi mile g kg mg lb pound oz ml l second min minute h hr hour "
    "day week month year m2 cm2 km2 m3 cm3".split()
)


def _candidates(text: str) -> Iterator[str]:
    for match in reversed(list(_MARKED.finditer(text))):
        if not _HEADING.match(match.group(1)):
            yield match.group(1)
    boxed = _boxed(text)
    if boxed is not None:
        yield boxed
    for match in reversed(list(_TAGGED.finditer(text))):
        yield match.group(1)
    for match in reversed(list(_SENTENCE.finditer(text))):
        if not _NEGATION.match(match.group(1)):
            yield match.group(1)


def _boxed(text: str) -> str | None:
    r"""The contents of the last `\boxed{}`, nested braces included, or of `\boxed 8`."""
    start = text.rfind(r"\boxed")
    if start < 0:
        return None
    rest = text[start + len(r"\boxed") :].lstrip()
    if not rest.startswith("{"):
        return rest.split()[0].rstrip("$.") if rest.split() else None
    depth = 0
    for end, character in enumerate(rest):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return rest[1:end] or None
    # A completion that was cut inside the box still shows a number there.
    return rest[1:].split("\n")[0] or None


def _numeric(candidate: str) -> str | None:
    boxed = _boxed(candidate)
    text = candidate if boxed is None else boxed
    quantity = quantities.whole(text)
    if quantity is not None:
        return _spelled(quantity)
    bare = quantities.plain(text)
    if _is_expression(bare) and not re.search(r"[=:]", bare):
        return bare
    quantity = quantities.first(text)
    return None if quantity is None else _spelled(quantity)


def _unmarked(text: str) -> str | None:
    lines = text.strip().splitlines()
    if lines and len(lines[-1]) <= _LONGEST_EXPRESSION and _ARITHMETIC.fullmatch(lines[-1]):
        return lines[-1].strip()
    quantity = quantities.last(text)
    return None if quantity is None else _spelled(quantity)


def _words_of(candidate: str) -> str | None:
    boxed = _boxed(candidate)
    return quantities.plain(candidate if boxed is None else boxed) or None


def _folded(text: str) -> str:
    bare = quantities.plain(unicodedata.normalize("NFKC", text))
    choice = _CHOICE.fullmatch(bare)
    return " ".join((choice.group(1) if choice else bare).casefold().rstrip(".").split())


def _is_expression(text: str) -> bool:
    """Mathematics that is cheap to evaluate: no words, no towers of powers, no factorials."""
    if len(text) > _LONGEST_EXPRESSION or not re.search(r"[\d\\]", text):
        return False
    # Words would be read as products of letters, which makes anagrams equal.
    if re.search(r"[A-Za-z]{2}", _COMMAND.sub("", text)):
        return False
    powers = text.count("^")
    safe = len(_SAFE_POWER.findall(text)) == powers <= _MOST_POWERS
    return safe and not re.search(r"[!:%]|\*\*", text)


def _is_value(parsed: object) -> bool:
    # math-verify returns the text itself where it cannot read it.
    return bool(getattr(parsed, "is_number", False))


def _equal(candidate: str, reference: str) -> bool:
    from math_verify import parse, verify

    # It warns about each missing time limit; the docstring of `same` says why there is none.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    first, second = (
        parse(f"${text}$", parsing_timeout=None)  # type: ignore[arg-type]
        for text in (reference, candidate)
    )
    values = [parsed[0].doit() for parsed in (first, second) if parsed and _is_value(parsed[0])]
    if len(values) == 2 and all(value.is_Rational for value in values):
        # math-verify compares rounded decimals, in which 1/2^99 and 1/2^98 are both 0.
        return bool(values[0] == values[1])
    return bool(verify(first, second, timeout_seconds=None))
