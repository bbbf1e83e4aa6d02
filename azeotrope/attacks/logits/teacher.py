"""The teacher as an attacker on logits meets it: hidden states of given texts, and a head."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from azeotrope.heads.features import Features
from azeotrope.logits.chunks import head_logits
from azeotrope.logits.vocabulary import token_rows


class TeacherHead:
    """The teacher's side of an attack: frozen hidden states and the head that is applied to them.

    Rows that pad the head beyond the tokenizer belong to no token, and are left out.

    Args:
        snapshot: weight and bias of an undefended head, for an attacker who has one.
        model: the whole defended teacher, for attacks that query it on texts of their own.

    Raises:
        ValueError: if the snapshot's head has another shape.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        weight: Float[Tensor, "vocab hidden"],
        bias: Float[Tensor, " vocab"] | None,
        features: Sequence[Features],
        *,
        snapshot: tuple[Tensor, Tensor | None] | None = None,
        model: PreTrainedModel | None = None,
    ) -> None:
        if snapshot is not None and snapshot[0].shape != weight.shape:
            raise ValueError(
                f"the snapshot's head is {tuple(snapshot[0].shape)} and the teacher's "
                f"{tuple(weight.shape)}; a snapshot is an earlier state of the same model"
            )
        self.tokenizer = tokenizer
        self.rows = min(len(weight), token_rows(tokenizer))
        self.weight, self.bias = _first_rows(weight, bias, self.rows)
        self.features = {text.id: text for text in features}
        self.snapshot = None if snapshot is None else _first_rows(*snapshot, self.rows)
        self.model = model

    def logits(self, hidden: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens vocab"]:
        return head_logits(hidden.float(), self.weight, self.bias)

    def pairs(self, count: int) -> tuple[Tensor, Tensor]:
        """Clean and defended logits of `count` positions, drawn at random from all texts.

        Raises:
            ValueError: if there is no snapshot, or there are fewer positions.
        """
        if self.snapshot is None:
            raise ValueError(
                "an inversion needs the head of an undefended snapshot; none was given"
            )
        rows = torch.cat([text.hidden for text in self.features.values()])
        if count > len(rows):
            raise ValueError(
                f"there are {len(rows)} positions to pair, but `pairs` asks for {count}"
            )
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
        hidden = rows[order[:count].to(rows.device)].to(self.weight.device).float()
        return head_logits(hidden, *self.snapshot), self.logits(hidden)


def _first_rows(weight: Tensor, bias: Tensor | None, rows: int) -> tuple[Tensor, Tensor | None]:
    return weight.detach().float()[:rows], None if bias is None else bias.detach().float()[:rows]
