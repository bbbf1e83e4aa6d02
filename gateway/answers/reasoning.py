"""Hides or summarizes the reasoning of a completion while it is being written."""

import re
from typing import Literal

from azeotrope.tokens import spans
from gateway.answers.reading import ReadingRules

Mode = Literal["shown", "summary", "cut"]
SUMMARY = ("[1 step of reasoning is not shown]", "[{steps} steps of reasoning are not shown]")
"""The line that replaces one sentence of reasoning, and the line for any other number."""

_SENTENCE_END = re.compile(r"[.!?]+(?:\s+|$)|[\u3002\uff01\uff1f]+|\n+")


class ReasoningFilter:
    """Takes the reasoning out of a text that arrives in parts.

    `shown` passes the whole text. `cut` passes exactly what `tokens.without_reasoning` leaves of
    the whole text. `summary` also puts a line in the reasoning's place that says how many sentences
    it had.

    No text is passed while it is unknown whether it is reasoning. So an answer streams once the
    closing tag was read. A text without tags is held back to its end, because a tag may still come.

    Args:
        rules: a completion that begins inside reasoning and does not close it is hidden whole, even
            if a part of it looks like an answer.
    """

    def __init__(self, mode: Mode, rules: ReadingRules, summary: tuple[str, str] = SUMMARY) -> None:
        boundary = rules.boundary
        self._mode, self._boundary, self._summary_lines = mode, boundary, summary
        self._tags = [tag for tag in (boundary.open_tag, boundary.close_tag) if tag]
        self._opening = len(rules.opening)
        self._held = rules.opening
        self._line = ""
        self._begun = False
        self.start: int | None = 0 if mode == "shown" else None
        """Characters of the completion before its visible text; None while that is unknown."""

    def feed(self, text: str) -> str:
        """More of the text that may be sent."""
        return "".join(self.advance(text))

    def flush(self) -> str:
        """The rest of the text that may be sent, now that the completion has ended."""
        return "".join(self.advance("", final=True))

    def advance(self, text: str, *, final: bool = False) -> tuple[str, str]:
        """The line in the reasoning's place once it is due, and more of the completion itself."""
        if self._mode == "shown":
            return "", text
        self._held += text
        if self.start is None:
            start = self._answer_start(final)
            if start is None:
                return "", ""
            # The opening belongs to the prompt, so it is never part of the answer.
            start = max(start, self._opening)
            self.start = start - self._opening
            self._line = self._summary(self._held[:start])
            self._held = self._held[start:]
        if not self._begun:
            trimmed = self._held.lstrip()
            self.start += len(self._held) - len(trimmed)
            self._held, self._begun = trimmed, bool(trimmed)
        # White space waits for the text after it, so that an answer never ends with some.
        answer = self._held.rstrip()
        self._held = self._held[len(answer) :]
        line = ""
        if self._line and (self._begun or final):
            line, self._line = self._line + ("\n" if self._begun else ""), ""
        return line, answer

    def _answer_start(self, final: bool) -> int | None:
        """Where the answer begins; None while later text may still change that."""
        text = self._held
        if not final:
            first = min((at for tag in self._tags if (at := text.find(tag)) >= 0), default=None)
            # One tag may be the beginning of the other. The longer one may start at the same
            # character or before and be incomplete, so the longest tag must fit first.
            if first is None or len(text) < first + max(map(len, self._tags)):
                return None
        reasoning, answer = spans(text, self._boundary)
        return answer.start if final or reasoning.end < answer.start else None

    def _summary(self, hidden: str) -> str:
        if self._mode != "summary":
            return ""
        for tag in self._tags:
            hidden = hidden.replace(tag, "\n")
        steps = count_sentences(hidden)
        one, many = self._summary_lines
        return "" if not steps else one if steps == 1 else many.format(steps=steps)


def count_sentences(text: str) -> int:
    """Sentences and lines that hold a letter or a digit; the bare number of a list is not one."""
    parts = (part.strip() for part in _SENTENCE_END.split(text))
    return sum(1 for part in parts if any(map(str.isalnum, part)) and not part.isdigit())
