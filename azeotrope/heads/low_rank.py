"""A head changed by a matrix of low rank, of which only the two factors are trained."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from azeotrope.heads.folding import fold
from azeotrope.heads.head import Head
from azeotrope.logits.chunks import head_logits


class LowRankHead(Head):
    """A frozen head and two trained factors, B = `up` and A = `down`.

    With `on_logits` the defended logits are (I + B A) z, A in R^{r x rows}. Otherwise A acts on
    the hidden states, z' = (W + B A) h, A in R^{r x hidden}: this reaches the same heads with
    fewer parameters.

    Args:
        base: the head that training begins with.
        clean: the undefended teacher's head, to compare with.
        rows: rows of the head that belong to tokens; the rows that pad it stay as they are.
        scale: standard deviation of A times the square root of its width, so that A's products
            have the same size for every vocabulary.
        seed: of A.
    """

    def __init__(
        self,
        base: Head,
        clean: Head,
        rows: int,
        *,
        rank: int,
        scale: float,
        seed: int,
        on_logits: bool,
    ) -> None:
        # Skips `Head.__init__`: the weight is a buffer, read through the property below.
        nn.Module.__init__(self)
        hidden = base.weight.shape[1]
        self.rows = rows
        self.on_logits = on_logits
        self.base_weight, self.base_bias = _frozen(base)
        self.clean_weight, self.clean_bias = _frozen(clean)
        width = rows if on_logits else hidden
        # Drawn on the CPU: the same seed gives the same matrix on every device.
        down = torch.randn(rank, width, generator=torch.Generator().manual_seed(seed))
        device = base.weight.device
        self.down = nn.Parameter((down * scale / math.sqrt(width)).to(device))
        # B = 0 makes the first head the one that training begins with.
        self.up = nn.Parameter(torch.zeros(rows, rank, device=device))

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The head that training began with; the defended one is `folded()`."""
        return self.base_weight

    def logits(self, hidden: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens rows"]:
        """Defended logits of the rows that are tokens."""
        plain = head_logits(hidden, self.base_weight, self.base_bias)[:, : self.rows]
        inputs = plain if self.on_logits else hidden
        return plain + F.linear(F.linear(inputs, self.down), self.up)

    def clean_logits(self, hidden: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens rows"]:
        """The undefended teacher's logits of the rows that are tokens."""
        return head_logits(hidden, self.clean_weight, self.clean_bias)[:, : self.rows]

    @torch.no_grad()
    def folded(self) -> Head:
        if self.on_logits:
            return Head(*fold(self.base_weight, self.base_bias, self.up, self.down))
        weight = self.base_weight.clone()
        weight[: self.rows] += self.up @ self.down
        return Head(weight, self.base_bias)


def _frozen(head: Head) -> tuple[nn.Buffer, nn.Buffer | None]:
    bias = None if head.bias is None else nn.Buffer(head.bias.detach())
    return nn.Buffer(head.weight.detach()), bias
