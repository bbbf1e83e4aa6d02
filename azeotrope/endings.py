"""Which tokens end a completion, and which one a student learns to end with.

Three places name them, and model families disagree about which is complete: the tokenizer's
end-of-sequence token (Llama base models), the generation configuration (Gemma: 1 and 106, Llama 3:
three ids), and the chat template, which writes an end of turn after an assistant's message (Phi-3).
Each of them ends a completion. A student learns the token that its own template writes there.
"""

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

_DECLARED = "_declared_end_ids"
_MARK = "azeotrope"
"""A message whose end is looked for in the rendered template."""


def declare(tokenizer: PreTrainedTokenizerBase, ids: int | Iterable[int] | None) -> None:
    """Remember with a tokenizer the ids that its model's generation configuration names."""
    several = () if ids is None else (ids,) if isinstance(ids, int) else tuple(ids)
    setattr(tokenizer, _DECLARED, tuple(int(id) for id in several))


def end_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Every token id that ends a completion.

    Raises:
        ValueError: if there is none: nothing that a model writes would ever end.
    """
    ids = _known_ends(tokenizer)
    if not ids:
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no end-of-sequence token, so that no "
            "completion would end; set tokenizer.eos_token and save it"
        )
    return ids


def learned_end(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token id that ends a completion which is learned from text.

    Raises:
        ValueError: if no token ends completions.
    """
    turn = end_of_turn(tokenizer)
    if turn is not None:
        return turn
    if tokenizer.eos_token_id is not None:
        return int(tokenizer.eos_token_id)  # type: ignore[arg-type]
    return min(end_ids(tokenizer))


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the chat template writes after an assistant's message, if any."""
    template = tokenizer.chat_template
    if not isinstance(template, str):
        return None
    return _end_of_turn(tokenizer, template, str(tokenizer.eos_token))


def end_pairs(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> dict[int, int]:
    """For each end of the teacher, the student's token that means the same.

    It is the token of the same spelling if that ends the student's completions too, and the one
    that the student learns otherwise. Nothing is paired with a student that has no end.
    """
    theirs = _known_ends(student)
    if not theirs:
        return {}
    fallback = learned_end(student)
    pairs: dict[int, int] = {}
    for end in _known_ends(teacher):
        twin = student.convert_tokens_to_ids(str(teacher.convert_ids_to_tokens(end)))
        pairs[end] = int(twin) if twin in theirs else fallback  # type: ignore[arg-type]
    return pairs


def _known_ends(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    own = (tokenizer.eos_token_id, end_of_turn(tokenizer), *getattr(tokenizer, _DECLARED, ()))
    return frozenset(int(id) for id in own if id is not None)  # type: ignore[arg-type]


@lru_cache(maxsize=64)
def _end_of_turn(tokenizer: PreTrainedTokenizerBase, _template: str, _eos: str) -> int | None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _MARK}]
    try:
        text: Any = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:
        # A template that takes no assistant's message, or is broken, writes no end of turn; what
        # is broken is refused where prompts are made.
        return None
    _, mark, after = str(text).rpartition(_MARK)
    special = {
        token.content: id for id, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    starts = [token for token in special if mark and after.lstrip().startswith(token)]
    return special[max(starts, key=len)] if starts else None
