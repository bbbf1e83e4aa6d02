"""From a completion's tokens to what is shown of it, while it is being written.

Three stages follow one another: tokens become text, the reasoning is taken out, and a stop string
ends what is left. Stops come last on purpose: compared with hidden reasoning, they would tell a
client whether his words stand in it.
"""

import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from azeotrope.engine.protocol import Chunk, Finish, Token
from azeotrope.tokens import Boundary, decode, spans
from gateway.answers.beginning import overlap
from gateway.http.token_bytes import TokenBytes, places

Mode = Literal["shown", "summary", "cut"]
WORDS = ("[1 step of reasoning is not shown]", "[{steps} steps of reasoning are not shown]")
"""What `summary` says of one sentence, and of any other number of them."""

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
_SENTENCE_END = re.compile(r"[.!?]+(?:\s+|$)|[\u3002\uff01\uff1f]+|\n+")


class Detokenizer:
    """Text of one completion, token by token; joined, it equals `tokens.decode` of all ids.

    `tokenizers.decoders.DecodeStream` is not exact: it shows bytes of a run that turns out not to
    be UTF-8, then fails, and it has no way to give out what it holds at the end. Here too the last
    tokens are decoded again with those before them. Text is held back after a token that spells a
    byte (only the end of such a run says whether it is UTF-8), after one that shows nothing of its
    own, and while the last character is not whole. A tokenizer that cleans up spaces changes what
    it has written, so all is held back to the end.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._before: list[int] = []
        self._pending: list[int] = []
        self._shown = 0
        self._rewrites = _cleans_up(tokenizer)

    def step(self, token_id: int) -> str:
        """What can be said for certain now that this token is written; often its own text."""
        self._pending.append(token_id)
        name = self._tokenizer.convert_ids_to_tokens(token_id)
        if self._rewrites or (isinstance(name, str) and _BYTE.fullmatch(name)):
            return ""
        alone = decode(self._tokenizer, [token_id])
        if not alone:
            return ""
        text = decode(self._tokenizer, self._before + self._pending)
        if text.endswith(_UNFINISHED):
            return ""
        piece = text[self._shown :]
        # Some decoders drop the space of the first token they see, so one is kept for context.
        closing = alone if len(self._pending) == 1 else decode(self._tokenizer, self._pending)
        self._before, self._pending, self._shown = self._pending, [], len(closing)
        return piece

    def flush(self) -> str:
        """What is left at the end of the completion."""
        text = decode(self._tokenizer, self._before + self._pending)
        piece, self._shown = text[self._shown :], len(text)
        return piece


def _cleans_up(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether decoding removes spaces before punctuation; transformers never does it for BPE."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    pairs = backend is not None and type(backend.model).__name__ == "BPE"
    return bool(getattr(tokenizer, "clean_up_tokenization_spaces", False)) and not pairs


class StopStrings:
    """Ends a text where a stop string begins; the stop itself is not shown.

    Of several, the one that is complete first counts, and of those the longest, so the result does
    not depend on how the text was divided.

    Raises:
        ValueError: if a stop is empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(stops):
            raise ValueError(f"a stop string must have at least one character, got {list(stops)}")
        self._stops = tuple(stops)
        self._held = ""
        self._stopped = False

    def feed(self, text: str) -> tuple[str, bool]:
        """More text to show, and whether a stop has been met. Nothing follows a stop."""
        if self._stopped:
            return "", True
        text = self._held + text
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._stopped, self._held = True, ""
            return text[: min(found)[1]], True
        # The longest end of the text that might become a stop waits for what follows.
        waiting = max((overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - waiting :]
        return text[: len(text) - waiting], False

    def flush(self) -> str:
        """What was held back and did not become a stop."""
        text, self._held = self._held, ""
        return text


class ReasoningFilter:
    """Takes the reasoning out of a text that arrives in parts.

    `shown` passes everything. `cut` shows what `tokens.without_reasoning` leaves of the whole
    text, neither more nor less. `summary` puts a line in the reasoning's place that says how many
    sentences it had. While it is not known whether a text is reasoning nothing is shown. So an
    answer streams once the closing tag has been read; a text without tags is held back to its end,
    since a tag may still come.

    Args:
        opening: what the prompt has of tags, from `beginning.opening`. It is read in front of the
            text and is no part of it, so a text that begins inside reasoning and does not close it
            is hidden whole, whatever looks like an answer in it.
    """

    def __init__(
        self,
        mode: Mode,
        boundary: Boundary,
        words: tuple[str, str] = WORDS,
        *,
        opening: str = "",
    ) -> None:
        self._mode, self._boundary, self._words = mode, boundary, words
        self._tags = [tag for tag in (boundary.open_tag, boundary.close_tag) if tag]
        self._opening = len(opening)
        self._held = opening
        self._line = ""
        self._begun = False
        self.start: int | None = 0 if mode == "shown" else None
        """Characters before the text that is shown; None while that is unknown."""

    def feed(self, text: str) -> str:
        """More of what may be shown."""
        return "".join(self.advance(text))

    def flush(self) -> str:
        """What may be shown now that the text has ended."""
        return "".join(self.advance("", final=True))

    def advance(self, text: str, *, final: bool = False) -> tuple[str, str]:
        """The line in the reasoning's place, when it is due, and more of the completion itself."""
        if self._mode == "shown":
            return "", text
        self._held += text
        if self.start is None:
            start = self._answer(final)
            if start is None:
                return "", ""
            start = max(start, self._opening)
            self.start = start - self._opening
            self._line = self._summary(self._held[:start])
            self._held = self._held[start:]
        if not self._begun:
            trimmed = self._held.lstrip()
            self.start += len(self._held) - len(trimmed)
            self._held, self._begun = trimmed, bool(trimmed)
        # White space is shown with what follows it, so that none is left at the end.
        answer = self._held.rstrip()
        self._held = self._held[len(answer) :]
        line = ""
        if self._line and (self._begun or final):
            line, self._line = self._line + ("\n" if self._begun else ""), ""
        return line, answer

    def _answer(self, final: bool) -> int | None:
        """Where the answer begins; None while what follows may still change that."""
        text = self._held
        if not final:
            first = min((at for tag in self._tags if (at := text.find(tag)) >= 0), default=None)
            # Another tag may begin no later than this one and not be complete yet.
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
        one, many = self._words
        return "" if not steps else one if steps == 1 else many.format(steps=steps)


def count_sentences(text: str) -> int:
    """Sentences and lines with a word or a sum in them; the bare number of a list is none."""
    parts = (part.strip() for part in _SENTENCE_END.split(text))
    return sum(1 for part in parts if any(map(str.isalnum, part)) and not part.isdigit())


@dataclass(frozen=True)
class Piece:
    """What one chunk adds to what is shown."""

    text: str
    tokens: tuple[Token, ...]
    """Those whose text is shown to its end, for log-probabilities. None of hidden text."""
    finish: Finish | None
    consumed: int
    """Tokens of the engine so far, hidden ones included, for the bill."""
    offsets: tuple[int, ...] = ()
    """Where each token begins in all that is shown, in characters, a summary's line included."""


@dataclass(frozen=True)
class _Placed:
    """Tokens whose text is characters [start, end) of the completion, in one piece.

    White space in front does not count: the answer's first token often carries some. `visible` is
    the end without white space behind.
    """

    tokens: tuple[Token, ...]
    offsets: tuple[int, ...]
    """Of each token, in characters of the completion, white space included."""
    start: int
    end: int
    visible: int


class Writer:
    """One completion from chunks to pieces.

    A token is given in the piece that shows the last of its text. One that lies partly in hidden
    text, or partly in a stop string, is not given; tokens that share a character are given
    together.

    Args:
        words: see `WORDS`.
        opening: see `ReasoningFilter`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stops: Sequence[str] = (),
        mode: Mode = "shown",
        *,
        boundary: Boundary,
        words: tuple[str, str] = WORDS,
        opening: str = "",
    ) -> None:
        self.tokens = 0
        """Tokens of the engine so far, hidden ones included."""
        self.finish: Finish | None = None
        self._detokenizer = Detokenizer(tokenizer)
        self._filter = ReasoningFilter(mode, boundary, words, opening=opening)
        self._stops = StopStrings(stops)
        self._unplaced: list[Token] = []
        self._placed: deque[_Placed] = deque()
        self._bytes = TokenBytes(tokenizer)
        self._read = 0
        self._shown = 0
        self._line = 0

    def feed(self, chunk: Chunk) -> Piece:
        """What a chunk adds; what follows a stop string is neither shown nor counted.

        Raises:
            ValueError: if the completion has ended already; close the engine's iterator then.
        """
        if self.finish is not None:
            raise ValueError(f"this completion ended with {self.finish!r}; it takes no more chunks")
        text = ""
        for token in chunk.tokens:
            self.tokens += 1
            self._unplaced.append(token)
            text += self._show(self._detokenizer.step(token.id))
            if self.finish is not None:
                break
        else:
            if chunk.finish is not None:
                text += self._show(self._detokenizer.flush(), final=True)
                self.finish = self.finish or chunk.finish
        given = self._given()
        return Piece(
            text,
            tuple(token for token, _ in given),
            self.finish,
            self.tokens,
            tuple(offset for _, offset in given),
        )

    def _show(self, text: str, *, final: bool = False) -> str:
        if text:
            self._place(text)
        line, answer = self._filter.advance(text, final=final)
        shown, stopped = self._stops.feed(answer)
        if stopped:
            self.finish = "stop"
        elif final:
            shown += self._stops.flush()
        self._shown += len(shown)
        self._line += len(line)
        # The line is the gateway's own, so stops are not looked for in it.
        return line + shown

    def _place(self, text: str) -> None:
        start, end = self._read, self._read + len(text)
        front = min(len(text) - len(text.lstrip()), len(text) - 1)
        visible = start + len(text.rstrip()) if text.strip() else end
        tokens = tuple(self._unplaced)
        offsets = tuple(start + place for place in self._within(tokens, text))
        self._placed.append(_Placed(tokens, offsets, start + front, end, visible))
        self._unplaced, self._read = [], end

    def _within(self, tokens: Sequence[Token], text: str) -> tuple[int, ...]:
        # Offsets are shown beside numbers alone, and bytes of tokens take a while.
        if len(tokens) == 1 or tokens[0].logprob is None:
            return (0,) * len(tokens)
        return places([self._bytes.of(token.id) for token in tokens], text)

    def _given(self) -> list[tuple[Token, int]]:
        """Tokens that have come to be shown, and where; those before the answer are dropped."""
        if self._filter.start is None:
            return []
        first, last = self._filter.start, self._filter.start + self._shown
        given: list[tuple[Token, int]] = []
        while self._placed:
            item = self._placed[0]
            # At the end, white space that was cut off does not take its token with it.
            if (item.end if self.finish is None else item.visible) > last:
                break
            self._placed.popleft()
            if item.start >= first:
                # The white space of the answer's first token is not shown.
                offsets = (max(offset - first, 0) + self._line for offset in item.offsets)
                given.extend(zip(item.tokens, offsets, strict=True))
        return given
