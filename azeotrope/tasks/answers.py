"""Find the final answer in a completion, and compare two answers."""

import logging
import re
from collections.abc import Iterator
from fractions import Fraction

_DIGITS = r"(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)"
# A minus after a word or a closing bracket is a subtraction or a range, not a sign; \u2212 is the
# minus that typesetting uses.
_NUMBER = re.compile(rf"(?:(?<![\w)])[-\u2212])?[$€£]?(?:(?<=[$€£])[-\u2212])?{_DIGITS}")
_UNITS = re.compile(r"[\s%°A-Za-z]*")
_LINE = re.compile(r"####[ \t]*(\S[^\n]*)")
_SENTENCE = re.compile(r"answer\s+is\s*:?\s*([^\n]+)", re.IGNORECASE)
_COMMAND = re.compile(r"\\[A-Za-z]+")
_SAFE_POWER = re.compile(r"\^\{?-?\w{1,2}\}?(?![\w^!{])")
_LONGEST_EXPRESSION = 100
_MOST_POWERS = 3


def extract(completion: str, *, numeric: bool) -> str | None:
    r"""The final answer: after `####`, in `\boxed{}`, after "answer is", or the last number.

    They are tried in this order. If one occurs several times, the last one counts, because a model
    may correct itself. Reasoning in `<think>` tags is not searched.

    Args:
        numeric: the task's answers are numbers, so other words are skipped, and numbers are
            returned in one spelling (`$1,000.00` as `1000`). Otherwise the last number is not
            taken as an answer.
    """
    _, closed, rest = completion.rpartition("</think>")
    text = rest if closed else completion
    for candidate in _candidates(text):
        answer = _clean(candidate, numeric)
        if answer is not None:
            return answer
    if not numeric:
        return None
    numbers = _NUMBER.findall(text)
    return spell(numbers[-1]) if numbers else None


def same(answer: str, reference: str) -> bool:
    """Whether two answers mean the same: as numbers, as words, or as short expressions.

    `math-verify` compares expressions only. Its time limit uses a signal, which fails in threads,
    so it runs without one and only gets expressions that are quick to evaluate.
    """
    first, second = number(answer), number(reference)
    if first is not None and second is not None:
        return first == second
    if _words(answer) == _words(reference):
        return True
    return _is_expression(answer) and _is_expression(reference) and _equal(answer, reference)


def number(text: str) -> Fraction | None:
    """The exact value of a number in everyday spelling: `$1,000.00`, `18 eggs`, `50%`."""
    text = text.strip()
    match = _NUMBER.match(text)
    if match is None or not _UNITS.fullmatch(text[match.end() :].rstrip(".")):
        return None
    return Fraction(_bare(match.group()))


def spell(text: str) -> str:
    """A number without commas, currency, units and needless zeros; other text unchanged."""
    value = number(text)
    if value is None:
        return text
    if value.denominator == 1:
        return str(value.numerator)
    match = _NUMBER.match(text.strip())
    digits = _bare(match.group() if match else text).rstrip("0")
    return re.sub(r"^(-?)\.", r"\g<1>0.", digits)


def _bare(text: str) -> str:
    return re.sub(r"[,$€£]", "", text).replace("\u2212", "-")


def _candidates(text: str) -> Iterator[str]:
    for match in reversed(list(_LINE.finditer(text))):
        yield match.group(1)
    boxed = _boxed(text)
    if boxed is not None:
        yield boxed
    for match in reversed(list(_SENTENCE.finditer(text))):
        yield match.group(1)


def _boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{}`, nested braces included; None without a closed one."""
    start = text.rfind(r"\boxed{")
    if start < 0:
        return None
    start += len(r"\boxed{")
    depth = 1
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start:end]
    return None


def _clean(candidate: str, numeric: bool) -> str | None:
    boxed = _boxed(candidate)
    text = (candidate if boxed is None else boxed).replace(r"\%", "%").replace(r"\$", "$")
    text = text.strip().strip("*`").rstrip(".").strip()
    if len(text) > 2 and text[0] == text[-1] == "$":
        text = text[1:-1].strip()
    if not numeric:
        return text or None
    if number(text) is not None:
        return spell(text)
    if _is_expression(text):
        return text
    match = _NUMBER.search(text)
    return spell(match.group()) if match else None


def _words(text: str) -> str:
    return " ".join(text.casefold().rstrip(".").split())


def _is_expression(text: str) -> bool:
    """Mathematics that is cheap to evaluate: no words, no stacked powers, no factorials."""
    if len(text) > _LONGEST_EXPRESSION or not re.search(r"[\d\\]", text):
        return False
    # Words would be read as products of letters, which makes anagrams equal.
    if re.search(r"[A-Za-z]{2}", _COMMAND.sub("", text)):
        return False
    powers = text.count("^")
    safe = len(_SAFE_POWER.findall(text)) == powers <= _MOST_POWERS
    return safe and "!" not in text and "**" not in text


def _equal(answer: str, reference: str) -> bool:
    from math_verify import parse, verify

    # It warns whenever there is no time limit; the docstring of `same` says why there is none.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    first, second = (
        parse(f"${text}$", parsing_timeout=None)  # type: ignore[arg-type]
        for text in (reference, answer)
    )
    return bool(verify(first, second, timeout_seconds=None))
