"""AlphaNet: its values and its published gradient, which is not the derivative of the value."""

import pytest
import torch
from distributions import UNCLIPPED, calm, distribution
from hypothesis import given
from torch import Tensor

from azeotrope.logits.divergences import alpha, alphanet


def test_a_clipped_alphanet_may_be_negative() -> None:
    p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.9, 0.1]).log()
    assert alphanet(p, q, low=2.0, high=3.0, clip=1e6).item() > 0
    # Weights (25/81, min(25, 1.5)) at 2 and (0.17, 1.5) at 3; the larger value is that at 3.
    expected = (0.9 * ((5 / 9) ** 3 - 1) + 0.1 * 0.5) / 6
    assert alphanet(p, q, low=2.0, high=3.0, clip=1.5).item() == pytest.approx(expected, rel=1e-5)
    assert expected < 0


def published_alphanet_gradient(
    p: Tensor, q: Tensor, low: float, high: float, clip: float
) -> list[tuple[Tensor, Tensor]]:
    """Each alpha's value and gradient with respect to log q, as the paper's code states them."""
    found = []
    for a in (low, high):
        ratio = p / q
        if a == 0:
            ratio = ratio.clamp(max=clip)
            found.append(((q * -ratio.log()).sum(), -q * (ratio.log() - 1)))
        elif a == 1:
            found.append(((q * ratio * ratio.log()).sum(), -q * ratio))
        else:
            weight, base = (ratio**a).clamp(max=clip), 1 / (a * (a - 1))
            value = (q * (weight / (a * (a - 1)) - base)).sum()
            found.append((value, -q * (weight / a + base)))
    return found


@pytest.mark.parametrize(
    ("low", "high", "clip"),
    [(-1.0, 1.0, 5.0), (-1.0, 1.0, 1.1), (0.0, 1.0, 1.5), (-2.0, 0.0, 5.0), (0.2, 0.9, 1.2),
     (0.5, 2.0, 3.0)],
)  # fmt: skip
@given(one=calm, other=calm)
def test_alphanets_gradient_is_the_published_one(
    low: float, high: float, clip: float, one: list[float], other: list[float]
) -> None:
    p, q = distribution(one), distribution(other).requires_grad_()
    value = alphanet(p, q, low, high, clip)
    (found,) = torch.autograd.grad(value, q)
    pair = published_alphanet_gradient(p.exp(), q.detach().exp(), low, high, clip)
    larger, gradient = max(pair, key=lambda item: item[0].item())
    assert value.item() == pytest.approx(larger.item(), rel=1e-9, abs=1e-12)
    if abs(pair[0][0] - pair[1][0]) > 1e-9:  # in a tie either of the two may be taken
        torch.testing.assert_close(found, gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (0.2, 0.9), (0.0, 0.5), (-0.5, 2.0)])
@given(one=calm, other=calm)
def test_without_clipping_alphanet_is_the_larger_alpha_divergence(
    low: float, high: float, one: list[float], other: list[float]
) -> None:
    p = distribution(one)
    z = torch.tensor(other, dtype=torch.float64, requires_grad=True)
    pair = [alpha(p, z.log_softmax(-1), a) for a in (low, high)]
    larger = max(pair, key=lambda value: value.item())
    found = UNCLIPPED(p, z.log_softmax(-1), low, high)
    torch.testing.assert_close(found, larger, rtol=1e-8, atol=1e-10)
    if abs(pair[0] - pair[1]) > 1e-9:
        (wanted,) = torch.autograd.grad(larger, z)
        (gradient,) = torch.autograd.grad(found, z)
        torch.testing.assert_close(gradient, wanted, rtol=1e-7, atol=1e-9)


def test_alphanet_decides_at_each_position() -> None:
    # At -1 for a student that says what the teacher would not, at 1 for one that says too little.
    rows = torch.tensor([[0.98, 0.02], [0.5, 0.5]]).log()
    log_p, log_q = rows, rows.flip(0)
    found = alphanet(log_p, log_q, clip=1e9)
    each = torch.stack([alpha(log_p, log_q, a) for a in (-1.0, 1.0)])
    assert each.argmax(0).tolist() == [0, 1] or each.argmax(0).tolist() == [1, 0]
    torch.testing.assert_close(found, each.max(0).values)
    assert found.sum() > each.sum(1).max()
