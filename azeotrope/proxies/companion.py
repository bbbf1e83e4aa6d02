"""A model that reads along with every open row, whatever order rows join and leave in."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache

from azeotrope.decoding import DecodingRow
from azeotrope.row_cache import forward_inputs, merged, pad_left

Forward = Callable[[dict[str, Any]], Float[Tensor, "rows numbers"]]
"""Reads token ids, appends to the key-value cache among its arguments, and returns what the model
says at each row's last token. The arguments are those of `row_cache.forward_inputs`."""


@dataclass(eq=False)
class _Group:
    """Rows in one cache, which is padded on the left and as wide as its longest row."""

    rows: list[DecodingRow]
    lengths: list[int]
    """Tokens of each row that are in the cache."""
    cache: DynamicCache
    width: int


class Companion:
    """Keeps a key-value cache for every row, so that a step costs one token of the model a row.

    Rows need not be added: a row is read from its start when it is first asked for, and again if
    it grew by more than one token since. A row that has not grown costs nothing.
    """

    def __init__(self, forward: Forward, *, pad_id: int, device: torch.device) -> None:
        self._forward, self._pad, self._device = forward, pad_id, device
        self._groups: list[_Group] = []
        self._read: dict[DecodingRow, int] = {}
        self._outputs: dict[DecodingRow, Tensor] = {}

    def outputs(self, rows: Sequence[DecodingRow]) -> Float[Tensor, "rows numbers"]:
        """What the model says after the prompt and the completion so far of each row."""
        stepping = [row for row in rows if _length(row) - self._read.get(row, 0) == 1]
        unknown = [row for row in rows if row not in self._read]
        grown = [row for row in rows if _length(row) - self._read.get(row, 0) > 1]
        fresh = list(dict.fromkeys([*unknown, *grown]))
        stepping = [row for row in stepping if row in self._read]
        self.drop([row for row in fresh if row in self._read])
        parts: list[_Group] = []
        if stepping:
            parts.append(self._advance(self._taken(stepping)))
        if fresh:
            parts.append(self._begin(fresh))
        if parts:
            self._groups.append(parts[0] if len(parts) == 1 else _joined(parts))
        return torch.stack([self._outputs[row] for row in rows])

    def drop(self, rows: Sequence[DecodingRow]) -> None:
        """Forget rows; those that were never read are ignored."""
        gone = {row for row in rows if row in self._read}
        if not gone:
            return
        for row in gone:
            del self._read[row], self._outputs[row]
        kept = [
            _selected(group, [row for row in group.rows if row not in gone])
            for group in self._groups
        ]
        self._groups = [group for group in kept if group.rows]

    def _begin(self, rows: list[DecodingRow]) -> _Group:
        texts = [(*row.prompt, *row.written) for row in rows]
        ids, attention = pad_left(texts, self._pad, self._device)
        positions = (attention.cumsum(1) - 1).clamp(min=0)
        group = _Group(rows, [len(text) for text in texts], DynamicCache(), ids.shape[1])
        self._store(rows, self._forward(forward_inputs(ids, attention, positions, group.cache)))
        return group

    def _advance(self, group: _Group) -> _Group:
        group.width += 1
        ids = torch.tensor([[row.written[-1]] for row in group.rows], device=self._device)
        positions = torch.tensor([[length] for length in group.lengths], device=self._device)
        columns = torch.arange(group.width, device=self._device)
        attention = (columns >= group.width - 1 - positions).long()
        inputs = forward_inputs(ids, attention, positions, group.cache)
        group.lengths = [length + 1 for length in group.lengths]
        self._store(group.rows, self._forward(inputs))
        return group

    def _store(self, rows: Sequence[DecodingRow], outputs: Tensor) -> None:
        for row, output in zip(rows, outputs, strict=True):
            self._outputs[row], self._read[row] = output, _length(row)

    def _taken(self, rows: Sequence[DecodingRow]) -> _Group:
        """Take rows out of their groups, into one group of their own."""
        wanted = set(rows)
        parts: list[_Group] = []
        rest: list[_Group] = []
        for group in self._groups:
            inside = [row for row in group.rows if row in wanted]
            if len(inside) == len(group.rows):
                parts.append(group)
            elif inside:
                parts.append(_selected(group, inside))
                rest.append(_selected(group, [row for row in group.rows if row not in wanted]))
            else:
                rest.append(group)
        self._groups = rest
        return parts[0] if len(parts) == 1 else _joined(parts)


def _length(row: DecodingRow) -> int:
    return len(row.prompt) + len(row.written)


def _selected(group: _Group, rows: list[DecodingRow]) -> _Group:
    """A group of some of the rows; the cache is copied unless all of them stay."""
    if len(rows) == len(group.rows):
        return group
    return _joined([group], {id(group): [group.rows.index(row) for row in rows]})


def _joined(groups: Sequence[_Group], chosen: dict[int, list[int]] | None = None) -> _Group:
    """One group of the chosen rows of several; by default all of them."""
    indices = [(chosen or {}).get(id(group), list(range(len(group.rows)))) for group in groups]
    pairs = [(group, index) for group, kept in zip(groups, indices, strict=True) for index in kept]
    rows = [group.rows[index] for group, index in pairs]
    lengths = [group.lengths[index] for group, index in pairs]
    width = max(lengths, default=0)
    sources = []
    for group, kept in zip(groups, indices, strict=True):
        # `merged` uses its sources up, and a group may be selected from twice.
        copy = DynamicCache()
        copy.layers = list(group.cache.layers)
        sources.append((copy, kept))
    return _Group(rows, lengths, merged(sources, width), width)
