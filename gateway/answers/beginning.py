"""Whether a completion begins inside its reasoning, which its own text need not say.

Many chat templates end with the opening tag, and a client can end a prompt with it. A completion
that is then cut, or may not write the closing tag, has no tag at all, and looks like one that only
answers.
"""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from azeotrope.tokens import Boundary


def overlap(text: str, tag: str) -> int:
    """How many of the last characters are the first of a tag that is not complete."""
    longest = min(len(text), len(tag) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(tag[:n])), 0)


def opening(prompt: str, boundary: Boundary) -> str:
    """What stands before a completion as far as tags are concerned, to be read in front of it.

    The opening tag if the prompt leaves the reasoning open, else what its end has of an opening tag
    that the completion may complete. A closing tag that is begun in the prompt does not count: who
    could end the reasoning by half a tag would be shown all that follows.
    """
    is_open, rest = _scan(prompt, boundary)
    if is_open:
        return boundary.open_tag
    begun = overlap(rest, boundary.open_tag)
    return rest[len(rest) - begun :]


def _scan(prompt: str, boundary: Boundary) -> tuple[bool, str]:
    """Whether the reasoning is open at a prompt's end, and what stands after the last tag."""
    is_open, at = False, 0
    while True:
        tag = boundary.close_tag if is_open else boundary.open_tag
        found = prompt.find(tag, at) if tag else -1
        if found < 0:
            return is_open, prompt[at:]
        is_open, at = not is_open, found + len(tag)


def opening_of_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], boundary: Boundary
) -> str:
    """The same for a prompt as the engine gets it; a tag may be a special token there."""
    text = tokenizer.decode(list(prompt), skip_special_tokens=False)
    return opening(str(text), boundary)


def without_pattern(
    tokenizer: PreTrainedTokenizerBase, banned: Sequence[int], boundary: Boundary
) -> Boundary:
    """The boundary to judge a completion by that may not write some tokens.

    Where a tag cannot be spelt its absence says nothing: what is not marked as an answer is none.
    """
    tags = [tag for tag in (boundary.open_tag, boundary.close_tag) if tag]
    words = [str(tokenizer.decode([id])).strip() for id in banned]
    if not any(_may_spell(word, tag) for word in words for tag in tags):
        return boundary
    return boundary.model_copy(update={"answer_pattern": ""})


def _may_spell(word: str, tag: str) -> bool:
    """Whether a token can stand for a part of a tag, alone or with what surrounds it."""
    if not word:
        return False
    return word in tag or tag in word or overlap(word, tag) > 0 or overlap(tag, word) > 0
