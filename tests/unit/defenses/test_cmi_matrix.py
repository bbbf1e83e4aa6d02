"""The matrix that CMI trains: folded, padded and drawn."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cmi_cases import (
    HIDDEN,
    RANK,
    ROWS,
    difference,
    drawn,
    gradient,
    turned,
)
from torch import Tensor

from azeotrope import models
from azeotrope.defenses.cmi import Cmi, Config
from azeotrope.heads.export import head_from
from azeotrope.heads.features import join
from azeotrope.heads.head import Head
from azeotrope.logits.chunks import head_logits


@pytest.mark.parametrize("parametrisation", ["logits", "head"])
@pytest.mark.parametrize("bias", [False, True])
def test_the_folded_head_gives_the_same_logits(
    bias: bool, parametrisation: str, teacher: models.Loaded, case: Callable
) -> None:
    states = join(case("last")[1]).teacher
    weight = head_from(teacher).weight
    head = Head(weight, drawn(7, ROWS) if bias else None)
    cmi = Cmi(Config(rank=RANK, parametrisation=parametrisation))
    made = turned(cmi, head)
    folded = made.folded()
    with torch.no_grad():
        expected = made.logits(states)
        assert (expected - made.clean_logits(states)).abs().max() > 0.5
        actual = head_logits(states, folded.weight, folded.bias)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
    assert (folded.bias is None) == (not bias)
    assert folded.weight.shape == weight.shape
    # Only the two factors are trained, and folding does not change what is folded.
    assert {name for name, _ in made.named_parameters()} == {"up", "down"}
    assert torch.equal(made.weight, weight)


@pytest.mark.parametrize("parametrisation", ["logits", "head"])
@pytest.mark.parametrize("method", ["closed_form", "double_backward"])
def test_rows_that_pad_the_head_are_inert(
    method: str, parametrisation: str, teacher: models.Loaded, case: Callable
) -> None:
    surrogates, pairs = case("last")
    batch, plain = join(pairs), Head(head_from(teacher).weight, drawn(7, ROWS))
    padding = 40 * drawn(8, 7, HIDDEN), 40 * drawn(9, 7)
    padded = Head(torch.cat([plain.weight, padding[0]]), torch.cat([plain.bias, padding[1]]))
    cmi = Cmi(Config(layer="last", rank=RANK, method=method, parametrisation=parametrisation))
    unpadded_head, padded_head = turned(cmi, plain), turned(cmi, padded)
    assert unpadded_head.up.shape == padded_head.up.shape == (ROWS, RANK)
    expected = gradient(cmi, unpadded_head, surrogates, batch)
    actual = gradient(cmi, padded_head, surrogates, batch)
    assert actual[0] == pytest.approx(expected[0], rel=1e-6)
    assert difference(actual[1], expected[1]) < 1e-5
    folded = padded_head.folded()
    assert torch.equal(folded.weight[ROWS:], padding[0])
    assert torch.equal(folded.bias[ROWS:], padding[1])
    torch.testing.assert_close(folded.weight[:ROWS], unpadded_head.folded().weight)
    torch.testing.assert_close(folded.bias[:ROWS], unpadded_head.folded().bias)
    assert not torch.equal(folded.weight[:ROWS], plain.weight)


def test_the_seed_decides_the_matrix_and_the_scale_its_size(teacher: models.Loaded) -> None:
    head = head_from(teacher)

    def down(**settings: Any) -> Tensor:
        return Cmi(Config(**settings)).parametrise(head, head, ROWS).down.detach()

    assert torch.equal(down(seed=3), down(seed=3))
    assert not torch.equal(down(seed=3), down(seed=4))
    torch.testing.assert_close(down(scale=6.0), 2 * down(scale=3.0))
    assert float(down(rank=128).std()) == pytest.approx(3.0 / ROWS**0.5, rel=0.05)
    wide = down(rank=128, parametrisation="head")
    assert wide.shape == (128, HIDDEN)
    assert float(wide.std()) == pytest.approx(3.0 / HIDDEN**0.5, rel=0.05)
