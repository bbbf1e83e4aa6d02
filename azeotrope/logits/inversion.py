"""Undo a linear map of logits from pairs of clean and defended ones.

A fixed matrix on the logits is a secret only while nobody holds both sides. A thief who has k
positions answered by an old snapshot, or by the open model that the teacher was made from, fits

    log p  ~  log p' + R log p'        (each row centred, R of least norm)

and applies it to everything the defended teacher says. Logits span no more dimensions than the
teacher's hidden states have, so that as many pairs in general position undo any matrix that can be
undone; fewer undo it on what they span. For M = I + B A, Woodbury's identity gives the inverse
M^-1 = I - B (I + A B)^-1 A; the pairs need not know that form.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Inversion:
    """A correction of low rank, kept as two factors: vocabulary squared is never stored."""

    left: Float[Tensor, "pairs vocab"]
    """The corrections that the pairs ask for, solved for their likeness."""
    right: Float[Tensor, "pairs vocab"]
    """The centred defended log-probabilities of the pairs."""

    def undo(self, log_p: Float[Tensor, "positions vocab"]) -> Float[Tensor, "positions vocab"]:
        """Log-probabilities as the undefended teacher would have given them."""
        centred = _centred(log_p)
        return (centred + (centred @ self.right.T) @ self.left).log_softmax(-1)


def fit_inversion(
    clean: Float[Tensor, "pairs vocab"],
    defended: Float[Tensor, "answers tokens"],
    ridge: float = 1e-4,
) -> Inversion:
    """Solve for the correction by ridge regression in its dual form, in float64.

        R = (Z - Z')^T (Z' Z'^T + mu I)^-1 Z',   mu = ridge x mean squared norm of the rows of Z'

    Args:
        clean, defended: logits or log-probabilities of the same positions; rows are centred,
            because the softmax forgets their means.
        ridge: how far the pairs are believed; rounded logprobs want more.

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
    wanted, given = _centred(clean.double()), _centred(defended.double())
    gram = given @ given.T
    damping = ridge * gram.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
    gram.diagonal().add_(damping)
    left = torch.linalg.solve(gram, wanted - given)
    return Inversion(left.to(clean.dtype), given.to(clean.dtype))


def _centred(rows: Tensor) -> Tensor:
    return rows - rows.mean(-1, keepdim=True)
