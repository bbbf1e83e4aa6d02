"""DOGe's objective: hand-computed values, the closed form of its gradient, and its reductions."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from azeotrope import models
from azeotrope.config import ConfigError
from azeotrope.defenses import base as defenses
from azeotrope.defenses.doge import Config, Doge, equivalent_strength
from azeotrope.heads import features
from azeotrope.heads.features import FeatureBatch, FeaturePair, Features
from azeotrope.heads.head import Head, ProxyHead
from azeotrope.heads.search import HeadSearch, HeadTraining
from azeotrope.logits.chunks import head_logits
from azeotrope.logits.vocabulary import SharedVocabulary, share
from azeotrope.tokens import Boundary, encode

VOCAB, HIDDEN, TOKENS = 7, 5, 9
P = torch.tensor([1 / 2, 1 / 4, 1 / 4])
Q = torch.tensor([1 / 8, 1 / 8, 3 / 4])
# sum p (log p - log q) = log 2 + log 2 / 4 - log 3 / 4, and the other way round.
TEACHER_FIRST = 1.25 * math.log(2) - 0.25 * math.log(3)
PROXY_FIRST = 0.75 * math.log(3) - 0.375 * math.log(2)


def identity(vocab: int) -> SharedVocabulary:
    ids = torch.arange(vocab)
    return SharedVocabulary(ids, ids, ids)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made_head() -> Head:
    return Head(drawn(1, VOCAB, HIDDEN), drawn(2, VOCAB))


def made_proxy(seed: int) -> ProxyHead:
    return ProxyHead(drawn(seed, VOCAB, 4), drawn(seed + 1, VOCAB), identity(VOCAB))


def made_batch(proxies: int = 1, reasoning: tuple[int, int] = (2, 6)) -> FeatureBatch:
    chosen = torch.zeros(TOKENS, dtype=torch.bool)
    chosen[slice(*reasoning)] = True
    targets = torch.randint(VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(3))
    states = tuple(drawn(20 + index, TOKENS, 4) for index in range(proxies))
    return FeatureBatch(("one", "two"), targets, chosen, drawn(4, TOKENS, HIDDEN), states)


def gradients(
    doge: Doge, head: Head, proxies: tuple[ProxyHead, ...], batch: FeatureBatch
) -> tuple[float, Tensor]:
    """The total, and the gradients of weight and bias as one vector."""
    head.zero_grad()
    actual = doge.loss(head, proxies, batch)
    assert actual.count == len(batch.targets)
    assert not actual.total.requires_grad
    return actual.total.item(), torch.cat([head.weight.grad.flatten(), head.bias.grad])


def each_kl(
    head: Head, proxy: ProxyHead, batch: FeatureBatch, temperature: float, index: int = 0
) -> Tensor:
    """KL(teacher || proxy) of every token, written out in float64."""
    ours = (batch.teacher.double() @ head.weight.double().T + head.bias.double()) / temperature
    theirs = batch.proxies[index].double() @ proxy.weight.double().T + proxy.bias.double()
    log_p, log_q = ours.log_softmax(-1), (theirs / temperature).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def terms_of(
    doge: Doge,
    head: Head,
    proxies: tuple[ProxyHead, ...],
    batch: FeatureBatch,
    hidden: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and divergence of a whole batch, with a graph."""
    states = batch.teacher if hidden is None else hidden
    logits = head_logits(states.float(), head.weight, head.bias)
    return doge._terms(logits, proxies, batch.proxies, batch.targets, batch.reasoning)


def kl_of(doge: Doge, head: Head, proxies: tuple[ProxyHead, ...], batch: FeatureBatch) -> Tensor:
    return terms_of(doge, head, proxies, batch)[1]


