"""From the tokens of a completion to its visible text, while it is being written.

Three steps follow one another: tokens become text, the reasoning is taken out, and a stop string
ends the rest. Stop strings come last on purpose. If hidden reasoning were compared with them, a
client could learn from an early end that its words occur in that reasoning.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from azeotrope.engine.protocol import Chunk, Finish, Token
from gateway.answers.detokenizing import Detokenizer
from gateway.answers.pieces import AnswerPiece
from gateway.answers.reading import ReadingRules
from gateway.answers.reasoning import SUMMARY, Mode, ReasoningFilter
from gateway.answers.stops import StopStrings
from gateway.http.token_bytes import TokenBytes, token_starts


@dataclass(frozen=True)
class _PlacedTokens:
    """Tokens whose joined text is characters [start, end) of the completion.

    White space in front does not count for `start`, because the answer's first token often has
    some. `visible_end` is the end without white space behind.
    """

    tokens: tuple[Token, ...]
    offsets: tuple[int, ...]
    """The start of each token in characters of the completion, white space included."""
    start: int
    end: int
    visible_end: int


class AnswerWriter:
    """Turns the chunks of one completion into pieces.

    A token is part of the piece that holds the last of its text. A token that lies partly in hidden
    text, or partly in a stop string, is in no piece, because its log-probability would tell about
    text that the client may not see. Tokens that share a character come together.

    Args:
        rules: used unless the mode is `shown`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        rules: ReadingRules,
        *,
        stops: Sequence[str] = (),
        mode: Mode = "shown",
        summary: tuple[str, str] = SUMMARY,
    ) -> None:
        self.finish: Finish | None = None
        self._detokenizer = Detokenizer(tokenizer)
        self._filter = ReasoningFilter(mode, rules, summary)
        self._stops = StopStrings(stops)
        # Tokens whose text is still held back, and those whose text is not all visible yet.
        self._unplaced: list[Token] = []
        self._placed: deque[_PlacedTokens] = deque()
        self._bytes = TokenBytes(tokenizer)
        # Characters of the completion so far, of its visible part, and of a summary's line.
        self._decoded = 0
        self._visible = 0
        self._line = 0

    def feed(self, chunk: Chunk) -> AnswerPiece:
        """The piece that a chunk adds. Tokens after a stop string are neither sent nor billed.

        Raises:
            ValueError: if the completion has ended already; close the engine's iterator then.
        """
        if self.finish is not None:
            raise ValueError(f"this completion ended with {self.finish!r}; it takes no more chunks")
        text, count = "", 0
        for token in chunk.tokens:
            count += 1
            self._unplaced.append(token)
            text += self._advance(self._detokenizer.step(token.id))
            if self.finish is not None:
                break
        else:
            if chunk.finish is not None:
                text += self._advance(self._detokenizer.flush(), final=True)
                self.finish = self.finish or chunk.finish
        visible = self._visible_tokens()
        return AnswerPiece(
            text,
            tuple(token for token, _ in visible),
            self.finish,
            tuple(offset for _, offset in visible),
            count,
        )

    def _advance(self, text: str, *, final: bool = False) -> str:
        if text:
            self._place(text)
        line, answer = self._filter.advance(text, final=final)
        visible, stopped = self._stops.feed(answer)
        if stopped:
            self.finish = "stop"
        elif final:
            visible += self._stops.flush()
        self._visible += len(visible)
        self._line += len(line)
        # The summary's line is the gateway's own text, so stop strings do not apply to it.
        return line + visible

    def _place(self, text: str) -> None:
        """Give the waiting tokens their place, now that their text is known."""
        start, end = self._decoded, self._decoded + len(text)
        front = min(len(text) - len(text.lstrip()), len(text) - 1)
        visible_end = start + len(text.rstrip()) if text.strip() else end
        tokens = tuple(self._unplaced)
        offsets = tuple(start + offset for offset in self._offsets_within(tokens, text))
        self._placed.append(_PlacedTokens(tokens, offsets, start + front, end, visible_end))
        self._unplaced, self._decoded = [], end

    def _offsets_within(self, tokens: Sequence[Token], text: str) -> tuple[int, ...]:
        # Clients see offsets beside log-probabilities only, and the bytes of tokens take a while.
        if len(tokens) == 1 or tokens[0].logprob is None:
            return (0,) * len(tokens)
        return token_starts([self._bytes.of(token.id) for token in tokens], text)

    def _visible_tokens(self) -> list[tuple[Token, int]]:
        """Tokens that became visible, with their offsets; tokens before the answer are dropped."""
        if self._filter.start is None:
            return []
        first, last = self._filter.start, self._filter.start + self._visible
        visible: list[tuple[Token, int]] = []
        while self._placed:
            group = self._placed[0]
            # At the end, white space that was cut off does not take its token with it.
            if (group.end if self.finish is None else group.visible_end) > last:
                break
            self._placed.popleft()
            # A token that begins before the answer carries hidden text, so it stays hidden.
            if group.start >= first:
                # The white space of the answer's first token is not visible.
                offsets = (max(offset - first, 0) + self._line for offset in group.offsets)
                visible.extend(zip(group.tokens, offsets, strict=True))
        return visible
