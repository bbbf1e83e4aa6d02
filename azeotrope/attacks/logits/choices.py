"""The divergences that a student can be distilled by, each with its own parameters.

With p the teacher, q the student and m a mixture of both:

    forward_kl      sum_v p log(p / q)
    reverse_kl      sum_v q log(q / p)
    alpha           (sum_v p^a q^(1-a) - 1) / (a (a - 1))
    alphanet        the larger of two alpha-divergences
    abkd            the alpha-beta divergence
    skew_kl         KL(p || skew p + (1 - skew) q)
    jensen_shannon  share KL(p || m) + (1 - share) KL(q || m)

`azeotrope.logits.divergences` has the functions and their limits.
"""

from functools import partial
from typing import Literal, get_args

from pydantic import Field, model_validator

from azeotrope.config import Config
from azeotrope.logits import divergences
from azeotrope.logits.divergences import Divergence


class DivergenceChoice(Config):
    """A divergence and its parameters."""

    name: str

    def functions(self) -> tuple[Divergence, ...]:
        """The divergences of which the largest sum is taken; all choices but `alphanet` have one.

        Raises:
            TypeError: if a subclass does not override it.
        """
        raise TypeError(f"{type(self).__name__} names no function")


class ForwardKl(DivergenceChoice):
    """The usual distillation loss, whose gradient is that of cross-entropy on p.

    Reference: Hinton, Vinyals and Dean 2015, "Distilling the knowledge in a neural network",
    arXiv:1503.02531.
    """

    name: Literal["forward_kl"] = "forward_kl"

    def functions(self) -> tuple[Divergence, ...]:
        return (divergences.forward_kl,)


class ReverseKl(DivergenceChoice):
    """The student seeks the teacher's modes, on given texts.

    The CMI paper (arXiv:2602.03396) runs this offline form under the name MiniLLM; the attack
    `minillm` is the on-policy original.
    Reference: Gu et al. 2023, "MiniLLM", arXiv:2306.08543.
    """

    name: Literal["reverse_kl"] = "reverse_kl"

    def functions(self) -> tuple[Divergence, ...]:
        return (divergences.reverse_kl,)


class AlphaDivergence(DivergenceChoice):
    """Forward KL at 1, reverse KL at 0, four times the squared Hellinger distance at 1/2.

    Reference: Cichocki and Amari 2010, "Families of alpha- beta- and gamma-divergences".
    """

    name: Literal["alpha"] = "alpha"
    alpha: float = Field(default=0.5, allow_inf_nan=False)

    def functions(self) -> tuple[Divergence, ...]:
        return (partial(divergences.alpha, a=self.alpha),)


_ALPHANET_RANGES = {"abkd": (0.2, 0.9), "original": (-1.0, 1.0)}


class AlphaNet(DivergenceChoice):
    """The larger of two alpha-divergences, in two variants.

    `abkd` is the variant in ABKD's release, which CMI ran: the larger of two sums over the batch,
    alpha in (0, 1), no clipping. `original` decides at each position, reaches below 0 and clips
    the weights. The two alphas are the variant's own unless they are set.
    References: Wang et al. 2021, "AlphaNet", arXiv:2102.07954; Wang et al. 2025, arXiv:2505.04560.
    """

    name: Literal["alphanet"] = "alphanet"
    variant_of: Literal["abkd", "original"] = Field(
        default="abkd", description="whose AlphaNet: ABKD's release, or the original"
    )
    low: float | None = Field(default=None, allow_inf_nan=False, description="the smaller alpha")
    high: float | None = Field(default=None, allow_inf_nan=False, description="the larger alpha")
    clip: float = Field(default=5.0, gt=1, description="greatest weight; only for `original`")

    @model_validator(mode="after")
    def _ordered(self) -> "AlphaNet":
        low, high = self.alphas
        if not low < high:
            raise ValueError(f"low must be below high, got {low} and {high}")
        return self

    @property
    def alphas(self) -> tuple[float, float]:
        low, high = _ALPHANET_RANGES[self.variant_of]
        return low if self.low is None else self.low, high if self.high is None else self.high

    def functions(self) -> tuple[Divergence, ...]:
        low, high = self.alphas
        if self.variant_of == "original":
            return (partial(divergences.alphanet, low=low, high=high, clip=self.clip),)
        return tuple(partial(divergences.alpha, a=a) for a in (low, high))


class Abkd(DivergenceChoice):
    """alpha weighs positions by how hard they are, beta by how sure the student is.

    The defaults are ABKD's for small models; CMI's own settings are not published.
    Reference: Wang et al. 2025, "ABKD", arXiv:2505.04560.
    """

    name: Literal["abkd"] = "abkd"
    alpha: float = Field(default=0.2, allow_inf_nan=False)
    beta: float = Field(default=0.7, allow_inf_nan=False)
    release_compat: bool = Field(
        default=False,
        description="the limits of the released code, off by a factor of alpha or beta",
    )

    def functions(self) -> tuple[Divergence, ...]:
        function = partial(
            divergences.alpha_beta, a=self.alpha, b=self.beta, release_compat=self.release_compat
        )
        return (function,)


class SkewKl(DivergenceChoice):
    """Forward KL to a mixture, bounded by -log skew.

    Reference: Ko et al. 2024, "DistiLLM", arXiv:2402.03898.
    """

    name: Literal["skew_kl"] = "skew_kl"
    skew: float = Field(default=0.1, ge=0, lt=1)

    def functions(self) -> tuple[Divergence, ...]:
        return (partial(divergences.skew_kl, skew=self.skew),)


class JensenShannon(DivergenceChoice):
    """The mean of both KL divergences to the mixture m = share p + (1 - share) q.

    Reference: Lin 1991, "Divergence measures based on the Shannon entropy"; for students, Agarwal
    et al. 2023, arXiv:2306.13649.
    """

    name: Literal["jensen_shannon"] = "jensen_shannon"
    share: float = Field(default=0.5, gt=0, lt=1)

    def functions(self) -> tuple[Divergence, ...]:
        return (partial(divergences.jensen_shannon, share=self.share),)


AnyDivergence = ForwardKl | ReverseKl | AlphaDivergence | AlphaNet | Abkd | SkewKl | JensenShannon
BY_NAME: dict[str, type[DivergenceChoice]] = {
    kind.model_fields["name"].default: kind for kind in get_args(AnyDivergence)
}
