"""Divergences: identities, values worked out by hand, limits that join, and gradients.

The original AlphaNet is excluded from two of them: its clipped value may be negative, and its
gradient is a formula of its own and not the derivative of the value.
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import product

import pytest
import torch
from distributions import UNCLIPPED, P, Q, calm, distribution, logits
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from azeotrope.logits import divergences
from azeotrope.logits.divergences import BY_NAME, alpha, alpha_beta, alphanet, by_name

LN2, LN3 = math.log(2), math.log(3)
PAIRS = [
    (1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (1.0, 1.0), (0.2, 0.7), (2.0, 1.0),
    (2.0, 0.0), (0.0, 2.0), (0.4, -0.4), (-1.5, 1.5), (0.0, 0.0), (-0.5, 1.5), (1.5, -0.5),
]  # fmt: skip

SMOOTH: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward_kl": by_name("forward_kl"),
    "reverse_kl": by_name("reverse_kl"),
    **{f"alpha({a})": by_name("alpha", a=a) for a in (-1.0, 0.0, 0.3, 0.5, 1.0, 2.0)},
    **{f"alpha_beta{pair}": by_name("alpha_beta", a=pair[0], b=pair[1]) for pair in PAIRS},
    "skew_kl": by_name("skew_kl"),
    "skew_kl(0)": by_name("skew_kl", skew=0.0),
    "jensen_shannon": by_name("jensen_shannon"),
    "jensen_shannon(0.1)": by_name("jensen_shannon", share=0.1),
}
ALL = {**SMOOTH, "alphanet": by_name("alphanet"), "alphanet(0.2,0.9)": partial(UNCLIPPED, low=0.2)}
smooth = pytest.mark.parametrize("name", SMOOTH)
every = pytest.mark.parametrize("name", ALL)
few = settings(max_examples=25)

FORWARD, REVERSE = 1.25 * LN2 - 0.25 * LN3, -0.375 * LN2 + 0.75 * LN3
KL_TO_HALF = 0.5 * math.log(8 / 5) + 0.25 * math.log(4 / 3) - 0.25 * LN2
KL_FROM_HALF = math.log(2 / 5) / 8 + math.log(2 / 3) / 8 + 0.75 * math.log(3 / 2)
BY_HAND = {
    "forward_kl": (by_name("forward_kl"), FORWARD),
    "reverse_kl": (by_name("reverse_kl"), REVERSE),
    "alpha 1/2": (by_name("alpha", a=0.5), 4 - 1 - 4 / math.sqrt(32) - math.sqrt(3)),
    "alpha 2": (by_name("alpha", a=2.0), 19 / 24),
    "alpha 1": (by_name("alpha", a=1.0), FORWARD),
    "alpha 0": (by_name("alpha", a=0.0), REVERSE),
    "(1, 0)": (by_name("alpha_beta", a=1.0, b=0.0), FORWARD),
    "(0, 1)": (by_name("alpha_beta", a=0.0, b=1.0), REVERSE),
    "(1, 1)": (by_name("alpha_beta", a=1.0, b=1.0), 13 / 64),
    "(2, 1)": (by_name("alpha_beta", a=2.0, b=1.0), 41 / 512),
    "(2, 0)": (by_name("alpha_beta", a=2.0, b=0.0), (9 / 8 * LN2 - LN3 / 8 + 7 / 32) / 4),
    "(0, 2)": (by_name("alpha_beta", a=0.0, b=2.0), (-3 / 32 * LN2 + 9 / 8 * LN3 - 7 / 32) / 4),
    "(2, -2)": (by_name("alpha_beta", a=2.0, b=-2.0), (-6 * LN2 + 2 * LN3 + 17 + 1 / 9) / 4),
    "(0, 0)": (by_name("alpha_beta", a=0.0, b=0.0), (5 * LN2**2 + LN3**2) / 2),
    "skew 1/2": (by_name("skew_kl", skew=0.5), KL_TO_HALF),
    "jensen-shannon": (by_name("jensen_shannon"), (KL_TO_HALF + KL_FROM_HALF) / 2),
    # 1/2 sum q (q/p - 1), of which no weight is above 5; forward KL is smaller.
    "alphanet": (by_name("alphanet"), 43 / 64),
    # Weights up to 2 alone make it 19/64, so forward KL is the larger one.
    "alphanet, clip 2": (by_name("alphanet", clip=2.0), FORWARD),
    # At 0 the weight 4 counts as 2; the other one, at -1, is 19/64.
    "alphanet, -1 and 0": (by_name("alphanet", high=0.0, clip=2.0), REVERSE + LN2 / 8),
}


@pytest.mark.parametrize("name", BY_HAND)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_three_tokens_by_hand(name: str, dtype: torch.dtype) -> None:
    divergence, expected = BY_HAND[name]
    found = divergence(P.to(dtype).log(), Q.to(dtype).log())
    assert found.dtype == dtype
    digits = 1e-5 if dtype == torch.float32 else 1e-12
    assert found.item() == pytest.approx(expected, rel=digits)


def test_nothing_is_left_out() -> None:
    assert {name.partition("(")[0] for name in ALL} == set(BY_NAME)


@every
@few
@given(values=logits)
def test_equal_distributions_are_no_distance_apart(name: str, values: list[float]) -> None:
    log_p = distribution(values)
    assert ALL[name](log_p, log_p.clone()).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", [name for name in ALL if name != "alphanet"])
@few
@given(one=logits, other=logits)
def test_no_divergence_is_negative(name: str, one: list[float], other: list[float]) -> None:
    assert ALL[name](distribution(one), distribution(other)).item() >= -1e-12


@every
@few
@given(one=logits, other=logits)
def test_positions_are_independent(name: str, one: list[float], other: list[float]) -> None:
    a, b = distribution(one), distribution(other)
    stacked = ALL[name](torch.stack([a, b, a])[:, None], torch.stack([b, a, a])[:, None])
    assert stacked.shape == (3, 1)
    alone = torch.stack([ALL[name](a, b), ALL[name](b, a), ALL[name](a, a)])
    torch.testing.assert_close(stacked[:, 0], alone, rtol=1e-12, atol=1e-12)


@given(one=logits, other=logits, a=st.floats(-1.5, 2), b=st.floats(-1.5, 2))
@example(one=[8, -8, 0, 0], other=[-8, 8, 0, 0], a=1.5, b=-1.4)
def test_alpha_beta_is_its_formula(
    one: list[float], other: list[float], a: float, b: float
) -> None:
    if min(abs(a), abs(b), abs(a + b)) < 0.05:
        return  # the formula has no digits left there; the limits are tested below
    p, q = distribution(one).exp(), distribution(other).exp()
    c = a + b
    terms = p**a * q**b, -a / c * p**c, -b / c * q**c
    expected = -sum(term.sum() for term in terms) / (a * b)
    largest = max(term.abs().max().item() for term in terms) / abs(a * b)
    found = alpha_beta(p.log(), q.log(), a, b)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-13 * largest + 1e-13)


@given(one=logits, other=logits, a=st.floats(-1.5, 2))
def test_alpha_and_alpha_beta_agree(one: list[float], other: list[float], a: float) -> None:
    log_p, log_q = distribution(one), distribution(other)
    torch.testing.assert_close(alpha(log_p, log_q, a), alpha_beta(log_p, log_q, a, 1 - a))
    # Exchanging the distributions exchanges the exponents.
    torch.testing.assert_close(alpha_beta(log_q, log_p, 1 - a, a), alpha(log_p, log_q, a))


@pytest.mark.parametrize(
    "point", [(0.0, 1.0), (0.0, 0.3), (0.0, -1.0), (1.0, 0.0), (0.4, 0.0), (-0.7, 0.0),
              (0.6, -0.6), (-1.0, 1.0), (0.0, 0.0)],
)  # fmt: skip
@pytest.mark.parametrize("towards", [(1, 0), (0, 1), (-1, 0), (0, -1), (1, 1), (1, -1), (2, -1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@settings(max_examples=5)
@given(one=calm, other=calm)
def test_limits_join(
    point: tuple[float, float],
    towards: tuple[int, int],
    dtype: torch.dtype,
    one: list[float],
    other: list[float],
) -> None:
    log_p, log_q = distribution(one).to(dtype), distribution(other).to(dtype)
    there = alpha_beta(log_p, log_q, *point).item()
    slack = 1e-7 if dtype == torch.float64 else 2e-2
    for step in (1e-2, 1e-4, 1e-6, 1e-8, 1e-12, 1e-15, 1e-300):
        a, b = (value + step * sign for value, sign in zip(point, towards, strict=True))
        near = alpha_beta(log_p, log_q, a, b).item()
        # Differences of logs are at most 6, so a unit of an exponent moves the value by less.
        assert abs(near - there) <= 20 * step * (1 + there) ** 2 + slack * (1e-3 + there)


@smooth
def test_gradients_are_those_of_the_value(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    ours, theirs = (
        torch.randn(3, 5, dtype=torch.float64, generator=generator).requires_grad_() for _ in "pq"
    )

    def value(p: Tensor, q: Tensor) -> Tensor:
        return SMOOTH[name](p.log_softmax(-1), q.log_softmax(-1))

    assert torch.autograd.gradcheck(value, (ours, theirs))
    # A defense differentiates the student's gradient once more, by the teacher's logits.
    assert torch.autograd.gradgradcheck(value, (ours, theirs))


@smooth
def test_at_equality_the_gradient_vanishes_and_the_curvature_does_not(name: str) -> None:
    log_p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()

    def value(log_q: Tensor) -> Tensor:
        return SMOOTH[name](log_p, log_q)

    q = log_p.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(value(q.log_softmax(-1)), q)
    torch.testing.assert_close(gradient, torch.zeros(3, dtype=torch.float64))
    found = torch.autograd.functional.hessian(lambda z: value(z.log_softmax(-1)), log_p)
    near = torch.autograd.functional.hessian(lambda z: value(z.log_softmax(-1)), log_p + 1e-7 * q)
    torch.testing.assert_close(found, near, rtol=1e-5, atol=1e-6)
    assert found.diagonal().min() > 1e-3


@pytest.mark.parametrize(
    ("a", "b", "factor"),
    [(0.3, 0.0, 0.3), (0.0, 0.7, 0.7), (0.4, -0.4, 0.4), (1.0, 0.0, 1.0), (0.0, 1.0, 1.0),
     (0.2, 0.7, 1.0), (0.0, 0.0, 1.0)],
)  # fmt: skip
def test_the_release_is_off_by_a_factor_at_the_limits(a: float, b: float, factor: float) -> None:
    true = alpha_beta(P.log(), Q.log(), a, b)
    released = alpha_beta(P.log(), Q.log(), a, b, release_compat=True)
    assert released.item() == pytest.approx(factor * true.item(), rel=1e-6)


def test_the_release_in_its_own_words() -> None:
    # 1/a sum [p^a log(p^a / q^a) - p^a + q^a] at (0.3, 0), as released.
    p, q = P.double() ** 0.3, Q.double() ** 0.3
    expected = (p * (p / q).log() - p + q).sum() / 0.3
    found = alpha_beta(P.double().log(), Q.double().log(), 0.3, 0.0, release_compat=True)
    torch.testing.assert_close(found, expected)


BOUNDED = [
    name for name in ALL
    if not any(name.startswith(f"alpha({a})") for a in (-1.0, 2.0))
    and not any(name == f"alpha_beta{pair}" for pair in PAIRS if min(pair) < 0 or not any(pair))
]  # fmt: skip
EXTREME = [
    [0.0, 0.0, 0.0, 0.0],
    [1e4, 0.0, 0.0, 0.0],
    [0.0, 1e4, 0.0, 0.0],
    [-1e30, 1e30, 0.0, 0.0],
    [0.0, -math.inf, -math.inf, -math.inf],
    [-math.inf, -math.inf, 0.0, 0.0],
    [0.0, 1.0, -math.inf, 2.0],
]


@pytest.mark.parametrize("name", BOUNDED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_distributions_stay_finite(name: str, dtype: torch.dtype) -> None:
    for one, other in product(EXTREME, EXTREME):
        teacher, student = (
            torch.tensor(values, dtype=dtype, requires_grad=True) for values in (one, other)
        )
        value = ALL[name](teacher.log_softmax(-1), student.log_softmax(-1))
        assert value.isfinite(), (one, other)
        assert value >= -1e-6, (one, other)
        value.backward()
        assert student.grad is not None
        assert student.grad.isfinite().all(), (one, other)
        if name.partition("(")[0] != "alphanet":  # there the teacher is held fixed
            assert teacher.grad is not None
            assert teacher.grad.isfinite().all(), (one, other)
        same = ALL[name](teacher.log_softmax(-1), teacher.detach().log_softmax(-1))
        assert same.item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if min(pair) < 0 or not any(pair)])
def test_negative_exponents_are_never_nan(pair: tuple[float, float]) -> None:
    far, farther = [0.0, -200.0, -300.0, -50.0], [0.0, -200.0, -1.0, -300.0]
    log_p, log_q = (torch.tensor(z).log_softmax(-1) for z in (far, farther))
    value = alpha_beta(log_p, log_q, *pair)
    assert not value.isnan()
    assert value > 0
    # What is impossible to both sides counts for nothing.
    teacher = torch.tensor([0.0, -math.inf, -math.inf, 0.0]).log_softmax(-1)
    student = torch.tensor([0.0, -math.inf, -math.inf, 1.0], requires_grad=True)
    value = alpha_beta(teacher, student.log_softmax(-1), *pair)
    only = alpha_beta(teacher[[0, 3]], student[[0, 3]].log_softmax(-1), *pair)
    torch.testing.assert_close(value, only)
    value.backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    assert student.grad.abs().sum() > 0


def test_what_the_other_side_calls_impossible_is_enormous() -> None:
    certain, torn = torch.tensor([0.0, -math.inf]), torch.tensor([0.5, 0.5]).log()
    for name in ("forward_kl", "reverse_kl"):
        assert by_name(name)(*((torn, certain) if name == "forward_kl" else (certain, torn))) > 1e37
    # Hellinger's distance and the mixtures are bounded whatever happens.
    assert alpha(torn, certain, 0.5).item() == pytest.approx(4 - 4 / math.sqrt(2), rel=1e-6)
    assert by_name("skew_kl")(torn, certain).item() < -math.log(0.1)
    assert by_name("jensen_shannon")(torn, certain).item() < LN2


@given(one=logits, other=logits, share=st.floats(0.01, 0.99))
def test_mixtures_are_bounded(one: list[float], other: list[float], share: float) -> None:
    log_p, log_q = distribution(one), distribution(other)
    assert divergences.skew_kl(log_p, log_q, share) <= -math.log(share) + 1e-12
    found = divergences.jensen_shannon(log_p, log_q, share)
    entropy = -share * math.log(share) - (1 - share) * math.log(1 - share)
    assert found <= entropy + 1e-12
    mean = (share * log_p.exp() + (1 - share) * log_q.exp()).log()
    parts = [divergences.forward_kl(item, mean) for item in (log_p, log_q)]
    torch.testing.assert_close(found, share * parts[0] + (1 - share) * parts[1])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_exponents_must_be_finite(bad: float) -> None:
    for a, b in ((bad, 0.5), (0.5, bad)):
        with pytest.raises(ValueError, match="alpha and beta must be finite numbers, got"):
            alpha_beta(P.log(), Q.log(), a, b)
    with pytest.raises(ValueError, match="must be finite"):
        alpha(P.log(), Q.log(), bad)
    with pytest.raises(ValueError, match="finite alphas with low < high"):
        alphanet(P.log(), Q.log(), low=bad)


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("alphanet", {"low": 1.0, "high": 1.0}, r"low < high, got 1\.0 and 1\.0"),
        ("alphanet", {"low": 0.5, "high": -1.0}, r"low < high, got 0\.5 and -1\.0"),
        ("alphanet", {"clip": 1.0}, r"clip must be above 1, got 1\.0"),
        ("skew_kl", {"skew": 1.0}, r"skew must be in \[0, 1\), got 1\.0"),
        ("skew_kl", {"skew": -0.1}, r"skew must be in \[0, 1\), got -0\.1"),
        ("jensen_shannon", {"share": 0.0}, r"share must be in \(0, 1\), got 0\.0"),
        ("jensen_shannon", {"share": 1.0}, r"share must be in \(0, 1\), got 1\.0"),
        ("alpha_beta", {"a": 1.0}, r"parameters: a, b, release_compat \(it needs: a, b\); got: a"),
        ("alpha", {}, r"alpha takes the parameters: a \(it needs: a\); got: none"),
        ("forward_kl", {"a": 1.0}, r"takes the parameters: none \(it needs: none\); got: a"),
        ("skew_kl", {"share": 0.5}, r"takes the parameters: skew .*; got: share"),
        ("kl", {}, r"unknown divergence 'kl'; there are forward_kl, reverse_kl, alpha, "),
    ],
)
def test_what_does_not_fit_is_refused_before_it_is_used(
    name: str, parameters: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        by_name(name, **parameters)


def test_parameters_are_filled_in() -> None:
    found = by_name("alpha_beta", a=0.2, b=0.7)(P.log(), Q.log())
    assert torch.equal(found, alpha_beta(P.log(), Q.log(), 0.2, 0.7))
    assert torch.equal(by_name("alpha", a=0.5)(P.log(), Q.log()), alpha(P.log(), Q.log(), 0.5))


@pytest.mark.parametrize(
    ("a", "b"),
    [(5e-4, 0.5), (0.5, 5e-4), (1e-3, 1e-3), (5e-3, -0.3), (1e-2, 0.99), (-2e-3, 0.4), (0.1, 0.5)],
)
def test_small_exponents_keep_their_digits_in_float32(a: float, b: float) -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(8, 50, generator=generator).log_softmax(-1) for _ in range(2))
    single = divergences.alpha_beta(p, q, a, b)
    double = divergences.alpha_beta(p.double(), q.double(), a, b)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), double, rtol=1e-6, atol=0)


@pytest.mark.parametrize("exponent", [-0.5, -1.0, -2.0])
def test_improbable_events_do_not_become_nan(exponent: float) -> None:
    p = torch.tensor([[0.0, -200.0, -300.0]])
    assert divergences.alpha_beta(p, p, exponent, exponent).item() == 0.0
    # The true value is above 1e108.
    q = torch.tensor([[0.0, -250.0, -300.0]])
    assert divergences.alpha_beta(p, q, exponent, exponent).item() > 1e30
