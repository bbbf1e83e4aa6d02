"""Divergences between a teacher's next-token distribution p and a student's q.

Every function takes log-probabilities of shape [..., events] and returns one value per leading
position: nats where it is a KL or a mean of KLs, and a number without a unit elsewhere. An event is
a token, or the tail of all tokens that the attacker did not see. Computations stay in log space and
in the dtype of the arguments. Limits have formulas of their own. An event that is impossible to one
side alone counts as one of probability exp(-8e37), so an infinite divergence becomes a huge number.

References:
    Hinton et al. 2015, arXiv:1503.02531 (forward KL);
    Gu et al. 2023, "MiniLLM", arXiv:2306.08543 (reverse KL);
    Wang et al. 2021, "AlphaNet", arXiv:2102.07954 (alpha-divergences);
    Wang et al. 2025, "ABKD", arXiv:2505.04560, after Cichocki et al. 2011 (alpha-beta);
    Ko et al. 2024, "DistiLLM", arXiv:2402.03898 (skew KL).
"""

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Divergence = Callable[[Tensor, Tensor], Tensor]
"""(log p, log q), each [..., events] -> [...]."""


def forward_kl(
    log_p: Float[Tensor, "*at events"], log_q: Float[Tensor, "*at events"]
) -> Float[Tensor, "*at"]:
    """sum p log(p / q): the student must cover every token that the teacher may write."""
    return (log_p.exp() * (finite_log(log_p) - finite_log(log_q))).sum(-1)


def reverse_kl(
    log_p: Float[Tensor, "*at events"], log_q: Float[Tensor, "*at events"]
) -> Float[Tensor, "*at"]:
    """sum q log(q / p): the student must avoid tokens that the teacher would not write."""
    return (log_q.exp() * (finite_log(log_q) - finite_log(log_p))).sum(-1)


def alpha(
    log_p: Float[Tensor, "*at events"], log_q: Float[Tensor, "*at events"], a: float
) -> Float[Tensor, "*at"]:
    """(sum p^a q^(1-a) - 1) / (a (a - 1)); forward KL at a = 1, reverse KL at a = 0."""
    return alpha_beta(log_p, log_q, a, 1.0 - a)


def alpha_beta(
    log_p: Float[Tensor, "*at events"],
    log_q: Float[Tensor, "*at events"],
    a: float,
    b: float,
    *,
    release_compat: bool = False,
) -> Float[Tensor, "*at"]:
    """The alpha-beta divergence, with its limits where a, b or a + b is 0.

        -1/(ab) sum [ p^a q^b - a/(a+b) p^(a+b) - b/(a+b) q^(a+b) ]

        b = 0:   1/a^2 sum [ p^a log(p^a / q^a) - p^a + q^a ]
        a = 0:   1/b^2 sum [ q^b log(q^b / p^b) - q^b + p^b ]
        a = -b:  1/a^2 sum [ log(q^a / p^a) + p^a / q^a - 1 ]
        a = b = 0:  1/2 sum (log p - log q)^2

    (1, 0) is forward KL, (0, 1) reverse KL, (1/2, 1/2) four times the squared Hellinger distance,
    (1, 1) half the squared Euclidean distance.

    Args:
        release_compat: the first three limits with 1/a, 1/b and 1/a, as in ABKD's released code;
            they agree with the true ones at 1 alone.

    Raises:
        ValueError: if a or b is not a finite number.
    """
    if not (math.isfinite(a) and math.isfinite(b)):
        raise ValueError(f"alpha and beta must be finite numbers, got {a} and {b}")
    if log_p.dtype != torch.float64 and any(0 < abs(x) < _SMALL for x in (a, b)):
        # The differences in `_shape` lose about eps / a, which float32 cannot spare here.
        exact = alpha_beta(log_p.double(), log_q.double(), a, b, release_compat=release_compat)
        return exact.to(log_p.dtype)
    # Each event is computed from its more likely side, so no exponential of a large number is
    # taken. At a gap of 0, `clamp` passes the gradient and `relu` does not: it is passed once.
    gap = finite_log(log_p) - finite_log(log_q)
    value = _shape(a, b, gap.clamp(min=0)) + _shape(b, a, F.relu(-gap))
    total = (_weight(log_p, log_q, a + b) * value).sum(-1)
    if release_compat and (a, b) != (0.0, 0.0):
        if b == 0 or a == -b:
            total = total * a
        elif a == 0:
            total = total * b
    return total


_SMALL = 0.02
"""Exponents below it are computed in float64; float32 keeps six digits above it."""


def _weight(log_p: Tensor, log_q: Tensor, power: float) -> Tensor:
    """The larger probability to a power, cut to a finite number: infinity times 0 would be NaN."""
    if power == 0:
        return torch.ones_like(log_p)
    largest = torch.maximum(log_p, log_q)
    # A little below the logarithm of the largest number, which may round up to infinity.
    return (power * largest).clamp(max=math.log(torch.finfo(largest.dtype).max) - 1e-3).exp()


def _shape(a: float, b: float, x: Tensor) -> Tensor:
    """(phi(a + b) - phi(b)) / a for x >= 0, where phi(k) = (exp(-k x) - 1) / k.

    It is one event's part of the divergence, divided by the larger probability to the power
    a + b, for two log-probabilities at distance x.
    """
    # The difference loses about eps / a to cancellation, and the limit is off by about a. Both
    # are equal at a = sqrt(eps); closer to 0 the limit is the better one.
    least = torch.finfo(x.dtype).eps ** 0.5
    steepest = -min(a + b, b)
    if steepest > 0:
        # Beyond this distance two exponentials overflow, and infinity minus infinity is NaN.
        x = x.clamp(max=(math.log(torch.finfo(x.dtype).max) - 5) / steepest)
    if abs(a) >= least:
        return (_phi(a + b, x) - _phi(b, x)) / a
    if abs(b) >= least:
        # The derivative of phi at b.
        return (-b * x * torch.exp(-b * x) - torch.expm1(-b * x)) / b**2
    return 0.5 * x**2


