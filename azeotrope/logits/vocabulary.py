"""Two tokenizers' vocabularies, matched by token string and never by index."""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from azeotrope.endings import end_pairs

LEAST_SHARED = 0.5
"""Smallest share of the teacher's tokens that a proxy must have."""


def token_rows(tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows of a head that belong to tokens; those beyond them pad it."""
    return 1 + max(tokenizer.get_vocab().values())


@dataclass(frozen=True)
class SharedVocabulary:
    """Tokens of both models: `teacher_ids[i]` and `proxy_ids[i]` are the same string."""

    teacher_ids: Int[Tensor, " shared"]
    proxy_ids: Int[Tensor, " shared"]
    to_proxy: Int[Tensor, " teacher_vocab"]
    """The proxy's id for each teacher id; its unknown token for strings that it lacks."""

    @property
    def is_identity(self) -> bool:
        """Every teacher token has the same id in the proxy."""
        return bool((self.teacher_ids == self.proxy_ids).all()) and len(self.teacher_ids) == len(
            self.to_proxy
        )


def share(
    teacher: PreTrainedTokenizerBase, proxy: PreTrainedTokenizerBase, *, proxy_name: str = "proxy"
) -> SharedVocabulary:
    """Match the vocabularies of a teacher and a proxy that reads the teacher's tokens.

    Rows that pad an embedding beyond the tokenizer's vocabulary belong to no string, so no match
    contains them. Special tokens of the same role (begin, end, padding) count as the same token
    even if their spelling differs.

    Raises:
        ValueError: if the proxy has less than half of the teacher's tokens. It could not read what
            the teacher writes, and its distribution would mean nothing.
    """
    theirs = dict(proxy.get_vocab())
    ours = dict(teacher.get_vocab())
    ends = end_pairs(teacher, proxy)
    theirs |= {
        str(teacher.convert_ids_to_tokens(end)): proxy_end for end, proxy_end in ends.items()
    }
    for role in ("bos_token", "pad_token", "unk_token"):
        spelling, proxy_spelling = getattr(teacher, role), getattr(proxy, role)
        if ours.get(spelling) in ends:
            continue
        if spelling is not None and proxy_spelling is not None and proxy_spelling in theirs:
            theirs = {**theirs, spelling: theirs[proxy_spelling]}
    pairs = sorted((index, theirs[token]) for token, index in ours.items() if token in theirs)
    if len(pairs) < LEAST_SHARED * len(ours):
        raise ValueError(
            f"{proxy_name} shares {len(pairs)} of the teacher's {len(ours)} tokens; a proxy must "
            f"know at least {LEAST_SHARED:.0%} of them. Use a proxy of the teacher's family"
        )
    fallback = proxy.unk_token_id if proxy.unk_token_id is not None else proxy.pad_token_id
    to_proxy = torch.full((max(ours.values()) + 1,), int(fallback or 0))  # type: ignore[arg-type]
    teacher_ids = torch.tensor([pair[0] for pair in pairs])
    proxy_ids = torch.tensor([pair[1] for pair in pairs])
    to_proxy[teacher_ids] = proxy_ids
    return SharedVocabulary(teacher_ids, proxy_ids, to_proxy)
