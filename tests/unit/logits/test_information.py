"""What distributions tell of a context beyond the next token: bracketed, cross-fitted, chunked."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from azeotrope.logits import information
from azeotrope.logits.information import InformationEstimate, conditional_mutual_information

VOCAB, HIDDEN, TEXTS, LENGTH = 11, 6, 12, 20


def random_case(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states that depend on the target, on the text and on chance."""
    generator = torch.Generator().manual_seed(seed)
    tokens = TEXTS * LENGTH
    targets = torch.randint(VOCAB, (tokens,), generator=generator)
    texts = torch.arange(TEXTS).repeat_interleave(LENGTH)
    by_target = torch.randn(VOCAB, HIDDEN, generator=generator)[targets]
    by_text = torch.randn(TEXTS, HIDDEN, generator=generator)[texts]
    hidden = by_target + 0.3 * by_text + 0.5 * torch.randn(tokens, HIDDEN, generator=generator)
    return hidden, torch.randn(VOCAB, HIDDEN, generator=generator), targets, texts


def of_distributions(p: Tensor, targets: Tensor, texts: Tensor, **options) -> InformationEstimate:
    """The estimate for given distributions: their logarithms are logits under an identity head."""
    return conditional_mutual_information(
        p.log().float(), torch.eye(p.shape[1]), targets, texts, **options
    )


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p.log() - q.log())).sum(-1)


def test_two_distributions_about_one_centroid_by_hand() -> None:
    # Every text has both, so every half has the centroid (0.7, 0.3).
    p = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).repeat(4, 1)
    found = of_distributions(p, torch.zeros(8, dtype=torch.long), torch.arange(8) // 2)
    first = 0.5 * math.log(0.5 / 0.7) + 0.5 * math.log(0.5 / 0.3)
    second = 0.9 * math.log(0.9 / 0.7) + 0.1 * math.log(0.1 / 0.3)
    assert found.value == pytest.approx((first + second) / 2, abs=1e-6)
    assert found.in_sample == pytest.approx(found.value, abs=1e-6)
    assert found.ci95 == pytest.approx((found.value, found.value), abs=1e-6)
    assert (found.positions, found.covered, found.labels, found.texts) == (8, 1.0, 1, 4)


def test_a_centroid_never_saw_the_text_that_it_is_compared_with() -> None:
    generator = torch.Generator().manual_seed(1)
    p = torch.rand(12, 3, generator=generator).double().softmax(-1)
    texts = torch.tensor([5, 5, 5, 7, 7, 7, 7, 0, 0, 2, 2, 2])
    targets = torch.tensor([0, 0, 1, 0, 1, 1, 0, 0, 1, 1, 0, 1])
    possible = []
    for half in itertools.combinations([0, 2, 5, 7], 2):
        inside = torch.isin(texts, torch.tensor(half))
        total = torch.zeros(())
        for label, this in itertools.product((0, 1), (inside, ~inside)):
            own, others = this & (targets == label), ~this & (targets == label)
            total = total + kl(p[own], p[others].mean(0)).sum()
        possible.append(total.item() / 12)
    found = {
        round(of_distributions(p, targets, texts, least=1, seed=seed).value, 6)
        for seed in range(30)
    }
    assert found == {round(value, 6) for value in possible}
    assert len(found) == 3


def test_outputs_that_depend_on_the_next_token_alone_carry_none() -> None:
    _, weight, targets, texts = random_case()
    by_target = torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(9))
    found = conditional_mutual_information(by_target[targets], weight, targets, texts)
    assert abs(found.value) < 1e-6
    assert abs(found.in_sample) < 1e-6
    other = torch.randperm(len(targets), generator=torch.Generator().manual_seed(9))
    found = conditional_mutual_information(by_target[targets[other]], weight, targets, texts)
    assert found.value > 0.1


