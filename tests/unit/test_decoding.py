"""A session adjusts each row by its own hooks, in as few calls as there are kinds of rows."""

import pytest
import torch

from azeotrope.decoding import DecodingHooks, DecodingRow, DecodingSession


class Add(DecodingHooks):
    """Adds a number to all logits and records its calls."""

    def __init__(self, number: float, dtype: torch.dtype = torch.float32) -> None:
        self.number, self.dtype = number, dtype
        self.calls: list[tuple[str, list[tuple[int, ...]]]] = []

    def add_rows(self, rows):
        self.calls.append(("add", [row.prompt for row in rows]))

    def adjust_rows(self, logits, rows):
        self.calls.append(("adjust", [row.prompt for row in rows]))
        return (logits + self.number).to(self.dtype)

    def drop_rows(self, rows):
        self.calls.append(("drop", [row.prompt for row in rows]))


def test_rows_that_share_hooks_are_handled_in_one_call() -> None:
    first, second = Add(1.0), Add(10.0)
    rows = [
        DecodingRow((0,), (first,)),
        DecodingRow((1,), (first, second)),
        DecodingRow((2,)),
        DecodingRow((3,), (first,)),
    ]
    session = DecodingSession()
    session.add(rows)
    adjusted = session.adjust(torch.zeros(4, 3), dict(enumerate(rows)))
    assert adjusted[:, 0].tolist() == [1.0, 11.0, 0.0, 1.0]
    session.drop(rows[:2])
    session.close()
    assert first.calls == [
        ("add", [(0,), (3,)]),
        ("add", [(1,)]),
        ("adjust", [(0,), (3,)]),
        ("adjust", [(1,)]),
        ("drop", [(0,)]),
        ("drop", [(1,)]),
        ("drop", [(3,)]),
    ]
    assert second.calls == [("add", [(1,)]), ("adjust", [(1,)]), ("drop", [(1,)])]
    assert session.rows == ()


def test_a_row_is_added_once_and_dropped_once() -> None:
    hook = Add(1.0)
    row = DecodingRow((0,), (hook,))
    session = DecodingSession()
    session.add([row, row])
    session.add([row])
    assert session.rows == (row,)
    session.drop([row, row])
    session.drop([row])
    assert hook.calls == [("add", [(0,)]), ("drop", [(0,)])]
    with pytest.raises(ValueError, match="was not added to the session, or left it"):
        session.adjust(torch.zeros(1, 2), {0: row})


@pytest.mark.parametrize("width", [1, 2])
def test_the_type_of_the_logits_stays(width: int) -> None:
    """Both where all rows share their hooks and where they do not."""
    row = DecodingRow((0,), (Add(0.5, torch.float64),))
    session = DecodingSession()
    session.add([row])
    adjusted = session.adjust(torch.zeros(width, 2), {0: row})
    assert adjusted.dtype == torch.float32
    assert adjusted[0].tolist() == [0.5, 0.5]


def test_banned_tokens_stay_banned_whatever_the_hooks_do() -> None:
    rows = {
        1: DecodingRow((0,), (Add(5.0),), banned=(0, 2)),
        2: DecodingRow((1,), banned=(1,)),
    }
    session = DecodingSession()
    session.add(rows.values())
    adjusted = session.adjust(torch.zeros(3, 3), rows)
    inf = torch.inf
    assert adjusted.tolist() == [[0, 0, 0], [-inf, 5, -inf], [0, -inf, 0]]