def _phi(k: float, x: Tensor) -> Tensor:
    return -x if abs(k) < torch.finfo(x.dtype).eps else torch.expm1(-k * x) / k


def alphanet(
    log_p: Float[Tensor, "*at events"],
    log_q: Float[Tensor, "*at events"],
    low: float = -1.0,
    high: float = 1.0,
    clip: float = 5.0,
) -> Float[Tensor, "*at"]:
    """AlphaNet: at each position the larger of two alpha-divergences with clipped weights.

        D_a = 1/(a (a - 1)) sum q (min((p/q)^a, clip) - 1)

    At a = 0 it is sum q log(q/p) with p/q clipped, and at a = 1 forward KL, which the published
    code does not clip. The gradient is the published one, -sum q rho grad log q with q and rho held
    fixed and rho = min((p/q)^a, clip)/a + 1/(a (a - 1)); where nothing is clipped it is that of D_a
    itself. A clipped value may be negative.

    Raises:
        ValueError: if low and high are not finite numbers in order, or clip is not above 1.
    """
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"alphanet needs finite alphas with low < high, got {low} and {high}")
    if not clip > 1:
        raise ValueError(f"alphanet's clip must be above 1, got {clip}")
    first, second = (_clipped_alpha(log_p, log_q, a, clip) for a in (low, high))
    return torch.where(first > second, first, second)


_NEAR = 1e-3
"""Distance from 0 and from 1 within which AlphaNet's published code uses the limit."""


def _clipped_alpha(log_p: Tensor, log_q: Tensor, a: float, clip: float) -> Tensor:
    fixed, log_p = log_q.detach(), log_p.detach()
    q, gap = fixed.exp(), finite_log(log_p) - finite_log(fixed)
    if abs(a) < _NEAR:
        gap = gap.clamp(max=math.log(clip))
        value, slope = -q * gap, q * (gap - 1.0)
    elif abs(a - 1.0) < _NEAR:
        value, slope = log_p.exp() * gap, log_p.exp()
    else:
        ratio, base = (a * gap).exp().clamp(max=clip), 1.0 / (a * (a - 1.0))
        value, slope = q * (ratio - 1.0) * base, q * (ratio / a + base)
    # The difference below has the value 0 and the published gradient.
    surrogate = -(slope * finite_log(log_q)).sum(-1)
    return value.sum(-1) + (surrogate - surrogate.detach())


def skew_kl(
    log_p: Float[Tensor, "*at events"], log_q: Float[Tensor, "*at events"], skew: float = 0.1
) -> Float[Tensor, "*at"]:
    """KL(p || skew p + (1 - skew) q), bounded by -log skew.

    Raises:
        ValueError: if skew is not in [0, 1).
    """
    if not 0 <= skew < 1:
        raise ValueError(f"skew must be in [0, 1), got {skew}")
    return forward_kl(log_p, log_q if skew == 0 else _mix(log_p, log_q, skew))


def jensen_shannon(
    log_p: Float[Tensor, "*at events"], log_q: Float[Tensor, "*at events"], share: float = 0.5
) -> Float[Tensor, "*at"]:
    """share KL(p || m) + (1 - share) KL(q || m), m = share p + (1 - share) q.

    Raises:
        ValueError: if share is not in (0, 1).
    """
    if not 0 < share < 1:
        raise ValueError(f"share must be in (0, 1), got {share}")
    mean = _mix(log_p, log_q, share)
    return share * forward_kl(log_p, mean) + (1 - share) * forward_kl(log_q, mean)


def _mix(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    return torch.logaddexp(
        finite_log(log_p) + math.log(share), finite_log(log_q) + math.log1p(-share)
    )


def finite_log(log_p: Float[Tensor, "*at events"]) -> Float[Tensor, "*at events"]:
    """Log-probabilities in which an impossible event is finite, about -8e37 in float32.

    A probability of 0 times such a logarithm is 0, and times minus infinity it would be NaN.
    """
    return log_p.clamp(min=torch.finfo(log_p.dtype).min / 4)


BY_NAME: dict[str, Callable[..., Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "alpha": alpha,
    "alpha_beta": alpha_beta,
    "alphanet": alphanet,
    "skew_kl": skew_kl,
    "jensen_shannon": jensen_shannon,
}


def by_name(name: str, **parameters: Any) -> Divergence:
    """A divergence with fixed parameters.

    Raises:
        ValueError: if no divergence has that name, or a parameter is missing, unknown or out of
            range.
    """
    if name not in BY_NAME:
        raise ValueError(f"unknown divergence {name!r}; there are {', '.join(BY_NAME)}")
    function = BY_NAME[name]
    allowed = dict(list(inspect.signature(function).parameters.items())[2:])
    needed = [key for key, value in allowed.items() if value.default is inspect.Parameter.empty]
    if not set(needed) <= set(parameters) <= set(allowed):
        raise ValueError(
            f"{name} takes the parameters: {', '.join(allowed) or 'none'} (it needs: "
            f"{', '.join(needed) or 'none'}); got: {', '.join(parameters) or 'none'}"
        )
    # A call on any distribution makes a bad value fail here instead of in the first step.
    even = torch.tensor([0.5, 0.5]).log()
    function(even, even, **parameters)
    return partial(function, **parameters)
