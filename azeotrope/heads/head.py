"""Output heads as modules: the one that is trained, and the frozen ones of the proxies."""

from jaxtyping import Float
from torch import Tensor, nn

from azeotrope.logits.vocabulary import SharedVocabulary


class Head(nn.Module):
    """The teacher's output head as trainable parameters, in float32.

    The parameters are copies: training does not change the model that they come from.
    """

    def __init__(
        self,
        weight: Float[Tensor, "vocab hidden"],
        bias: Float[Tensor, " vocab"] | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().float().clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().float().clone())

    def folded(self) -> "Head":
        """The plain head that computes the same logits, for the exported checkpoint."""
        return self


class ProxyHead(nn.Module):
    """A proxy's frozen head, cut to the tokens that it shares with the teacher."""

    def __init__(
        self,
        weight: Float[Tensor, "vocab hidden"],
        bias: Float[Tensor, " vocab"] | None,
        shared: SharedVocabulary,
    ) -> None:
        super().__init__()
        # Only the shared rows are ever used: one gather here saves one in every step.
        self.weight = nn.Buffer(weight.detach().float()[shared.proxy_ids])
        self.bias = None if bias is None else nn.Buffer(bias.detach().float()[shared.proxy_ids])
        self.teacher_ids = nn.Buffer(shared.teacher_ids)
        self.is_whole = shared.is_identity
        """Every token of the teacher has the same id in the proxy, so nothing is gathered."""
