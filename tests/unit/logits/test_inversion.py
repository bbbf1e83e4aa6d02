"""A secret matrix on the logits, and what pairs of clean and defended logits make of it."""

import pytest
import torch
from torch import Tensor

from azeotrope.logits import divergences
from azeotrope.logits.inversion import fit_inversion

VOCAB, HIDDEN, RANK = 40, 12, 4


def drawn(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def head_and_map(bias: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A head W with its bias, and the factors B and A of the map on its logits."""
    weight = drawn(VOCAB, HIDDEN, seed=0)
    return (
        weight,
        bias * drawn(VOCAB, seed=1),
        drawn(VOCAB, RANK, seed=2),
        0.3 * drawn(RANK, VOCAB, seed=3),
    )


def answers(count: int, seed: int, bias: float = 0.0) -> tuple[Tensor, Tensor]:
    """Clean and defended log-probabilities of some positions."""
    weight, shift, up, down = head_and_map(bias)
    clean = drawn(count, HIDDEN, seed=seed) @ weight.T + shift
    defended = clean + clean @ down.T @ up.T
    return clean.log_softmax(-1), defended.log_softmax(-1)


def error(count: int, *, bias: float = 0.0, ridge: float = 1e-10) -> float:
    """KL in nats between the truth and what `count` pairs make of new answers."""
    clean, defended = answers(50, seed=9, bias=bias)
    if count == 0:
        return divergences.forward_kl(clean, defended).mean().item()
    found = fit_inversion(*answers(count, seed=8, bias=bias), ridge).undo(defended)
    return divergences.forward_kl(clean, found).mean().item()


def test_as_many_pairs_as_dimensions_undo_the_matrix() -> None:
    assert error(0) > 1
    assert error(HIDDEN) < 1e-6
    assert error(HIDDEN - 1) > 1e-3
    # A bias is one dimension more.
    assert error(HIDDEN, bias=1.0) > 1e-3
    assert error(HIDDEN + 1, bias=1.0) < 1e-6


def test_it_is_woodburys_inverse_on_what_a_head_can_say() -> None:
    _, _, up, down = head_and_map()
    inner = torch.eye(RANK, dtype=torch.float64) + down @ up
    inverse = torch.eye(VOCAB, dtype=torch.float64) - up @ torch.linalg.solve(inner, down)
    weight = head_and_map()[0]
    clean = drawn(30, HIDDEN, seed=9) @ weight.T
    defended = clean + clean @ down.T @ up.T
    torch.testing.assert_close(defended @ inverse.T, clean)
    found = fit_inversion(*answers(3 * HIDDEN, seed=8), ridge=1e-12)
    expected = (defended @ inverse.T).log_softmax(-1)
    torch.testing.assert_close(found.undo(defended.log_softmax(-1)), expected, rtol=1e-4, atol=1e-4)


def test_fewer_pairs_undo_it_in_part() -> None:
    errors = [error(count) for count in (0, 2, 5, 8, HIDDEN)]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.8 * errors[0]
    # On the pairs themselves nothing is left.
    clean, defended = answers(3, seed=8)
    found = fit_inversion(clean, defended, ridge=1e-12).undo(defended)
    torch.testing.assert_close(found, clean, rtol=1e-6, atol=1e-6)


def test_without_a_defense_nothing_changes() -> None:
    clean, _ = answers(20, seed=8)
    found = fit_inversion(clean, clean)
    assert not found.corrections.any()
    torch.testing.assert_close(found.undo(clean), clean)


def test_means_of_logits_do_not_matter() -> None:
    clean, defended = answers(HIDDEN, seed=8)
    shifted = clean + drawn(HIDDEN, 1, seed=5), defended - drawn(HIDDEN, 1, seed=6)
    plain, moved = fit_inversion(clean, defended), fit_inversion(*shifted)
    new = answers(5, seed=9)[1]
    torch.testing.assert_close(plain.undo(new), moved.undo(new + 7.0))
    torch.testing.assert_close(plain.undo(new).exp().sum(-1), torch.ones(5, dtype=torch.float64))


def test_the_ridge_decides_how_far_rounded_pairs_are_believed() -> None:
    clean, defended = (x.mul(10).round().div(10) for x in answers(HIDDEN, seed=8))
    truth, new = answers(50, seed=9)
    errors = {
        ridge: divergences.forward_kl(truth, fit_inversion(clean, defended, ridge).undo(new)).mean()
        for ridge in (1e-12, 1e-4, 1e3)
    }
    assert errors[1e-4] < errors[1e-12]
    assert errors[1e-4] < errors[1e3]
    # Who believes nothing keeps what was said.
    untouched = divergences.forward_kl(truth, new).mean()
    torch.testing.assert_close(errors[1e3], untouched, rtol=1e-2, atol=0)


def test_float32_in_float32_out_with_no_digits_lost() -> None:
    clean, defended = (x.float() for x in answers(4 * HIDDEN, seed=8))
    found = fit_inversion(clean, defended)
    assert found.corrections.dtype == found.defended.dtype == torch.float32
    truth, new = (x.float() for x in answers(50, seed=9))
    assert divergences.forward_kl(truth, found.undo(new)).mean() < 1e-4


@pytest.mark.parametrize(
    ("clean", "defended", "shapes"),
    [((0, 5), (0, 5), r"\(0, 5\) and \(0, 5\)"), ((2, 5), (3, 5), r"\(2, 5\) and \(3, 5\)")],
)
def test_pairs_that_are_none_are_refused(clean, defended, shapes: str) -> None:
    with pytest.raises(ValueError, match=f"at least one pair .* of one shape, got {shapes}"):
        fit_inversion(torch.zeros(clean), torch.zeros(defended))


@pytest.mark.parametrize("ridge", [0.0, -1.0])
def test_a_ridge_must_be_positive(ridge: float) -> None:
    with pytest.raises(ValueError, match=rf"ridge must be above 0, got {ridge}; 1e-4 trusts"):
        fit_inversion(torch.zeros(2, 5), torch.zeros(2, 5), ridge)