def three_tokens(temperature: float) -> tuple[Head, ProxyHead, FeatureBatch]:
    """A teacher that gives P and a proxy that gives Q at this temperature."""
    shared = ProxyHead(torch.eye(3), None, identity(3))
    batch = FeatureBatch(
        ("one",),
        torch.tensor([0]),
        torch.tensor([True]),
        temperature * P.log()[None],
        (temperature * Q.log()[None],),
    )
    return Head(torch.eye(3)), shared, batch


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 5.0])
def test_three_tokens_by_hand_with_the_teacher_first(temperature: float) -> None:
    head, proxy, batch = three_tokens(temperature)
    kl = kl_of(Doge(Config(temperature=temperature)), head, (proxy,), batch)
    # The same number at every temperature: no factor of its square.
    assert kl.item() == pytest.approx(TEACHER_FIRST, abs=1e-6)
    assert abs(TEACHER_FIRST - PROXY_FIRST) > 0.02


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_gradient_is_the_closed_form(temperature: float) -> None:
    doge, proxy = Doge(Config(temperature=temperature)), made_proxy(7)
    states = drawn(8, TOKENS, 4)
    raw = drawn(9, TOKENS, VOCAB).double().requires_grad_()
    doge._divergence(raw / temperature, proxy, states).backward()
    log_p = (raw.detach() / temperature).log_softmax(-1)
    theirs = head_logits(states, proxy.weight, proxy.bias) / temperature
    gap = log_p - theirs.log_softmax(-1).double()
    kl = (log_p.exp() * gap).sum(-1, keepdim=True)
    expected = log_p.exp() * (gap - kl) / temperature
    torch.testing.assert_close(raw.grad, expected, rtol=1e-12, atol=1e-14)
    torch.autograd.gradcheck(
        lambda logits: doge._divergence(logits / temperature, proxy, states), raw
    )


def test_the_loss_is_cross_entropy_minus_strength_times_kl() -> None:
    head, proxy, batch = made_head(), made_proxy(7), made_batch()
    plain, plain_gradient = gradients(Doge(Config(strength=0)), head, (proxy,), batch)
    logits = batch.teacher @ head.weight.T + head.bias
    ce = F.cross_entropy(logits.detach(), batch.targets, reduction="sum")
    kl = each_kl(head, proxy, batch, 2.0)[batch.reasoning].sum()
    assert plain == pytest.approx(ce.item(), rel=1e-6)
    _, full_gradient = gradients(Doge(Config(strength=1)), head, (proxy,), batch)
    for strength in (0.25, 3.0):
        actual, gradient = gradients(Doge(Config(strength=strength)), head, (proxy,), batch)
        assert actual == pytest.approx((ce - strength * kl).item(), rel=1e-5)
        linear = plain_gradient + strength * (full_gradient - plain_gradient)
        torch.testing.assert_close(gradient, linear, rtol=1e-4, atol=1e-5)


def test_the_mask_takes_the_think_span_and_nothing_else(
    word: PreTrainedTokenizerFast,
) -> None:
    text = "<think> joe begins at 12. 12 + 3 = 15. </think> #### 15"
    teacher, proxy = models.load("pocket/teacher"), models.load("pocket/proxy-a")
    example = encode(
        word, [{"role": "user", "content": "joe has 12 eggs."}], text,
        boundary=Boundary(), max_length=64, id="one",
    )  # fmt: skip
    inside = [i for i, flag in zip(example.completion, example.reasoning, strict=True) if flag]
    assert word.decode(inside) == "joe begins at 12. 12 + 3 = 15."
    pair = FeaturePair(
        features.compute(teacher.model, [example])[0],
        (features.compute(proxy.model, [example])[0],),
    )
    batch = features.join([pair])
    assert batch.targets[batch.reasoning].tolist() == inside
    head = Head(models.head_of(teacher.model).weight, torch.zeros(len(word)))
    theirs = ProxyHead(
        models.head_of(proxy.model).weight, torch.zeros(len(word)), share(word, word)
    )
    each = each_kl(head, theirs, batch, 2.0)
    masked = kl_of(Doge(Config(mask="reasoning")), head, (theirs,), batch)
    whole = kl_of(Doge(Config(mask="none")), head, (theirs,), batch)
    assert masked.item() == pytest.approx(each[batch.reasoning].sum().item(), rel=1e-4)
    assert whole.item() == pytest.approx(each.sum().item(), rel=1e-4)
    assert abs(whole.item() - masked.item()) > 1e-3


def test_answer_tokens_feel_no_divergence() -> None:
    head, proxy, batch = made_head(), made_proxy(7), made_batch()
    hidden = batch.teacher.clone().requires_grad_()
    ce, kl = terms_of(Doge(Config()), head, (proxy,), batch, hidden)
    (pushed,) = torch.autograd.grad(kl, hidden, retain_graph=True)
    assert torch.equal(pushed[~batch.reasoning], torch.zeros_like(pushed[~batch.reasoning]))
    assert (pushed[batch.reasoning].abs().sum(1) > 0).all()
    (held,) = torch.autograd.grad(ce, hidden)
    assert (held.abs().sum(1) > 0).all()


