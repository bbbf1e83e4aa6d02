"""Attribute texts to the key whose mark they carry.

The mark of every key is looked for. If m marks are tried on unmarked text, the smallest of m
p-values is small by chance, so each p-value is multiplied by m (Bonferroni). The probability that
unmarked text is attributed to any key is then at most the alarm rate, however many keys there are.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from azeotrope.defenses.base import Defense, Detection, TokenizedTexts

ALARM_RATE = 1e-4
"""The probability that unmarked text is attributed to any key."""


@dataclass(frozen=True)
class Verdict:
    """What one mark says about the texts, all of them together."""

    holders: tuple[str, ...]
    """The keys that have this mark. A rotated key passes its mark on to its successor, and texts
    cannot tell the two apart."""
    detection: Detection
    p_value: float
    """Corrected for the number of marks that were tried."""
    detected: bool


def attribute(
    texts: TokenizedTexts, marks: Mapping[str, Defense], *, alarm_rate: float = ALARM_RATE
) -> list[Verdict]:
    """Look for every mark in texts.

    Args:
        marks: by holder, the defense that marked the holder's texts. Holders of defenses with
            equal settings share one mark.
        alarm_rate: the largest corrected p-value at which a mark counts as detected.

    Returns:
        One verdict per mark, the smallest p-value first.

    Raises:
        TypeError: if a defense leaves no mark, or cannot detect it in texts.
        ValueError: if there is no mark, the rate is no probability, or an id is negative.
    """
    if not marks:
        raise ValueError("there is no mark to look for")
    if not 0 < alarm_rate < 1:
        raise ValueError(f"the alarm rate is between 0 and 1, got {alarm_rate:g}")
    ids = [[int(token) for token in text] for text in texts]
    holders: dict[str, list[str]] = {}
    for holder, defense in marks.items():
        holders.setdefault(defense.config.model_dump_json(), []).append(holder)
    verdicts = []
    for names in holders.values():
        detection = marks[names[0]].detect(ids)
        corrected = min(1.0, detection.p_value * len(holders))
        verdicts.append(Verdict(tuple(names), detection, corrected, corrected <= alarm_rate))
    # Strong marks all have a p-value of 0 in floating point; z still orders them.
    return sorted(verdicts, key=lambda verdict: (verdict.p_value, -verdict.detection.z))
