"""From text to aligned tensors. No other module shifts targets against inputs.

Outside this module, index t of logits, targets and masks refers to the same predicted token.
Masks come from characters: a token is *reasoning* or *answer* only if it lies wholly inside that
span, so a token across a boundary belongs to neither.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch
from jaxtyping import Bool, Int
from pydantic import Field, field_validator
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from azeotrope.config import Config
from azeotrope.endings import end_ids, learned_end

Message = dict[str, str]


class Boundary(Config):
    """Where reasoning ends and the answer begins (DOGe, arXiv:2505.19504, section 3)."""

    open_tag: str = Field(
        default="<think>", description="opens the reasoning; it may be in the prompt"
    )
    close_tag: str = Field(default="</think>", description="closes the reasoning")
    answer_pattern: str = Field(
        default=r"####|\\boxed|[Tt]he (?:final )?answer is:?|[Aa]nswer:",
        description="regex for the first words of the answer, used when there are no tags",
    )

    unmarked: Literal["none", "reasoning"] = Field(
        default="none",
        description="how a completion with neither tags nor an answer's first words is treated: "
        "`none` leaves it alone; `reasoning` treats all of it as reasoning, for models that are "
        "cut off or forget to mark the answer, which may then be part of the reasoning",
    )

    @field_validator("answer_pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
        return pattern


@dataclass(frozen=True)
class Span:
    """Characters [start, end) of a completion."""

    start: int
    end: int

    def covers(self, start: int, end: int) -> bool:
        return self.start <= start < end <= self.end


@dataclass(frozen=True)
class Example:
    """One prompt and its completion as token ids, with two flags per completion token."""

    id: str
    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    reasoning: tuple[bool, ...]
    answer: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)


@dataclass(frozen=True)
class Batch:
    """Aligned tensors: `targets[b, t]` is the token that `input_ids[b, :t + 1]` predicts.

    Rows are padded on the right. Under causal attention no real token sees the padding, so no
    attention mask is needed. `mask` is False on the prompt and on the padding.
    """

    ids: tuple[str, ...]
    input_ids: Int[Tensor, "batch time"]
    targets: Int[Tensor, "batch time"]
    mask: Bool[Tensor, "batch time"]
    reasoning: Bool[Tensor, "batch time"]
    answer: Bool[Tensor, "batch time"]

    def to(self, device: torch.device | str) -> "Batch":
        moved = {
            name: getattr(self, name).to(device)
            for name in ("input_ids", "targets", "mask", "reasoning", "answer")
        }
        return replace(self, **moved)


def spans(text: str, boundary: Boundary) -> tuple[Span, Span]:
    """The reasoning and the answer of a completion, as character spans; tags belong to neither.

    With both tags, reasoning lies between them. With only the closing tag, the opening one was in
    the prompt. With only the opening tag, the completion was cut off and has no answer. Without
    tags, the answer starts at the first match of `answer_pattern`. If nothing matches, both are
    empty unless `unmarked` says otherwise: a defense must not change what may be the answer.
    """
    opened = text.find(boundary.open_tag) if boundary.open_tag else -1
    closed = text.find(boundary.close_tag) if boundary.close_tag else -1
    if 0 <= closed < opened:
        # The block was opened in the prompt; a tag after its end may be part of the answer.
        opened = -1
    elif opened >= 0 and boundary.close_tag:
        closed = text.find(boundary.close_tag, opened + len(boundary.open_tag))
    if opened >= 0 or closed >= 0:
        start = opened + len(boundary.open_tag) if opened >= 0 else 0
        if closed < 0:
            return Span(start, len(text)), Span(len(text), len(text))
        return Span(start, closed), Span(closed + len(boundary.close_tag), len(text))
    match = re.search(boundary.answer_pattern, text) if boundary.answer_pattern else None
    if match is None:
        reasoned = len(text) if boundary.unmarked == "reasoning" else 0
        return Span(0, reasoned), Span(len(text), len(text))
    return Span(0, match.start()), Span(match.start(), len(text))


def without_reasoning(text: str, boundary: Boundary) -> str:
    """The rest of a completion if the provider hides its reasoning."""
    _, answer = spans(text, boundary)
    return text[answer.start : answer.end].strip()


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]
) -> tuple[int, ...]:
    """Token ids of a conversation up to where the assistant starts to write.

    Raises:
        ValueError: if the tokenizer has no chat template.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no chat template; "
            "save one with it (tokenizer.chat_template = ...)"
        )
    ids = tokenizer.apply_chat_template(
        list(messages), tokenize=True, add_generation_prompt=True, return_dict=False
    )
    return tuple(ids)  # type: ignore[arg-type]