def test_two_proxies_are_averaged() -> None:
    head, batch, doge = made_head(), made_batch(proxies=2), Doge(Config(strength=0.7))
    one, two = made_proxy(30), made_proxy(40)

    def alone(proxy: ProxyHead, index: int) -> tuple[float, Tensor]:
        part = FeatureBatch(
            batch.ids, batch.targets, batch.reasoning, batch.teacher, (batch.proxies[index],)
        )
        return gradients(doge, head, (proxy,), part)

    both, gradient = gradients(doge, head, (one, two), batch)
    first, second = alone(one, 0), alone(two, 1)
    assert both == pytest.approx((first[0] + second[0]) / 2, rel=1e-6)
    torch.testing.assert_close(gradient, (first[1] + second[1]) / 2, rtol=1e-5, atol=1e-6)
    twice = FeatureBatch(
        batch.ids, batch.targets, batch.reasoning, batch.teacher, (batch.proxies[0],) * 2
    )
    same, same_gradient = gradients(doge, head, (one, one), twice)
    assert same == pytest.approx(first[0], rel=1e-6)
    torch.testing.assert_close(same_gradient, first[1], rtol=1e-5, atol=1e-6)


def test_the_clamp_stops_pushing_above_it_and_is_silent_below() -> None:
    head, proxy, batch = made_head(), made_proxy(7), made_batch()
    each = each_kl(head, proxy, batch, 2.0)[batch.reasoning]
    plain = gradients(Doge(Config(strength=0)), head, (proxy,), batch)
    free = gradients(Doge(Config(strength=1)), head, (proxy,), batch)
    low = each.min().item() / 2
    value, gradient = gradients(Doge(Config(strength=1, clamp=low)), head, (proxy,), batch)
    assert value == pytest.approx(plain[0] - low * len(each), rel=1e-5)
    torch.testing.assert_close(gradient, plain[1], rtol=0, atol=1e-6)
    high = each.max().item() * 2
    value, gradient = gradients(Doge(Config(strength=1, clamp=high)), head, (proxy,), batch)
    assert value == free[0]
    assert torch.equal(gradient, free[1])
    # Between the two, each token is judged by itself.
    middle = each.median().item() + 1e-4
    value, _ = gradients(Doge(Config(strength=1, clamp=middle)), head, (proxy,), batch)
    assert value == pytest.approx(plain[0] - each.clamp(max=middle).sum().item(), rel=1e-5)


def test_a_proxy_that_is_the_teacher_leaves_the_cross_entropy_alone() -> None:
    head, batch = made_head(), made_batch()
    twin = ProxyHead(head.weight, head.bias, identity(VOCAB))
    same = FeatureBatch(batch.ids, batch.targets, batch.reasoning, batch.teacher, (batch.teacher,))
    assert kl_of(Doge(Config()), head, (twin,), same).item() == pytest.approx(0, abs=1e-6)
    plain = gradients(Doge(Config(strength=0)), head, (twin,), same)
    actual = gradients(Doge(Config(strength=5)), head, (twin,), same)
    assert actual[0] == pytest.approx(plain[0], rel=1e-6)
    torch.testing.assert_close(actual[1], plain[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 2, 4, 8])
def test_chunks_change_nothing(tokens: int) -> None:
    head, batch = made_head(), made_batch(proxies=2)
    proxies = (made_proxy(30), made_proxy(40))
    whole = gradients(Doge(Config(strength=0.7)), head, proxies, batch)
    chunked = Doge(Config(strength=0.7), budget=tokens * VOCAB)
    actual = gradients(chunked, head, proxies, batch)
    assert actual[0] == pytest.approx(whole[0], rel=1e-6)
    torch.testing.assert_close(actual[1], whole[1], rtol=1e-5, atol=1e-6)


