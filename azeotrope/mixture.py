"""Write with one model while another one reads along and decides a share of every token.

    m(v) = share p(v) + (1 - share) q(v)

q is the model that writes (`generation.generate`), p the partner. The partner has a key-value
cache of its own, so a step costs one token of each model.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from azeotrope.decoding import DecodingHooks, DecodingRow
from azeotrope.row_cache import PaddedRows


class Mixture(DecodingHooks):
    """Changes the writer's logits to log m. Reads one batch of rows at a time.

    Args:
        partner: a causal model with the writer's tokens.
        head: the partner's logits from its last hidden states, without rows that pad its head; the
            same number of the writer's logits is used.
        share: of the partner, below 1.
        temperature: of both distributions.
    """

    def __init__(
        self,
        partner: PreTrainedModel,
        head: Callable[[Tensor], Tensor],
        *,
        share: float,
        temperature: float = 1.0,
        pad_id: int = 0,
    ) -> None:
        self.partner, self.head, self.pad_id = partner, head, pad_id
        self.share, self.temperature = torch.tensor(share, dtype=torch.float64), temperature
        self._rows: list[DecodingRow] = []
        self._batch: PaddedRows | None = None
        self._has_read = False

    def add_rows(self, rows: Sequence[DecodingRow]) -> None:
        """Begin to read along.

        Raises:
            ValueError: if earlier rows are still open.
        """
        if self._rows:
            raise ValueError(
                f"the mixture reads one batch at a time, and {len(self._rows)} rows of the last "
                "one are open; use another mixture for the new rows"
            )
        self._rows, self._has_read = list(rows), False
        prompts = [(*row.prompt, *row.written) for row in rows]
        self._batch = PaddedRows(self.partner, prompts, self.pad_id)

    def adjust_rows(
        self, logits: Float[Tensor, "rows vocab"], rows: Sequence[DecodingRow]
    ) -> Float[Tensor, "rows vocab"]:
        """The logarithm of the mixture; -inf at tokens that the partner's head does not have.

        Raises:
            ValueError: if the rows are not all open rows, in the order in which they were added.
        """
        if list(rows) != self._rows:
            raise ValueError(f"{len(rows)} rows are adjusted, but {len(self._rows)} are open")
        partner_logits = self._read().to(logits)
        tokens = partner_logits.shape[-1]
        log_q, log_p = (
            (x / self.temperature).log_softmax(-1) for x in (logits[:, :tokens], partner_logits)
        )
        log_rest, log_share = (x.log().item() for x in (1 - self.share, self.share))
        mixed = torch.logaddexp(log_q + log_rest, log_p + log_share)
        return F.pad(mixed, (0, logits.shape[-1] - tokens), value=-torch.inf)

    def drop_rows(self, rows: Sequence[DecodingRow]) -> None:
        """Stop reading rows; the memory of the last one is freed."""
        ended = set(rows)
        kept = [index for index, row in enumerate(self._rows) if row not in ended]
        self._rows = [self._rows[index] for index in kept]
        if not kept:
            self._batch = None
        elif self._batch is not None:
            self._batch.keep(kept)

    def _read(self) -> Tensor:
        """The partner's logits after each row's completion so far."""
        assert self._batch is not None
        if self._has_read:
            self._batch.append([row.written[-1] for row in self._rows])
        self._has_read = True
        states = self.partner.base_model(**self._batch.inputs())
        return self.head(states.last_hidden_state[:, -1])
