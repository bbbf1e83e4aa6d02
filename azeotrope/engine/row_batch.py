"""Continuous batching: rows join and leave between two steps of one batch.

A row writes what `generation.generate` would write for it alone, greedily or from its seed. The
batch is padded on the left, and it is as wide as its longest row.
"""

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import KW_ONLY, dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from azeotrope.decoding import DecodingRow, DecodingSession
from azeotrope.engine.protocol import EngineError, Finish, Token
from azeotrope.generation import choose
from azeotrope.row_cache import PaddedRows, check_model, forward_inputs, merged, next_logits


@dataclass(eq=False)
class BatchRow(DecodingRow):
    """One completion under way. The batch writes tokens into it; any thread may cancel it.

    A row has ended as soon as `finish`, `error` or `cancelled` is set.
    """

    _: KW_ONLY
    limit: int
    """The number of tokens after which it ends."""
    temperature: float = 0.0
    top_p: float = 1.0
    draws: Sequence[float] = ()
    """A uniform number in [0, 1) for each token; needed when the temperature is not 0."""
    logprobs: int | None = None
    """How many of the likeliest tokens to report beside the one written; None reports nothing."""
    outbox: deque[Token] = field(default_factory=deque)
    """Tokens that were written and not yet read by the consumer."""
    finish: Finish | None = None
    error: EngineError | None = None
    cancelled: bool = False

    @property
    def is_done(self) -> bool:
        return self.finish is not None or self.error is not None or self.cancelled

    @property
    def cached(self) -> int:
        """Tokens whose keys and values are in the cache: all but the last one written."""
        return len(self.prompt) + len(self.written) - 1


class RowBatch:
    """Rows that advance together, one token each per step."""

    def __init__(self, model: PreTrainedModel, *, end_ids: Collection[int], pad_id: int) -> None:
        """
        Raises:
            ValueError: if rows of this model cannot be moved between batches.
        """
        check_model(model)
        self._model, self._ends, self._pad = model, frozenset(end_ids), pad_id
        self._session = DecodingSession()
        self._cache = DynamicCache()
        self._width = 0
        self.rows: list[BatchRow] = []

    @torch.inference_mode()
    def step(self, joining: Sequence[BatchRow] = ()) -> None:
        """Drop the rows that are done, let new ones join, and write one token in each.

        Hooks are called once per step for all of their rows, new ones included.
        """
        self._keep((), DynamicCache())
        self._session.add(joining)
        parts: list[Tensor] = []
        if self.rows:
            parts.append(self._advance())
        fresh = DynamicCache()
        if joining:
            starts = [row.prompt for row in joining]
            prompts = PaddedRows(self._model, starts, self._pad, keeps_all=True)
            fresh = prompts.cache
            parts.append(next_logits(self._model, prompts.inputs()))
        if parts:
            self._write([*self.rows, *joining], torch.cat(parts))
            self._keep(joining, fresh)

    def close(self) -> None:
        """Drop every row, whether it is done or not."""
        self._session.close()
        self.rows, self._cache, self._width = [], DynamicCache(), 0

    def _advance(self) -> Float[Tensor, "rows vocab"]:
        device = self._model.device
        self._width += 1
        ids = torch.tensor([[row.written[-1]] for row in self.rows], device=device)
        positions = torch.tensor([[row.cached] for row in self.rows], device=device)
        # A row's tokens are in its last `cached` columns and in the new one.
        columns = torch.arange(self._width, device=device)
        attention = (columns >= self._width - 1 - positions).long()
        return next_logits(self._model, forward_inputs(ids, attention, positions, self._cache))

    def _keep(self, joining: Sequence[BatchRow], fresh: DynamicCache) -> None:
        """Keep the rows that are not done, in one cache that is as wide as the longest of them."""
        kept = [index for index, row in enumerate(self.rows) if not row.is_done]
        joined = [index for index, row in enumerate(joining) if not row.is_done]
        rows = [self.rows[index] for index in kept] + [joining[index] for index in joined]
        # Another thread may cancel a row at any time, so `is_done` is read only once for each.
        staying = set(rows)
        self._session.drop(row for row in (*self.rows, *joining) if row not in staying)
        if len(kept) == len(self.rows) and not joined:
            return
        self.rows = rows
        # Columns that no row of the batch uses any more are cut off.
        self._width = max((row.cached for row in self.rows), default=0)
        self._cache = merged([(self._cache, kept), (fresh, joined)], self._width)

    def _write(self, rows: Sequence[BatchRow], logits: Float[Tensor, "rows vocab"]) -> None:
        logits = self._session.adjust(logits, dict(enumerate(rows)))
        steps = [len(row.written) for row in rows]
        tokens = choose(
            logits,
            torch.tensor([row.temperature for row in rows], dtype=torch.float64),
            torch.tensor([row.top_p for row in rows], dtype=torch.float64),
            torch.tensor(
                [
                    row.draws[step] if row.temperature > 0 else 0.0
                    for row, step in zip(rows, steps, strict=True)
                ],
                dtype=torch.float64,
            ),
        ).tolist()
        # The maximum is NaN if any logit is NaN, and -inf if no token is possible.
        usable = logits.max(-1).values.isfinite().tolist()
        reported = _reported(rows, logits, tokens)
        for index, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            if not usable[index]:
                row.error = EngineError(
                    f"token {steps[index]} of a row has no distribution: its logits hold NaN or "
                    "infinity, or leave no token; look at the model and its decoding defenses"
                )
            elif token in self._ends:
                row.finish = "stop"
            else:
                row.written.append(token)
                # The token first: a consumer that sees the row's end must see all of its tokens.
                row.outbox.append(reported.get(index) or Token(token))
                if len(row.written) == row.limit:
                    row.finish = "length"


def _reported(
    rows: Sequence[BatchRow], logits: Float[Tensor, "rows vocab"], tokens: Sequence[int]
) -> dict[int, Token]:
    """Tokens with log-probabilities, in nats, by the index of the rows that ask for them."""
    counts = {index: row.logprobs for index, row in enumerate(rows) if row.logprobs is not None}
    if not counts:
        return {}
    indices = list(counts)
    log_p = logits[torch.tensor(indices, device=logits.device)].log_softmax(-1)
    values, ids = (part.tolist() for part in log_p.topk(max(counts.values()), dim=-1))
    chosen = torch.tensor([[tokens[index]] for index in indices], device=logits.device)
    own = log_p.gather(-1, chosen).squeeze(-1).tolist()
    reported: dict[int, Token] = {}
    for position, (index, count) in enumerate(counts.items()):
        likeliest = zip(ids[position][:count], values[position][:count], strict=True)
        # A banned token has the log-probability -inf and is not reported.
        top = tuple((id, value) for id, value in likeliest if value > -torch.inf)
        reported[index] = Token(tokens[index], own[position], top)
    return reported