def test_the_truth_lies_between_the_two_estimates() -> None:
    # Distributions (u, 1 - u) with u uniform: the centroid is (1/2, 1/2), and the mean of
    # KL to it is log 2 + E[u log u + (1 - u) log(1 - u)] = log 2 - 1/2.
    truth = math.log(2) - 0.5
    values, plain = [], []
    for seed in range(20):
        u = torch.rand(24, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        found = of_distributions(
            torch.stack([u, 1 - u], 1), torch.arange(24) % 2, torch.arange(24) // 3, seed=seed
        )
        assert found.in_sample < found.value
        values.append(found.value)
        plain.append(found.in_sample)
    assert sum(plain) / 20 < truth < sum(values) / 20
    u = torch.rand(40_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    both = torch.stack([u, 1 - u], 1)
    found = of_distributions(
        both, torch.zeros(40_000, dtype=torch.long), torch.arange(40_000) // 10
    )
    assert found.value == pytest.approx(truth, abs=3e-3)
    assert found.ci95[0] < truth < found.ci95[1]


@pytest.mark.parametrize("budget", [1, VOCAB, 5 * VOCAB, 16 * VOCAB, 100 * VOCAB])
@pytest.mark.parametrize("with_bias", [True, False])
def test_chunking_changes_nothing_and_keeps_to_the_budget(
    budget: int, with_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight, targets, texts = random_case()
    bias = torch.randn(VOCAB, generator=torch.Generator().manual_seed(3)) if with_bias else None
    whole = conditional_mutual_information(hidden, weight, targets, texts, bias)
    sizes, real = [], information.head_logits
    monkeypatch.setattr(
        information, "head_logits", lambda *given: sizes.append(len(given[0])) or real(*given)
    )
    found = conditional_mutual_information(hidden, weight, targets, texts, bias, budget=budget)
    assert max(sizes) == 1 or max(sizes) * VOCAB <= budget
    # Each covered position twice: once for the centroids, once to be compared with one.
    assert sum(sizes) == 2 * found.positions
    assert found.value == pytest.approx(whole.value, abs=1e-6)
    assert found.in_sample == pytest.approx(whole.in_sample, abs=1e-6)
    assert found.ci95 == pytest.approx(whole.ci95, abs=1e-6)


def test_the_order_of_positions_and_the_names_of_texts_mean_nothing() -> None:
    hidden, weight, targets, texts = random_case()
    found = conditional_mutual_information(hidden, weight, targets, texts)
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(4))
    mixed = conditional_mutual_information(
        hidden[order], weight, targets[order], 1000 + 7 * texts[order]
    )
    assert mixed.value == pytest.approx(found.value, abs=1e-6)
    assert mixed.ci95 == pytest.approx(found.ci95, abs=1e-6)


def test_the_interval_contains_the_value_and_narrows_with_texts() -> None:
    hidden, weight, targets, texts = random_case()
    found = conditional_mutual_information(hidden, weight, targets, texts)
    assert found.ci95[0] < found.value < found.ci95[1]
    again = conditional_mutual_information(hidden, weight, targets, texts)
    assert again == found
    more = conditional_mutual_information(
        hidden.repeat(16, 1),
        weight,
        targets.repeat(16),
        torch.arange(16 * TEXTS * LENGTH) // LENGTH,
    )
    width = found.ci95[1] - found.ci95[0]
    assert (more.ci95[1] - more.ci95[0]) == pytest.approx(width / 4, rel=0.4)


def test_sharper_differences_within_a_label_carry_more() -> None:
    hidden, weight, targets, texts = random_case()
    values = [
        conditional_mutual_information(scale * hidden, weight, targets, texts).value
        for scale in (0.25, 0.5, 1.0, 2.0)
    ]
    assert values == sorted(values)
    assert values[0] > 0


def test_what_all_logits_share_carries_nothing() -> None:
    hidden, weight, targets, texts = random_case()
    found = conditional_mutual_information(hidden, weight, targets, texts)
    shift = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(6))
    moved = conditional_mutual_information(hidden, weight + shift, targets, texts)
    assert moved.value == pytest.approx(found.value, abs=1e-5)


def test_logits_too_far_apart_for_float32_probabilities_are_exact() -> None:
    # The other half holds its second token for exp(-300), which float32 cannot hold.
    logits = torch.tensor([[0.0, -300.0]] * 4 + [[0.0, 0.0]] * 4)
    targets, texts = torch.zeros(8, dtype=torch.long), torch.arange(8) // 2
    found = {
        round(
            conditional_mutual_information(logits, torch.eye(2), targets, texts, seed=seed).value, 3
        )
        for seed in range(30)
    }
    apart = (150 - math.log(2) + math.log(2)) / 2
    mixed = (math.log(4 / 3) + 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)) / 2
    assert found == {round(apart, 3), round(mixed, 3)}


