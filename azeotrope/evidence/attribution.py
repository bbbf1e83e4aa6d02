"""Whose watermark do texts carry: the mark of every key is looked for, and guesses are paid for.

Who tries m marks on innocent text finds the least of m p-values, so each is multiplied by m
(Bonferroni). The probability that innocent text is laid to anybody at all is then at most the
alarm rate, however many keys there are.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import SupportsInt

from azeotrope.defenses.watermark import CONTEXT, SHARE, Detection, different_pairs, judge

ALARM_RATE = 1e-4
"""How often innocent text may be laid to anybody."""


@dataclass(frozen=True)
class Verdict:
    """What one mark says about the texts, all of them together."""

    holders: tuple[str, ...]
    """Whose mark it is. A key that was rotated has its successor's mark, and texts cannot tell."""
    detection: Detection
    p_value: float
    """Corrected for the number of marks that were tried."""
    found: bool


def attribute(
    completions: Iterable[Iterable[SupportsInt]],
    marks: Mapping[str, str],
    *,
    share: float = SHARE,
    context: int = CONTEXT,
    alarm_rate: float = ALARM_RATE,
) -> list[Verdict]:
    """Judge texts by every mark, the surest first.

    Args:
        completions: token ids of the teacher's tokenizer, one sequence a text, without prompts.
            Each different pair of a context and a token counts once over all texts.
        marks: secret watermark keys by their holders. Holders of one secret are one mark.
        share, context: those of the defense.
        alarm_rate: greatest corrected p-value at which a mark counts as found.

    Raises:
        ValueError: if there is no mark, a secret is empty, the rate is no probability, or an id
            is negative.
    """
    if not marks:
        raise ValueError("there is no mark to look for")
    if not 0 < alarm_rate < 1:
        raise ValueError(f"the alarm rate is between 0 and 1, got {alarm_rate:g}")
    holders: dict[str, list[str]] = {}
    for holder, secret in marks.items():
        holders.setdefault(secret, []).append(holder)
    pairs = different_pairs(completions, context)
    verdicts = []
    for secret, names in holders.items():
        detection = judge(pairs, key=secret, share=share)
        corrected = min(1.0, detection.p_value * len(holders))
        verdicts.append(Verdict(tuple(names), detection, corrected, found=corrected <= alarm_rate))
    # Beyond the smallest float all p-values are 0, and z still tells them apart.
    return sorted(verdicts, key=lambda verdict: (verdict.p_value, -verdict.detection.z))
