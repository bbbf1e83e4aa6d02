"""Whether a row is still reasoning or already answering, while it is being written."""

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from azeotrope.decoding import DecodingRow
from azeotrope.tokens import Boundary

WINDOW = 24
"""Last tokens in which the end of the reasoning is looked for at every step."""


class ReasoningWatch:
    """Follows rows and says which of them still reason.

    A row answers from the closing tag on or, if no tag opened its reasoning, from the first words
    of the answer on. It never reasons again.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, boundary: Boundary) -> None:
        self._tokenizer, self._boundary = tokenizer, boundary
        self._pattern = re.compile(boundary.answer_pattern)
        self._opened: set[DecodingRow] = set()
        self._answering: set[DecodingRow] = set()

    def reasons(self, row: DecodingRow) -> bool:
        """Whether the row's next token belongs to its reasoning."""
        if row in self._answering:
            return False
        text = self._text(row.written[-WINDOW:])
        if row not in self._opened and self._opens(row, text):
            self._opened.add(row)
        close_tag = self._boundary.close_tag
        answers = bool(close_tag) and close_tag in text
        if row not in self._opened:
            answers = answers or self._pattern.search(text) is not None
        if answers:
            self._answering.add(row)
        return not answers

    def drop(self, rows: Sequence[DecodingRow]) -> None:
        """Forget rows that ended."""
        self._opened.difference_update(rows)
        self._answering.difference_update(rows)

    def _opens(self, row: DecodingRow, text: str) -> bool:
        tag = self._boundary.open_tag
        # A prompt may open the reasoning for the model, as its last words.
        return bool(tag) and (tag in text or tag in self._text(row.prompt[-WINDOW:]))

    def _text(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))