def test_a_banned_token_is_as_good_as_absent() -> None:
    hidden, weight, targets, texts = random_case()
    targets = targets.clamp(max=VOCAB - 2)
    ban = torch.zeros(VOCAB)
    ban[-1] = -torch.inf
    found = conditional_mutual_information(hidden, weight, targets, texts, ban)
    without = conditional_mutual_information(hidden, weight[:-1], targets, texts)
    assert found.value == pytest.approx(without.value, abs=1e-6)
    assert found.in_sample == pytest.approx(without.in_sample, abs=1e-6)


def test_rare_next_tokens_are_left_out_and_counted() -> None:
    hidden, weight, _, texts = random_case()
    targets = torch.arange(TEXTS * LENGTH) % 2
    targets[3], targets[170] = 7, 9
    found = conditional_mutual_information(hidden, weight, targets, texts)
    assert (found.labels, found.positions) == (2, TEXTS * LENGTH - 2)
    assert found.covered == (TEXTS * LENGTH - 2) / (TEXTS * LENGTH)
    keep = targets < 2
    without = conditional_mutual_information(hidden[keep], weight, targets[keep], texts[keep])
    assert found.value == pytest.approx(without.value, abs=1e-6)


def test_texts_without_a_covered_position_are_not_drawn() -> None:
    hidden, weight, _, texts = random_case()
    targets = torch.zeros(TEXTS * LENGTH, dtype=torch.long)
    targets[-LENGTH:] = 5
    found = conditional_mutual_information(hidden, weight, targets, texts)
    assert (found.texts, found.positions) == (TEXTS - 1, (TEXTS - 1) * LENGTH)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.zeros(3, dtype=torch.long)}, "got 240, 3 and 240"),
        ({"texts": torch.zeros(5, dtype=torch.long)}, "got 240, 240 and 5"),
        ({"targets": torch.full((240,), VOCAB)}, "vocabulary of 11; got 11 to 11"),
        ({"targets": torch.full((240,), -100)}, "got -100 to -100"),
        ({"texts": torch.arange(240) % 3}, "4 texts or more are needed, two in each half; got 3"),
        ({"least": 1000}, "none of the 11 next tokens occurs 1000 times or more"),
        ({"least": 0}, "least must be 1 or more, got 0"),
        ({"hidden": torch.full((240, HIDDEN), torch.nan)}, "a logit is not finite"),
    ],
)
def test_bad_input_is_one_clear_error(change, message: str) -> None:
    names = ("hidden", "weight", "targets", "texts")
    given = dict(zip(names, random_case(), strict=True)) | change
    with pytest.raises(ValueError, match=message) as error:
        conditional_mutual_information(**given)
    assert "\n" not in str(error.value)


def test_no_positions_are_an_error() -> None:
    none = torch.zeros(0, dtype=torch.long)
    with pytest.raises(ValueError, match="at least one; got 0, 0 and 0"):
        conditional_mutual_information(torch.zeros(0, 2), torch.eye(2), none, none)
