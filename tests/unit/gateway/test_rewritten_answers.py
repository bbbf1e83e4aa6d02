"""Answers that text defenses rewrite."""

import asyncio
from collections.abc import AsyncGenerator, Sequence

import pytest
from completions_made import BOUNDARY, INSIDE

from azeotrope.defenses.base import Defense, FinishedText, RewriteContext, RewrittenText
from azeotrope.tokens import Boundary
from gateway.answers import answering
from gateway.answers.pieces import AnswerPiece
from gateway.answers.reading import ReadingRules
from gateway.answers.reasoning import Mode


class DropsTags(Defense):
    """A text defense that drops every tag."""

    stage = "text"

    def __init__(self) -> None:
        self.texts: list[str] = []

    def rewrite(
        self, texts: Sequence[FinishedText], context: RewriteContext
    ) -> list[RewrittenText]:
        self.texts += [finished.text for finished in texts]
        return [
            RewrittenText.compared(finished.text, self.changed(finished.text, context.boundary))
            for finished in texts
        ]

    def changed(self, text: str, boundary: Boundary) -> str:
        return text.replace(boundary.open_tag, "").replace(boundary.close_tag, "")


class KeepsText(DropsTags):
    """A text defense that leaves the text as it is."""

    def changed(self, text: str, boundary: Boundary) -> str:
        return text


def rewrite(text: str, defense: DropsTags, mode: Mode, rules: ReadingRules) -> AnswerPiece:
    async def source() -> AsyncGenerator[AnswerPiece]:
        for letter in text:
            yield AnswerPiece(letter, engine_tokens=1)
        yield AnswerPiece(finish="length")

    async def whole() -> AnswerPiece:
        pieces = answering.rewritten(source(), [defense], BOUNDARY, rules, mode=mode, stops=())
        [piece] = [piece async for piece in pieces]
        return piece

    return asyncio.run(whole())


@pytest.mark.parametrize("kind", [KeepsText, DropsTags])
def test_rewritten_reasoning_is_hidden_like_any_other(kind: type[DropsTags]) -> None:
    rules = ReadingRules(BOUNDARY, opening="<think>")
    for mode, line in (("cut", ""), ("summary", "[3 steps of reasoning are not shown]")):
        defense = kind()
        # A text without an answer is not even passed to the defense.
        assert rewrite(INSIDE, defense, mode, rules).text == line
        assert defense.texts == []
    closed = f"{INSIDE} </think> joe has 4"
    defense = kind()
    piece = rewrite(closed, defense, "shown", rules)
    assert defense.texts == ["<think>" + closed]
    assert piece.text == (closed if kind is KeepsText else closed.replace("</think>", ""))
    # The bill counts what the engine wrote, whatever the defense makes of it.
    assert (piece.engine_tokens, piece.finish) == (len(closed), "length")
    assert rewrite(closed, KeepsText(), "cut", rules).text == "joe has 4"
    # A ban of the tags also removes the pattern that marks an answer without them.
    unmarked = ReadingRules(BOUNDARY.model_copy(update={"answer_pattern": ""}))
    assert rewrite(INSIDE, kind(), "cut", unmarked).text == ""
