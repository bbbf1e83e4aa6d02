"""How a completion must be read: whether it begins inside its reasoning, and where answers are.

A completion does not always say by itself that it begins inside the reasoning. Many chat templates
end with the opening tag, and a client can end a prompt with it. If the completion is then cut off,
or may not write the closing tag, it has no tag at all and looks like a plain answer. Without the
rules of this module such a completion would send its reasoning to a client that may not see it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from azeotrope.tokens import Boundary


@dataclass(frozen=True)
class ReadingRules:
    """What tells the reasoning of one completion from its answer."""

    boundary: Boundary = field(default_factory=Boundary)
    """The tags, and the pattern that marks an answer where this completion may rely on one."""
    opening: str = ""
    """The part of the prompt that belongs to a tag (see `opening`). It is read in front of the
    completion and is not part of it."""


def overlap(text: str, tag: str) -> int:
    """The length of the longest end of a text that begins a tag without completing it."""
    longest = min(len(text), len(tag) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(tag[:n])), 0)


def opening(prompt: str, boundary: Boundary) -> str:
    """The end of a prompt that must be read in front of its completion, as far as tags matter.

    This is the opening tag if the prompt leaves the reasoning open. Otherwise it is the part of an
    opening tag at the prompt's end that the completion may complete. Half a closing tag does not
    count: a client that ends a prompt with it could otherwise end the reasoning at once and see
    all that follows.
    """
    is_open, rest = _scan(prompt, boundary)
    if is_open:
        return boundary.open_tag
    partial = overlap(rest, boundary.open_tag)
    return rest[len(rest) - partial :]


def _scan(prompt: str, boundary: Boundary) -> tuple[bool, str]:
    """Whether the reasoning is open at a prompt's end, and the text after the last tag."""
    is_open, start = False, 0
    while True:
        tag = boundary.close_tag if is_open else boundary.open_tag
        at = prompt.find(tag, start) if tag else -1
        if at < 0:
            return is_open, prompt[start:]
        is_open, start = not is_open, at + len(tag)


def opening_of_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], boundary: Boundary
) -> str:
    """`opening` for the ids that the engine gets, in which a tag may be a special token."""
    text = tokenizer.decode(list(prompt), skip_special_tokens=False)
    return opening(str(text), boundary)


def without_pattern(
    tokenizer: PreTrainedTokenizerBase, banned: Sequence[int], boundary: Boundary
) -> Boundary:
    """The boundary for a completion that may not write the banned tokens.

    If a ban makes a tag impossible to write, the absence of this tag proves nothing. The pattern
    that recognizes an answer without tags is then dropped: an answer must be marked.
    """
    tags = [tag for tag in (boundary.open_tag, boundary.close_tag) if tag]
    words = [str(tokenizer.decode([id])).strip() for id in banned]
    if not any(_may_spell(word, tag) for word in words for tag in tags):
        return boundary
    return boundary.model_copy(update={"answer_pattern": ""})


def _may_spell(word: str, tag: str) -> bool:
    """Whether a token can be a part of a tag, alone or with the tokens around it."""
    if not word:
        return False
    return word in tag or tag in word or overlap(word, tag) > 0 or overlap(tag, word) > 0
