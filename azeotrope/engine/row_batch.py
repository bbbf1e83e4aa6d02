"""Continuous batching: rows join and leave between two steps of one batch.

A row writes what `generation.generate` would write for it alone, greedily or from its seed. The
batch is padded on the left, so its width is that of its longest row; no column is masked for all.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from azeotrope.defenses.base import Defense
from azeotrope.engine.protocol import EngineError, Finish, Token
from azeotrope.generation import choose, pad_left

Kept = list[tuple[Tensor, list[int]]]
"""Keys or values of one layer, and which of their rows stay."""


@dataclass(eq=False)
class Row:
    """One completion under way. The batch writes tokens into it; anyone may cancel it."""

    prompt: tuple[int, ...]
    limit: int
    """Tokens after which it ends."""
    temperature: float = 0.0
    top_p: float = 1.0
    draws: Sequence[float] = ()
    """A uniform number for each token, needed when the temperature is not 0."""
    logprobs: int | None = None
    banned: tuple[int, ...] = ()
    defenses: tuple[Defense, ...] = ()
    """Applied one after another. Rows that share the same ones are adjusted in one call."""
    written: list[int] = field(default_factory=list)
    outbox: deque[Token] = field(default_factory=deque)
    """What was written and not yet looked at."""
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


class SpareLayer(DynamicLayer):
    """Keys and values with spare columns behind them, so that a step copies only its own."""

    def __init__(self, keys: Kept, values: Kept, width: int) -> None:
        super().__init__()
        self._keys, self._values = _aligned(keys, width), _aligned(values, width)
        self.keys, self.values = self._keys[:, :, :width], self._values[:, :, :width]
        self.dtype, self.device = self._keys.dtype, self._keys.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: object, **_kwargs: object
    ) -> tuple[Tensor, Tensor]:
        width = self.get_seq_length()
        self._keys, self.keys = _append(self._keys, width, key_states)
        self._values, self.values = _append(self._values, width, value_states)
        return self.keys, self.values


def _with_spare(width: int) -> int:
    # In proportion, so that all copies together are a few times the final size.
    return width + width // 4 + 32


def _append(store: Tensor, width: int, fresh: Tensor) -> tuple[Tensor, Tensor]:
    end = width + fresh.shape[2]
    if end > store.shape[2]:
        rows, heads, _, size = store.shape
        grown = store.new_zeros(rows, heads, _with_spare(end), size)
        grown[:, :, :width] = store[:, :, :width]
        store = grown
    store[:, :, width:end] = fresh
    return store, store[:, :, :end]


def _aligned(kept: Kept, width: int) -> Tensor:
    """The rows that stay, one under another, their last columns at `width`."""
    first, _ = kept[0]
    rows = sum(len(indices) for _, indices in kept)
    # Zeros and not what memory holds: a masked column has weight 0, and 0 times NaN is NaN.
    store = first.new_zeros(rows, first.shape[1], _with_spare(width), first.shape[3])
    at = 0
    for tensor, indices in kept:
        part = tensor[:, :, max(tensor.shape[2] - width, 0) :]
        chosen = part[torch.tensor(indices, device=part.device)]
        store[at : at + len(indices), :, width - part.shape[2] : width] = chosen
        at += len(indices)
    return store


def check_model(model: PreTrainedModel) -> None:
    """Refuse models whose rows cannot be moved between batches.

    Raises:
        ValueError: if a layer keeps anything but keys and values of the whole context.
    """
    layers = DynamicCache(config=model.config).layers
    others = sorted({type(layer).__name__ for layer in layers if type(layer) is not DynamicLayer})
    if getattr(model, "_is_stateful", False):
        others.append("a state of the model's own")
    if others:
        raise ValueError(
            f"{type(model).__name__} keeps {', '.join(others)}; rows join and leave only where "
            "every layer has full attention (Llama, Qwen, OLMo 2): serve it with vLLM instead"
        )


class RowBatch:
    """Rows that advance together, a token each in a step."""

    def __init__(self, model: PreTrainedModel, *, eos_id: int | None, pad_id: int) -> None:
        check_model(model)
        self._model, self._eos, self._pad = model, eos_id, pad_id
        self._cache = DynamicCache()
        self._width = 0
        self.rows: list[Row] = []

    @torch.inference_mode()
    def step(self, joining: Sequence[Row] = ()) -> None:
        """Drop the rows that are done, let others join, and write one token in each.

        Defenses are asked once a step for all of their rows, those that join among them: one that
        keeps something for each row sees which are still there.
        """
        self._keep((), DynamicCache())
        parts: list[Tensor] = []
        if self.rows:
            parts.append(self._advance())
        fresh = DynamicCache(config=self._model.config)
        if joining:
            parts.append(self._prefill(joining, fresh))
        if parts:
            self._write([*self.rows, *joining], torch.cat(parts))
            self._keep(joining, fresh)

    def _prefill(self, joining: Sequence[Row], cache: DynamicCache) -> Float[Tensor, "rows vocab"]:
        ids, attention = pad_left([row.prompt for row in joining], self._pad, self._model.device)
        positions = (attention.cumsum(1) - 1).clamp(min=0)
        return self._logits(ids, attention, positions, cache)

    def _advance(self) -> Float[Tensor, "rows vocab"]:
        device = self._model.device
        self._width += 1
        ids = torch.tensor([[row.written[-1]] for row in self.rows], device=device)
        positions = torch.tensor([[row.cached] for row in self.rows], device=device)
        columns = torch.arange(self._width, device=device)
        attention = (columns >= self._width - 1 - positions).long()
        return self._logits(ids, attention, positions, self._cache)

    def _logits(
        self,
        ids: Int[Tensor, "rows fresh"],
        attention: Int[Tensor, "rows width"],
        positions: Int[Tensor, "rows fresh"],
        cache: DynamicCache,
    ) -> Float[Tensor, "rows vocab"]:
        output = self._model(
            input_ids=ids,
            attention_mask=attention,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1].float()

    def _keep(self, joining: Sequence[Row], fresh: DynamicCache) -> None:
        """Rows that are not done, in one cache that is as wide as the longest of them."""
        held = [index for index, row in enumerate(self.rows) if not row.is_done]
        new = [index for index, row in enumerate(joining) if not row.is_done]
        if len(held) == len(self.rows) and not new:
            return
        sources = [(self._cache, held), (fresh, new)]
        sources = [(cache, indices) for cache, indices in sources if indices]
        self.rows = [self.rows[index] for index in held] + [joining[index] for index in new]
        self._width = max((row.cached for row in self.rows), default=0)
        merged = DynamicCache()
        while sources and sources[0][0].layers:
            # Taken out of the old caches, so that one layer alone is in memory twice.
            layers: list[tuple[Any, list[int]]]
            layers = [(cache.layers.pop(0), indices) for cache, indices in sources]
            keys = [(layer.keys, indices) for layer, indices in layers]
            values = [(layer.values, indices) for layer, indices in layers]
            merged.layers.append(SpareLayer(keys, values, self._width))
        self._cache = merged

    def _write(self, rows: Sequence[Row], logits: Float[Tensor, "rows vocab"]) -> None:
        logits = _banned(rows, _defended(rows, logits))
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
        # The greatest is NaN if any is, and -inf if no token is left.
        usable = logits.max(-1).values.isfinite().tolist()
        shown = _shown(rows, logits, tokens)
        for index, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            if not usable[index]:
                row.error = EngineError(
                    f"token {steps[index]} of a row has no distribution: its logits hold NaN or "
                    "infinity, or leave no token; look at the model and its decoding defenses"
                )
            elif token == self._eos:
                row.finish = "stop"
            else:
                row.written.append(token)
                # The token first: who sees a reason to end must find all tokens there.
                row.outbox.append(shown.get(index) or Token(token))
                if len(row.written) == row.limit:
                    row.finish = "length"


def _defended(
    rows: Sequence[Row], logits: Float[Tensor, "rows vocab"]
) -> Float[Tensor, "rows vocab"]:
    groups: dict[tuple[Defense, ...], list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(row.defenses, []).append(index)
    groups.pop((), None)
    if groups:
        logits = logits.clone()
    for defenses, indices in groups.items():
        at = torch.tensor(indices, device=logits.device)
        adjusted = logits[at]
        for defense in defenses:
            adjusted = defense.adjust_logits(adjusted, [rows[index].written for index in indices])
        logits[at] = adjusted.float()
    return logits


def _banned(
    rows: Sequence[Row], logits: Float[Tensor, "rows vocab"]
) -> Float[Tensor, "rows vocab"]:
    if any(row.banned for row in rows):
        logits = logits.clone()
    for index, row in enumerate(rows):
        if row.banned:
            logits[index, list(row.banned)] = -torch.inf
    return logits


def _shown(
    rows: Sequence[Row], logits: Float[Tensor, "rows vocab"], tokens: Sequence[int]
) -> dict[int, Token]:
    """Tokens with their log-probabilities, of the rows that ask for them."""
    asked = {index: row.logprobs for index, row in enumerate(rows) if row.logprobs is not None}
    if not asked:
        return {}
    indices = list(asked)
    logs = logits[torch.tensor(indices, device=logits.device)].log_softmax(-1)
    values, ids = (part.tolist() for part in logs.topk(max(asked.values()), dim=-1))
    chosen = torch.tensor([[tokens[index]] for index in indices], device=logits.device)
    own = logs.gather(-1, chosen).squeeze(-1).tolist()
    found: dict[int, Token] = {}
    for place, (index, count) in enumerate(asked.items()):
        top = zip(ids[place][:count], values[place][:count], strict=True)
        # A banned token has no finite logarithm, and is not among the likeliest.
        pairs = tuple((id, value) for id, value in top if value > -torch.inf)
        found[index] = Token(tokens[index], own[place], pairs)
    return found