def test_gradients_reach_the_head_alone() -> None:
    head, proxy, batch = made_head(), made_proxy(7), made_batch()
    proxy.weight.requires_grad_()
    proxy.bias.requires_grad_()
    states = batch.proxies[0].clone().requires_grad_()
    watched = FeatureBatch(batch.ids, batch.targets, batch.reasoning, batch.teacher, (states,))
    gradients(Doge(Config(strength=1)), head, (proxy,), watched)
    assert proxy.weight.grad is None
    assert proxy.bias.grad is None
    assert states.grad is None
    assert head.weight.grad.abs().sum() > 0
    assert head.bias.grad.abs().sum() > 0
    # Both distributions are normalised, so pushing every logit alike changes neither.
    assert head.bias.grad.sum().item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(
    ("reduction", "mask", "expected"),
    [
        ("sum", "reasoning", 0.3),
        ("token_mean", "reasoning", 0.3 * 40 / 30),
        ("release", "reasoning", 0.3 * 40 / 4),
        ("sum", "none", 0.3),
        ("token_mean", "none", 0.3),
        ("release", "none", 0.3 * 40 / 4),
    ],
)
def test_equivalent_strengths_by_hand(reduction: str, mask: str, expected: float) -> None:
    config = Config(strength=0.3, reduction=reduction, mask=mask)
    actual = equivalent_strength(config, completion_tokens=40, reasoning_tokens=30, sequences=4)
    assert actual == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("reduction", ["sum", "token_mean", "release"])
def test_a_converted_strength_pulls_in_the_same_direction(reduction: str) -> None:
    head, proxy, batch = made_head(), made_proxy(7), made_batch()
    reasoning = int(batch.reasoning.sum())
    doge = Doge(Config(strength=0.4, reduction=reduction))
    ce, kl = terms_of(doge, head, (proxy,), batch)
    # The three objectives as their authors wrote them.
    literal = {
        "sum": ce - 0.4 * kl,
        "token_mean": ce / TOKENS - 0.4 * kl / reasoning,
        "release": ce / TOKENS - 0.4 * kl / len(batch.ids),
    }[reduction]
    parts = torch.autograd.grad(literal, [head.weight, head.bias])
    literal_gradient = torch.cat([part.flatten() for part in parts])
    doge.calibrate(completion_tokens=TOKENS, reasoning_tokens=reasoning, sequences=2)
    _, actual = gradients(doge, head, (proxy,), batch)
    scale = 1 if reduction == "sum" else TOKENS
    torch.testing.assert_close(actual, literal_gradient * scale, rtol=1e-4, atol=1e-5)


def test_data_without_reasoning_is_an_error_that_says_what_to_do() -> None:
    batch = made_batch(reasoning=(0, 0))
    item = Features("one", batch.targets, batch.reasoning, ~batch.reasoning, batch.teacher)
    proxy_item = Features("one", batch.targets, batch.reasoning, ~batch.reasoning, batch.proxies[0])
    data = [FeaturePair(item, (proxy_item,))]
    training = HeadTraining(floor=None)
    with pytest.raises(ValueError, match=r"no trace has a reasoning token.*or set mask=none"):
        HeadSearch(made_head(), (made_proxy(7),), data, Doge(Config()), training).run()


def test_rows_that_pad_the_head_are_left_out() -> None:
    # Two more rows than there are tokens, as some checkpoints have; no proxy knows them.
    head, proxy, batch = made_head(), made_proxy(7), made_batch()
    padded = Head(
        torch.cat([head.weight, drawn(60, 2, HIDDEN)]), torch.cat([head.bias, drawn(61, 2)])
    )
    kl = kl_of(Doge(Config()), padded, (proxy,), batch)
    expected = each_kl(head, proxy, batch, 2.0)[batch.reasoning].sum()
    assert kl.item() == pytest.approx(expected.item(), rel=1e-5)


def test_no_proxy_is_an_error_only_when_one_is_needed() -> None:
    batch = made_batch(proxies=0)
    with pytest.raises(ValueError, match="at least one proxy; name one under `proxies`"):
        Doge(Config(strength=0.1)).loss(made_head(), (), batch)
    value, _ = gradients(Doge(Config(strength=0)), made_head(), (), batch)
    assert value > 0


@pytest.mark.parametrize(
    ("key", "value"),
    [("strength", -1), ("temperature", 0), ("clamp", 0), ("mask", "answer"), ("reduction", "mean")],
)
def test_a_value_that_makes_no_sense_is_refused_with_its_name(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"defense doge: {key}: .*{value!r}"):
        defenses.resolve({"name": "doge", key: value})


def test_strength_zero_leaves_the_head_bit_for_bit() -> None:
    head, batch = made_head(), made_batch()
    before = {name: value.detach().clone() for name, value in head.named_parameters()}
    item = Features("one", batch.targets, batch.reasoning, ~batch.reasoning, batch.teacher)
    data = [FeaturePair(item, (item,))]
    doge = Doge(Config(strength=0))
    result = HeadSearch(head, (made_proxy(7),), data, doge, HeadTraining()).run()
    assert result.strength == 0
    for name, value in head.named_parameters():
        assert torch.equal(value, before[name])
