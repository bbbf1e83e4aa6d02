"""Rows of different lengths in one forward pass: padding, positions, attention and caches.

Batches are padded on the left, so that every row's last token is in the last column.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

Source = tuple[DynamicCache, list[int]]
"""A cache, and which of its rows are kept."""
_Part = tuple[Tensor, list[int]]
"""Keys or values of one layer, and which of their rows are kept."""


def pad_left(
    prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> tuple[Int[Tensor, "rows width"], Int[Tensor, "rows width"]]:
    """Token ids with the padding in front, and a mask that is 0 at the padding and 1 elsewhere."""
    width = max(len(prompt) for prompt in prompts)
    input_ids = torch.full((len(prompts), width), pad_id, dtype=torch.long)
    attention = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = torch.tensor(list(prompt))
        attention[row, width - len(prompt) :] = 1
    return input_ids.to(device), attention.to(device)


def forward_inputs(
    ids: Int[Tensor, "rows fresh"],
    attention: Int[Tensor, "rows width"],
    positions: Int[Tensor, "rows fresh"],
    cache: DynamicCache,
) -> dict[str, Any]:
    """The arguments of a forward pass that reads `ids` and appends them to the cache.

    Args:
        attention: 1 for each column that a row attends to, cached or fresh.
        positions: of the fresh tokens, in tokens from the start of the row.
    """
    return {
        "input_ids": ids,
        "attention_mask": attention,
        "position_ids": positions,
        "past_key_values": cache,
        "use_cache": True,
    }


def next_logits(model: PreTrainedModel, inputs: dict[str, Any]) -> Float[Tensor, "rows vocab"]:
    """The logits of every row's next token, in float32."""
    return model(**inputs, logits_to_keep=1).logits[:, -1].float()


class PaddedRows:
    """Rows that begin together and leave one by one.

    The width stays that of the longest row, even when that row leaves: which columns a sum runs
    over decides the last bits of the logits.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        pad_id: int,
        *,
        keeps_all: bool = False,
    ) -> None:
        """
        Args:
            keeps_all: layers with a sliding window keep what has left the window too, so that
                rows can be moved between batches. Attention masks still leave it out.
        """
        self._ids, self._attention = pad_left(prompts, pad_id, model.device)
        self._positions = (self._attention.cumsum(1) - 1).clamp(min=0)
        self.cache = DynamicCache() if keeps_all else DynamicCache(config=model.config)

    def inputs(self) -> dict[str, Any]:
        """The arguments of the next forward pass, which reads what the cache does not have yet."""
        return forward_inputs(self._ids, self._attention, self._positions, self.cache)

    def keep(self, indices: Sequence[int]) -> None:
        """Remove all rows but these."""
        kept = torch.tensor(indices, dtype=torch.long, device=self._ids.device)
        self.cache.batch_select_indices(kept)
        self._ids, self._attention = self._ids[kept], self._attention[kept]
        self._positions = self._positions[kept]

    def append(self, tokens: Sequence[int]) -> None:
        """Give every row one more token, for the next forward pass to read."""
        device = self._ids.device
        self._ids = torch.tensor([[token] for token in tokens], device=device)
        self._attention = torch.cat(
            [self._attention, self._attention.new_ones(len(tokens), 1)], dim=1
        )
        self._positions = self._positions[:, -1:] + 1


class SpareLayer(DynamicLayer):
    """Keys and values with spare columns behind them, so that a step copies only its own."""

    def __init__(self, keys: Sequence[_Part], values: Sequence[_Part], width: int) -> None:
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


def merged(sources: Sequence[Source], width: int) -> DynamicCache:
    """One cache for the kept rows of several, `width` columns wide.

    The sources are used up: their layers are taken out one by one, so that only one layer at a
    time is in memory twice.
    """
    sources = [(cache, indices) for cache, indices in sources if indices]
    result = DynamicCache()
    while sources and sources[0][0].layers:
        layers: list[tuple[Any, list[int]]]
        layers = [(cache.layers.pop(0), indices) for cache, indices in sources]
        keys = [(layer.keys, indices) for layer, indices in layers]
        values = [(layer.values, indices) for layer, indices in layers]
        result.layers.append(SpareLayer(keys, values, width))
    return result


def check_model(model: PreTrainedModel) -> None:
    """Refuse models whose rows cannot be moved between batches.

    Raises:
        ValueError: if a layer keeps anything but keys and values.
    """
    kinds = {type(layer) for layer in DynamicCache(config=model.config).layers}
    states = sorted(kind.__name__ for kind in kinds - {DynamicLayer, DynamicSlidingWindowLayer})
    if getattr(model, "_is_stateful", False):
        states.append("a state of the model's own")
    if states:
        raise ValueError(
            f"{type(model).__name__} keeps {', '.join(states)}; rows join and leave only where "
            "every layer keeps keys and values (Llama, Qwen, Gemma): serve it with vLLM instead"
        )


def check_leaving(model: PreTrainedModel) -> None:
    """Refuse models whose rows cannot leave a batch when they have ended.

    Raises:
        ValueError: if a layer keeps a state that is not kept row by row, or keeps it in itself.
    """
    layers = DynamicCache(config=model.config).layers
    stuck = {type(layer).__name__ for layer in layers if not hasattr(layer, "batch_select_indices")}
    attends = {type(layer) for layer in layers} <= {DynamicLayer, DynamicSlidingWindowLayer}
    if getattr(model, "_is_stateful", False) and attends:
        # The cache knows of no states, so they are elsewhere, where padding would enter them.
        stuck.add("a state outside of the cache")
    if stuck:
        raise ValueError(
            f"{type(model).__name__} keeps {', '.join(sorted(stuck))}, from which finished rows "
            "cannot be taken out; take a model with attention in every layer"
        )


def _with_spare(width: int) -> int:
    # In proportion to the width, so that all copies together are a few times the final size.
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


def _aligned(parts: Sequence[_Part], width: int) -> Tensor:
    """The kept rows of all parts, one below another, with their last columns at `width`."""
    first, _ = parts[0]
    rows = sum(len(indices) for _, indices in parts)
    # Zeros and not uninitialised memory: a masked column has weight 0, and 0 times NaN is NaN.
    store = first.new_zeros(rows, first.shape[1], _with_spare(width), first.shape[3])
    start = 0
    for tensor, indices in parts:
        columns = tensor[:, :, max(tensor.shape[2] - width, 0) :]
        kept = columns[torch.tensor(indices, device=columns.device)]
        store[start : start + len(indices), :, width - columns.shape[2] : width] = kept
        start += len(indices)
    return store
