"""Write with one model while another reads along and has a share in what comes next.

    m(v) = share p(v) + (1 - share) q(v)

q is the model that writes (`generation.generate`), p the partner. The partner has a key-value
cache of its own, so a step costs one token of each.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from azeotrope.generation import pad_left


class Mixture:
    """An adjustment of the writer's logits to log m, for one call of `generate`.

    Args:
        partner: a causal model with the writer's tokens.
        head: the partner's logits from its last hidden states, without rows that pad its head; as
            many of the writer's are taken.
        prompts: what the writer is given, row by row.
        share: of the partner, below 1.
        temperature: of both distributions.
    """

    def __init__(
        self,
        partner: PreTrainedModel,
        head: Callable[[Tensor], Tensor],
        prompts: Sequence[Sequence[int]],
        *,
        share: float,
        temperature: float = 1.0,
        pad_id: int = 0,
    ) -> None:
        self.partner, self.head = partner, head
        self.share, self.temperature = torch.tensor(share, dtype=torch.float64), temperature
        self.ids, self.attention = pad_left(prompts, pad_id, partner.device)
        self.positions = (self.attention.cumsum(1) - 1).clamp(min=0)
        self.cache = DynamicCache(config=partner.config)
        self.rows: list[list[int]] = []

    def __call__(
        self, logits: Float[Tensor, "rows vocab"], prefixes: list[list[int]]
    ) -> Float[Tensor, "rows vocab"]:
        theirs = self._read(prefixes).to(logits)
        rows = theirs.shape[-1]
        log_q, log_p = ((x / self.temperature).log_softmax(-1) for x in (logits[:, :rows], theirs))
        ours, other = (x.log().item() for x in (1 - self.share, self.share))
        mixed = torch.logaddexp(log_q + ours, log_p + other)
        return F.pad(mixed, (0, logits.shape[-1] - rows), value=-torch.inf)

    def _read(self, prefixes: list[list[int]]) -> Tensor:
        """The partner's logits after each row's completion so far."""
        if self.rows:
            there = {id(row) for row in prefixes}
            left = [index for index, row in enumerate(self.rows) if id(row) in there]
            kept = torch.tensor(left, device=self.ids.device)
            self.cache.batch_select_indices(kept)
            self.ids = torch.tensor([[row[-1]] for row in prefixes], device=self.ids.device)
            self.attention = F.pad(self.attention[kept], (0, 1), value=1)
            self.positions = self.positions[kept, -1:] + 1
        self.rows = list(prefixes)
        states = self.partner.base_model(
            input_ids=self.ids,
            attention_mask=self.attention,
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        return self.head(states.last_hidden_state[:, -1])
