"""Quantities in everyday and LaTeX spelling: an exact value and a unit.

    1,000  10 000  9{,}500  12,34,567  1.080,00  -3  (-3)  $18  18€  50%  3 1/2  3½  \\frac{7}{2}
    1e3  2 x 10^3  1 million  18 m^2  18 eggs/day  \\boxed's contents such as 8\\text{ cm}

The value is a fraction, so that no two numbers are equal because a float rounds them.
"""

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

LONGEST = 200
"""Characters that a quantity may have. Longer texts are not read: an integer of thousands of digits
takes quadratic time to convert, and Python refuses one of more than 4,300."""

_CURRENCY = "$€£¥₹"
_VULGAR = {c: unicodedata.numeric(c) for c in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"}
_MAGNITUDES = {
    "hundred": 100,
    "thousand": 1000,
    "k": 1000,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
    "dozen": 12,
}
# The order matters: grouped digits before plain ones. A grouped number may not be cut out of a
# longer run of digits and commas, so 1,00 is not a number at all.
_DIGITS = (
    r"(?:\d{1,3}(?:\.\d{3})+,\d{1,2}(?![\d,])"
    r"|\d{1,3}(?:,\d{3})+(?:\.\d+)?(?!,?\d)"
    r"|\d{1,2}(?:,\d{2})+,\d{3}(?:\.\d+)?(?!,?\d)"
    r"|\d{1,3}(?: \d{3})+(?![\d ]*\d)"
    r"|\d+(?:\.\d+)?(?!,\d)|\.\d+)"
)
_SIGN = r"[-+]\s?"
_POWER = r"(?:[eE][-+]?\d{1,3}(?![\d.])|\s?(?:x|\*)\s?10\s?\^\s?\{?[-+]?\d{1,3}\}?)"
_NUMBER = re.compile(
    rf"(?P<sign>(?<![\w)])(?:{_SIGN}))?(?:(?P<currency>[{_CURRENCY}]|Rs\.?\s?)(?P<inner>{_SIGN})?)?"
    rf"(?:(?P<whole>\d+)\s(?P<part>\d+/0*[1-9]\d*)(?![\d/])"
    rf"|(?P<top>{_DIGITS})\s?/\s?(?P<bottom>0*[1-9]\d*)(?![\d/.])"
    rf"|(?P<digits>{_DIGITS})(?P<power>{_POWER})?)"
)
_UNIT = re.compile(
    rf"\s?(?P<magnitude>{'|'.join(_MAGNITUDES)})?(?![A-Za-z])"
    rf"(?P<unit>[\s\-/{_CURRENCY}%°A-Za-z.'²³]*(?:\^\s?\{{?[23]\}}?|(?<=m)[23])?)(?:\s\([^()\d]*\))?"
)
_JOINERS = re.compile(r"\b(?:and|or|to|x|by|plus|minus|times|of)\b", re.IGNORECASE)
_COMMANDS = (
    (re.compile(r"\\(?:text|mathrm|mbox|textbf|mathbf|operatorname)\s*\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\\[dt]?frac\s*\{([^{}]+)\}\s*\{([^{}]+)\}"), r" \1/\2"),
    (re.compile(r"\\[dt]?frac\s*(\d)\s*(\d)"), r" \1/\2"),
    (re.compile(r"\\(?:left|right|displaystyle)(?![A-Za-z])"), ""),
    (re.compile(r"\\(?:times|cdot)(?![A-Za-z])|\u00d7"), "*"),
    (re.compile(r"\^\s*\{?\\circ\}?"), "°"),
    (re.compile(r"\\(?:approx|sim)(?![A-Za-z])|≈"), "~"),
    # Thin spaces group digits; other spaces of LaTeX are spaces.
    (re.compile(r"\\[,!;: ]|(?<!\\)~(?=\S)(?<=\S~)|[\u00a0\u2009\u202f]"), " "),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\([%$])"), r"\1"),
    (re.compile(r"[\u2212\u2012\u2013]"), "-"),
)
_WRAPPERS = (
    *(("**", "**"), ("__", "__"), ("`", "`"), ('"', '"'), ("'", "'"), ("$", "$")),
    *((r"\[", r"\]"), (r"\(", r"\)"), ("(", ")"), ("[", "]"), ("<answer>", "</answer>")),
)
_LEAD = re.compile(
    r"(?:(?:about|approximately|approx\.?|around|roughly|exactly|only|is|the|final|answer|total)"
    r"\b\s*:?\s*|<answer>\s*|[~:=]\s*)+",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Quantity:
    """A number and what it counts or measures; the unit is empty where there is none."""

    value: Fraction
    unit: str = ""

    def equals(self, other: "Quantity") -> bool:
        """Whether values are equal and units do not contradict: 18 equals 18 apples."""
        units_agree = not self.unit or not other.unit or self.unit == other.unit
        return self.value == other.value and units_agree


def plain(text: str) -> str:
    r"""Everyday spelling of LaTeX, typographic and decorated text: `$\frac{7}{2}$` is `7/2`."""
    text = "".join(_plain_character(character) for character in text)
    text = unicodedata.normalize("NFC", text)
    for pattern, replacement in _COMMANDS:
        text = pattern.sub(replacement, text)
    text = text.strip()
    while True:
        bare = text.strip().rstrip(".,;!").removesuffix("</answer>").strip()
        for opening, closing in _WRAPPERS:
            inner = bare[len(opening) : len(bare) - len(closing)]
            wrapped = len(bare) > len(opening) + len(closing)
            if wrapped and bare.startswith(opening) and bare.endswith(closing):
                # Parentheses around a list are part of the list.
                bare = bare if closing in ")]" and "," in inner else inner.strip()
        if bare == text:
            return re.sub(r"[ \t]+", " ", text)
        text = bare


def _plain_character(character: str) -> str:
    if character in _VULGAR:
        value = Fraction(_VULGAR[character]).limit_denominator(10)
        return f" {value.numerator}/{value.denominator}"
    # Digits of any script; superscripts belong to units.
    if character.isdecimal():
        return str(unicodedata.decimal(character))
    return character


def whole(text: str) -> Quantity | None:
    """The quantity that all of a text is, or None.

    Of an equation the side that is a quantity counts, the right one first: `5 + 3 = 8` is 8 and
    `20 = 18 + 2` is 20.
    """
    if len(text) > LONGEST:
        return None
    text = plain(text)
    for side in (text, *reversed(text.split("="))):
        side = _LEAD.sub("", side.strip(), count=1) if _LEAD.match(side.strip()) else side.strip()
        match = _NUMBER.match(side)
        tail = match and _UNIT.fullmatch(side, match.end())
        if match and tail and not _JOINERS.search(tail["unit"]):
            return _quantity(match, tail)
    return None


def first(text: str) -> Quantity | None:
    """The first quantity in a text, unless the text offers alternatives or is a range or a time."""
    text = plain(text[:LONGEST])
    match = _NUMBER.search(text)
    if match is None or re.match(r"\s?(?:-|:|or\b|to\b)\s?\d", text[match.end() :]):
        return None
    tail = _UNIT.match(text, match.end())
    assert tail is not None
    words = tail["unit"].split()
    # In running text only the next word can be the unit.
    return _quantity(match, tail, unit=words[0] if words and not match["currency"] else "")


def last(text: str) -> Quantity | None:
    """The last quantity in a text, without its unit: what GSM8K's flexible extraction takes."""
    matches = list(_NUMBER.finditer(plain(text)))
    return Quantity(_value(matches[-1])) if matches else None


def _quantity(match: re.Match[str], tail: re.Match[str], unit: str | None = None) -> Quantity:
    value = _value(match) * _MAGNITUDES.get((tail["magnitude"] or "").casefold(), 1)
    words = tail["unit"] if unit is None else unit
    return Quantity(value, _unit(match["currency"] or "", words))


def _unit(currency: str, words: str) -> str:
    unit = (currency + words).casefold().translate(str.maketrans("²³", "23"))
    unit = re.sub(r"[\s.^{}\-']", "", unit)
    return unit[:-1] if len(unit) > 3 and unit.endswith("s") else unit


def _value(match: re.Match[str]) -> Fraction:
    if match["part"]:
        value = int(match["whole"]) + _fraction(*match["part"].split("/"))
    elif match["bottom"]:
        value = _fraction(_bare(match["top"]), match["bottom"])
    else:
        value = Fraction(_bare(match["digits"]))
        if match["power"]:
            exponent = int(re.sub(r".*(?:[eE]|\^\s?\{?)([-+]?\d+)\}?$", r"\1", match["power"]))
            value *= Fraction(10) ** exponent
    negative = "-" in (match["sign"] or "") or "-" in (match["inner"] or "")
    return -value if negative else value


def _fraction(top: str, bottom: str) -> Fraction:
    return Fraction(top) / int(bottom)


def _bare(digits: str) -> str:
    european = re.fullmatch(r"\d{1,3}(?:\.\d{3})+,\d{1,2}", digits)
    if european:
        return digits.replace(".", "").replace(",", ".")
    return re.sub(r"[, ]", "", digits)
