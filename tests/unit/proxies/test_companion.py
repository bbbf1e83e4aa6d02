"""Whatever order rows come and go in, a companion says what its model says of each row alone."""

import random

import pytest
import torch

from azeotrope import models
from azeotrope.decoding import DecodingRow
from azeotrope.proxies.companion import Companion
from azeotrope.row_cache import next_logits

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def model():
    return models.load("pocket/proxy-a").model


@pytest.fixture
def companion(model) -> Companion:
    return Companion(lambda inputs: next_logits(model, inputs), pad_id=0, device=model.device)


def alone(model, row: DecodingRow) -> torch.Tensor:
    ids = torch.tensor([[*row.prompt, *row.written]])
    with torch.no_grad():
        return model(input_ids=ids).logits[0, -1]


@pytest.mark.parametrize("seed", range(4))
@torch.no_grad()
def test_rows_join_grow_rest_and_leave_in_any_order(model, companion: Companion, seed: int) -> None:
    chance = random.Random(seed)
    rows: list[DecodingRow] = []
    for _ in range(25):
        if len(rows) < 6 and chance.random() < 0.6:
            prompt = tuple(chance.randrange(3, 60) for _ in range(chance.randrange(1, 9)))
            rows.append(DecodingRow(prompt, written=[5] * chance.randrange(3)))
        if rows and chance.random() < 0.2:
            gone = chance.choice(rows)
            rows.remove(gone)
            companion.drop([gone])
        asked = [row for row in rows if chance.random() < 0.8]
        chance.shuffle(asked)
        if not asked:
            continue
        said = companion.outputs(asked)
        for row, output in zip(asked, said, strict=True):
            assert torch.allclose(output, alone(model, row), atol=TOLERANCE)
        for row in rows:
            # Usually one token; sometimes none, or several at once.
            grown = chance.choice([0, 1, 1, 1, 1, 1, 2])
            row.written.extend(chance.randrange(3, 60) for _ in range(grown))


@torch.no_grad()
def test_a_step_reads_one_token_of_each_row(model) -> None:
    widths: list[tuple[int, ...]] = []

    def forward(inputs):
        widths.append(tuple(inputs["input_ids"].shape))
        return next_logits(model, inputs)

    companion = Companion(forward, pad_id=0, device=model.device)
    rows = [DecodingRow((5, 6, 7)), DecodingRow((8,))]
    for _ in range(3):
        companion.outputs(rows)
        for row in rows:
            row.written.append(9)
    companion.drop(rows[:1])
    companion.outputs(rows[1:])
    companion.outputs(rows[1:])
    assert widths == [(2, 3), (2, 1), (2, 1), (1, 1)]


@torch.no_grad()
def test_nothing_is_kept_of_rows_that_left(companion: Companion) -> None:
    rows = [DecodingRow((5, 6, 7)), DecodingRow((8,))]
    companion.outputs(rows)
    companion.drop(rows)
    companion.drop(rows)
    assert (companion._groups, companion._read, companion._outputs) == ([], {}, {})
