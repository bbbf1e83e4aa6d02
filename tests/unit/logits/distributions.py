"""Distributions of a few tokens that tests of divergences draw or compute with by hand."""

from functools import partial

import torch
from hypothesis import strategies as st
from torch import Tensor

from azeotrope.logits.divergences import alphanet

# p = (1/2, 1/4, 1/4) and q = (1/8, 1/8, 3/4), so p/q = (4, 2, 1/3).
P, Q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.125, 0.125, 0.75])
UNCLIPPED = partial(alphanet, clip=1e30)

logits = st.lists(st.floats(-8, 8), min_size=4, max_size=4)
calm = st.lists(st.floats(-2, 2), min_size=4, max_size=4)


def distribution(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).log_softmax(-1)