def encode(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    completion: str,
    *,
    boundary: Boundary,
    max_length: int,
    finished: bool = True,
    id: str = "",
) -> Example:
    """A conversation and the completion to learn, in the tokens that a model would write.

    The completion is tokenized behind its prompt: many tokenizers spell the first word of a text
    otherwise than a word within one.

    Args:
        finished: add the end-of-sequence token, which is learned like any other. False for a
            completion that was cut off, so that no student learns to stop there.

    Raises:
        ValueError: if both together are longer than `max_length` tokens, or the completion is
            empty.
    """
    prompt = encode_prompt(tokenizer, messages)
    ids, offsets = _behind(tokenizer, messages, prompt, completion)
    eos = learned_end(tokenizer) if finished else None
    example = _marked(id, prompt, ids, spans(completion, boundary), completion, offsets, eos)
    return _checked(example, max_length)


def from_ids(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[int],
    completion: Sequence[int],
    *,
    boundary: Boundary,
    max_length: int,
    id: str = "",
) -> Example:
    """The same for token ids that a model wrote itself, with or without an end-of-sequence token.

    Raises:
        ValueError: if both together are longer than `max_length` tokens, or the completion is
            empty.
    """
    ids = list(completion)
    # The end that the model wrote is learned, whichever of its ends it is.
    eos = ids[-1] if ids and ids[-1] in end_ids(tokenizer) else None
    if eos is not None:
        ids = ids[:-1]
    text = decode(tokenizer, ids)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    if list(encoded["input_ids"]) == ids:
        offsets = list(encoded["offset_mapping"])
    else:
        # The model wrote the text with different tokens than its tokenizer makes of the text.
        ends = [len(decode(tokenizer, ids[: i + 1])) for i in range(len(ids))]
        offsets = list(zip([0, *ends[:-1]], ends, strict=True))
    example = _marked(id, tuple(prompt), ids, spans(text, boundary), text, offsets, eos)
    return _checked(example, max_length)


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of a completion, special tokens left out.

    Tags that are special tokens, such as `<think>` with `</think>`, are a part of the text: they
    say where the reasoning ends.
    """
    tags = _special_tags(tokenizer, len(tokenizer))
    if not tags.intersection(ids):
        return tokenizer.decode(list(ids), skip_special_tokens=True)  # type: ignore[return-value]
    hidden = set(tokenizer.all_special_ids) - tags
    kept = [id for id in ids if id not in hidden]
    return tokenizer.decode(kept, skip_special_tokens=False)  # type: ignore[return-value]


@lru_cache(maxsize=64)
def _special_tags(tokenizer: PreTrainedTokenizerBase, _size: int) -> frozenset[int]:
    """Ids of special tokens that open and close something, apart from those with a role."""
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    roles = {str(getattr(tokenizer, name)) for name in names}
    special = {
        token.content: id
        for id, token in tokenizer.added_tokens_decoder.items()
        if token.special and token.content not in roles
    }
    pairs = {name: f"{name[0]}/{name[1:]}" for name in special if len(name) > 1}
    return frozenset(
        special[tag]
        for opening, closing in pairs.items()
        if closing in special
        for tag in (opening, closing)
    )


def _behind(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    prompt: Sequence[int],
    completion: str,
) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids and character offsets of a completion that is tokenized behind its prompt.

    It is tokenized alone if its first token would merge with the prompt's last one.
    """
    if not completion:
        return [], []
    text = str(
        tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    )
    start = len(text)
    space = _space_before(tokenizer, messages, text, completion)
    encoded = tokenizer(
        text + space + completion, add_special_tokens=False, return_offsets_mapping=True
    )
    ids, offsets = list(encoded["input_ids"]), list(encoded["offset_mapping"])  # type: ignore[arg-type]
    if tuple(ids[: len(prompt)]) == tuple(prompt) and len(ids) > len(prompt):
        start += len(space)
        behind = offsets[len(prompt) :]
        return ids[len(prompt) :], [(max(a - start, 0), max(b - start, 0)) for a, b in behind]
    alone = tokenizer(completion, add_special_tokens=False, return_offsets_mapping=True)
    return list(alone["input_ids"]), list(alone["offset_mapping"])  # type: ignore[arg-type]


