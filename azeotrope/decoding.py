"""Change the next token's logits of rows that are being written, wherever they are written.

A row is one completion under way. Whatever changes its logits, a decoding defense for example, is a
`DecodingHooks`. Every engine drives the same `DecodingSession`: it adds a row with its prompt,
adjusts the row at every token, and drops the row when it ends for any reason. So hooks that keep
something for each row, such as the key-value cache of a model of their own, know when to begin and
when to stop.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor


class DecodingHooks:
    """What may change the logits of a row's next token; by default nothing does.

    Hooks that need the completions alone implement `adjust_logits`. Hooks that need the prompts, or
    that keep something for each row, implement `adjust_rows`, `add_rows` and `drop_rows` instead.

    Every row is added once, before it is first adjusted, and dropped once. Several rows at a time
    are added, adjusted or dropped in one call. Rows are compared by identity, so they can be keys
    of a dictionary.
    """

    def add_rows(self, rows: Sequence["DecodingRow"]) -> None:
        """Rows begin. A row may have a completion already: an engine paused it and resumes it."""

    def adjust_rows(
        self, logits: Float[Tensor, "rows vocab"], rows: Sequence["DecodingRow"]
    ) -> Float[Tensor, "rows vocab"]:
        """Change the next token's logits; the k-th logits are those of the k-th row.

        All open rows that write a token in this step are adjusted in one call, except that rows
        with other hooks beside these ones are adjusted in calls of their own. A row's completion
        is usually one token longer than in the call before. An engine that reads a prompt in parts
        may repeat a call for the same completion; it ignores what comes of the earlier ones.
        """
        return self.adjust_logits(logits, [row.written for row in rows])

    def drop_rows(self, rows: Sequence["DecodingRow"]) -> None:
        """Rows end: finished, cancelled, failed, or paused by the engine."""

    def adjust_logits(
        self, logits: Float[Tensor, "rows vocab"], prefixes: list[list[int]]
    ) -> Float[Tensor, "rows vocab"]:
        """Change the next token's logits, given each row's completion so far."""
        return logits


@dataclass(eq=False)
class DecodingRow:
    """One completion under way, as its hooks see it."""

    prompt: tuple[int, ...]
    hooks: tuple[DecodingHooks, ...] = ()
    """They act one after another. Rows with the same hooks are adjusted in one call."""
    banned: tuple[int, ...] = ()
    """Token ids that may not be written, whatever the hooks do."""
    written: list[int] = field(default_factory=list)
    """The completion so far, without the prompt; the same list from the first token to the last.
    It is complete whenever the row is adjusted; an engine may fill it in between."""
    temperature: float = 1.0
    """By which the sampler divides the logits after the hooks; 0 takes the most likely token."""


class DecodingSession:
    """The open rows of one engine."""

    def __init__(self) -> None:
        self._open: dict[DecodingRow, None] = {}

    @property
    def rows(self) -> tuple[DecodingRow, ...]:
        """The open rows, in the order in which they were added."""
        return tuple(self._open)

    def add(self, rows: Iterable[DecodingRow]) -> None:
        """Open rows; those that are open already stay as they are."""
        fresh = [row for row in dict.fromkeys(rows) if row not in self._open]
        self._open.update(dict.fromkeys(fresh))
        for hooks, indices in _by_hooks(dict(enumerate(fresh))).items():
            for hook in hooks:
                hook.add_rows([fresh[index] for index in indices])

    def adjust(
        self, logits: Float[Tensor, "rows vocab"], rows: Mapping[int, DecodingRow]
    ) -> Float[Tensor, "rows vocab"]:
        """Apply the hooks of each row, then ban its banned tokens.

        Args:
            logits: of the next tokens; they may be changed in place.
            rows: the row behind an index of `logits`. Logits of other indices stay as they are.

        Returns:
            Logits of the same shape and type.

        Raises:
            ValueError: if a row with hooks is not open.
        """
        for hooks, indices in _by_hooks(rows).items():
            members = [rows[index] for index in indices]
            if any(row not in self._open for row in members):
                raise ValueError("a row is adjusted that was not added to the session, or left it")
            if indices == list(range(len(logits))):
                # The usual case: all rows have the same hooks, and nothing need be copied.
                logits = _adjusted(hooks, logits, members).to(logits.dtype)
            else:
                at = torch.tensor(indices, device=logits.device)
                logits[at] = _adjusted(hooks, logits[at], members).to(logits.dtype)
        for index, row in rows.items():
            if row.banned:
                # Last, so that no hook can make a banned token possible again.
                logits[index, torch.tensor(row.banned, device=logits.device)] = -torch.inf
        return logits

    def drop(self, rows: Iterable[DecodingRow]) -> None:
        """Close rows; those that are not open are ignored."""
        closed = [row for row in dict.fromkeys(rows) if row in self._open]
        for row in closed:
            del self._open[row]
        for hooks, indices in _by_hooks(dict(enumerate(closed))).items():
            for hook in hooks:
                hook.drop_rows([closed[index] for index in indices])

    def close(self) -> None:
        """Close every row that is open."""
        self.drop(self.rows)


def _by_hooks(rows: Mapping[int, DecodingRow]) -> dict[tuple[DecodingHooks, ...], list[int]]:
    """Indices of the rows that share their hooks; rows without hooks are left out."""
    groups: dict[tuple[DecodingHooks, ...], list[int]] = {}
    for index, row in rows.items():
        if row.hooks:
            groups.setdefault(row.hooks, []).append(index)
    return groups


def _adjusted(
    hooks: Sequence[DecodingHooks], logits: Tensor, rows: Sequence[DecodingRow]
) -> Tensor:
    for hook in hooks:
        logits = hook.adjust_rows(logits, rows)
    return logits
