"""A part of one completion as it leaves the gateway."""

from dataclasses import dataclass

from azeotrope.engine.protocol import Finish, Token


@dataclass(frozen=True)
class AnswerPiece:
    """The text that one step adds to a completion, or a whole completion when pieces are joined."""

    text: str = ""
    tokens: tuple[Token, ...] = ()
    """Tokens whose text is visible to its end, for log-probabilities. Hidden text has none."""
    finish: Finish | None = None
    """Why the completion ended; None while it continues."""
    offsets: tuple[int, ...] = ()
    """The start of each token, in characters of the whole visible completion. A summary's line
    counts."""
    engine_tokens: int = 0
    """Tokens that the engine wrote for this piece, hidden ones included. All of them are billed."""


def join(pieces: list[AnswerPiece]) -> AnswerPiece:
    """All pieces of one completion as one."""
    return AnswerPiece(
        "".join(piece.text for piece in pieces),
        tuple(token for piece in pieces for token in piece.tokens),
        pieces[-1].finish,
        tuple(offset for piece in pieces for offset in piece.offsets),
        sum(piece.engine_tokens for piece in pieces),
    )