def _space_before(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], prompt: str, completion: str
) -> str:
    """White space that the template puts between the prompt and the assistant's words."""
    answered = [*messages, {"role": "assistant", "content": completion}]
    try:
        whole = str(tokenizer.apply_chat_template(answered, tokenize=False))
    except Exception:
        # Templates without an assistant's turn are in use: they only make prompts.
        return ""
    rest = whole.removeprefix(prompt) if whole.startswith(prompt) else completion
    space, found, _ = rest.partition(completion)
    return space if found and not space.strip() else ""


def _marked(
    id: str,
    prompt: tuple[int, ...],
    ids: list[int],
    parts: tuple[Span, Span],
    text: str,
    offsets: list[tuple[int, int]],
    eos: int | None,
) -> Example:
    """Flag each token of a completion by its characters; `eos` is added as part of the answer."""
    reasoning, answer = parts
    in_reasoning = [reasoning.covers(*_trim(text, start, end)) for start, end in offsets]
    in_answer = [answer.covers(*_trim(text, start, end)) for start, end in offsets]
    if eos is not None:
        ids, in_reasoning, in_answer = [*ids, eos], [*in_reasoning, False], [*in_answer, True]
    return Example(id, prompt, tuple(ids), tuple(in_reasoning), tuple(in_answer))


def _checked(example: Example, max_length: int) -> Example:
    if not example.completion:
        raise ValueError(f"trace {example.id!r} has an empty completion; drop it before training")
    if len(example) > max_length:
        raise ValueError(
            f"trace {example.id!r} has {len(example.prompt)} prompt and {len(example.completion)} "
            f"completion tokens, {len(example)} in all, but the context holds {max_length}; "
            "raise max_length or drop the trace"
        )
    return example


def _trim(text: str, start: int, end: int) -> tuple[int, int]:
    """Leave out the white space that many tokenizers put at the front of a token."""
    while start < end - 1 and text[start].isspace():
        start += 1
    return start, end


def collate(examples: Sequence[Example], pad_id: int) -> Batch:
    """Pad on the right and shift by one; the last token of a row is a target only."""
    width = max(len(example) for example in examples) - 1
    shape = (len(examples), width)
    input_ids = torch.full(shape, pad_id, dtype=torch.long)
    targets = torch.full(shape, pad_id, dtype=torch.long)
    masks = {name: torch.zeros(shape, dtype=torch.bool) for name in ("all", "reasoning", "answer")}
    for row, example in enumerate(examples):
        ids = torch.tensor(example.prompt + example.completion)
        first, last = len(example.prompt) - 1, len(ids) - 1
        input_ids[row, :last] = ids[:-1]
        targets[row, :last] = ids[1:]
        masks["all"][row, first:last] = True
        masks["reasoning"][row, first:last] = torch.tensor(example.reasoning)
        masks["answer"][row, first:last] = torch.tensor(example.answer)
    return Batch(
        tuple(example.id for example in examples),
        input_ids,
        targets,
        masks["all"],
        masks["reasoning"],
        masks["answer"],
    )
