"""Undo a linear map of logits from pairs of clean and defended ones.

A fixed matrix on the logits stays secret only while no attacker has logits from before and after
it. Suppose an attacker has k positions answered by an old snapshot too, or by the open model that
the teacher was made from. The attacker fits

    log p  ~  log p' + R log p'        (each row centred, R of least norm)

and applies it to all answers of the defended teacher. Logits span at most as many dimensions as the
teacher's hidden states have. That many pairs in general position undo any invertible matrix; fewer
pairs undo it on the subspace that they span. For M = I + B A, Woodbury's identity gives the inverse
M^-1 = I - B (I + A B)^-1 A; the fit does not need to know that form.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Inversion:
    """A correction of low rank, stored as two factors instead of a vocab x vocab matrix."""

    corrections: Float[Tensor, "pairs vocab"]
    """(Z' Z'^T + mu I)^-1 (Z - Z'), of the pairs' clean Z and defended Z'."""
    defended: Float[Tensor, "pairs vocab"]
    """Z': the centred defended log-probabilities of the pairs."""

    def undo(self, log_p: Float[Tensor, "positions vocab"]) -> Float[Tensor, "positions vocab"]:
        """An estimate of the undefended teacher's log-probabilities."""
        centred = _centred(log_p)
        return (centred + (centred @ self.defended.T) @ self.corrections).log_softmax(-1)


def fit_inversion(
    clean: Float[Tensor, "pairs vocab"],
    defended: Float[Tensor, "answers tokens"],
    ridge: float = 1e-4,
) -> Inversion:
    """Solve for the correction by ridge regression in its dual form, in float64.

        R = (Z - Z')^T (Z' Z'^T + mu I)^-1 Z',   mu = ridge x mean squared norm of the rows of Z'

    Args:
        clean: logits or log-probabilities of the undefended teacher; rows are centred, because the
            softmax forgets their means.
        defended: those of the defended teacher at the same positions.
        ridge: mu per mean squared norm; rounded logprobs need a larger one.

    Raises:
        ValueError: if there are no pairs, the two do not match, or the ridge is not positive.
    """
    if not ridge > 0:
        raise ValueError(f"ridge must be above 0, got {ridge}; 1e-4 trusts exact logits")
    if clean.shape != defended.shape or len(clean) == 0:
        raise ValueError(
            "an inversion needs at least one pair of clean and defended logits of one shape, got "
            f"{tuple(clean.shape)} and {tuple(defended.shape)}"
        )
    target, source = _centred(clean.double()), _centred(defended.double())
    # The dual form solves a pairs x pairs system in place of a vocab x vocab one.
    gram = source @ source.T
    damping = ridge * gram.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
    gram.diagonal().add_(damping)
    corrections = torch.linalg.solve(gram, target - source)
    return Inversion(corrections.to(clean.dtype), source.to(clean.dtype))


def _centred(rows: Tensor) -> Tensor:
    return rows - rows.mean(-1, keepdim=True)
