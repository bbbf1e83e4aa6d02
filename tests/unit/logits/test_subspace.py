"""Log-probabilities and a logit bias reveal the hidden size; without either, nothing."""

import pytest
import torch
from oracle_doubles import HIDDEN, VOCAB, Hiding, Metered, llama
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedModel

from azeotrope import models
from azeotrope.heads.folding import fold
from azeotrope.logits.oracle import ModelOracle
from azeotrope.logits.recovery import random_prompts, recover_logits, sample_tokens
from azeotrope.logits.subspace import Subspace, recover_subspace


@pytest.fixture(scope="module")
def small() -> PreTrainedModel:
    return models.load("pocket/small").model


@pytest.fixture(scope="module")
def teacher() -> PreTrainedModel:
    return models.load("pocket/teacher").model


@pytest.fixture(scope="module")
def wide() -> LlamaForCausalLM:
    """A vocabulary far larger than the hidden size, as real models have it."""
    return llama()


def recovered(model: PreTrainedModel, prompts: int, tokens: int | None = None, **rules) -> Subspace:
    vocab = model.config.vocab_size
    return recover_subspace(
        ModelOracle(model, **rules),
        random_prompts(vocab, prompts),
        sample_tokens(vocab, tokens or vocab),
    )


def test_the_hidden_size_of_a_pocket_model_is_recovered_exactly(small) -> None:
    found = recovered(small, prompts=110)
    assert (found.hidden_size, found.saturated, found.label) == (96, False, "96")
    assert found.gap > 1000
    assert found.queries == 1 + 110 * 32
    assert (found.prompts, len(found.tokens), found.refused) == (110, 129, None)
    assert len(found.singular_values) == 109


def test_two_prompts_more_than_the_hidden_size_are_needed_and_enough(small) -> None:
    assert recovered(small, prompts=98).label == "96"
    # As many singular values as prompts - 1, and none of them shows where they end.
    assert recovered(small, prompts=97).label == ">= 96"
    assert recovered(small, prompts=60).label == ">= 59"


def test_two_tokens_more_than_the_hidden_size_are_needed_and_enough(wide) -> None:
    assert recovered(wide, prompts=60, tokens=HIDDEN + 2).label == "48"
    assert recovered(wide, prompts=60, tokens=HIDDEN + 1).label == ">= 48"
    assert recovered(wide, prompts=60, tokens=20).label == ">= 19"


def test_a_hidden_size_beyond_the_vocabulary_gives_only_a_bound(teacher) -> None:
    assert teacher.config.hidden_size == 160
    found = recovered(teacher, prompts=140)
    assert (found.hidden_size, found.saturated, found.gap) == (128, True, 1.0)
    assert found.label == ">= 128"


def test_a_part_of_a_large_vocabulary_is_enough(wide) -> None:
    found = recovered(wide, prompts=64, tokens=100)
    assert (found.hidden_size, found.saturated) == (HIDDEN, False)
    assert found.queries == 1 + 64 * 25


def test_the_basis_spans_the_head_up_to_a_constant(wide) -> None:
    found = recovered(wide, prompts=64, tokens=100)
    basis = found.basis
    torch.testing.assert_close(basis @ basis.T, torch.eye(HIDDEN).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(basis.sum(1), torch.zeros(HIDDEN).double(), rtol=0, atol=1e-6)
    head = wide.lm_head.weight.detach().double()[list(found.tokens)]
    head = head - head.mean(0)
    inside = basis.T @ (basis @ head)
    assert (head - inside).norm() < 1e-4 * head.norm()
    # The test can tell: another head is mostly outside.
    other = torch.randn(head.shape, generator=torch.Generator().manual_seed(0)).double()
    assert (other - basis.T @ (basis @ other)).norm() > 0.6 * other.norm()


def with_head(weight: torch.Tensor, bias: torch.Tensor | None = None) -> LlamaForCausalLM:
    model = llama()
    model.lm_head = nn.Linear(HIDDEN, VOCAB, bias=bias is not None)
    model.lm_head.weight = nn.Parameter(weight)
    if bias is not None:
        model.lm_head.bias = nn.Parameter(bias)
    return model


def test_a_map_of_low_rank_folded_into_the_head_leaves_the_hidden_size(wide) -> None:
    generator = torch.Generator().manual_seed(4)
    up, down = (
        torch.randn(VOCAB, 8, generator=generator),
        torch.randn(8, VOCAB, generator=generator),
    )
    weight, _ = fold(wide.lm_head.weight.detach(), None, up * 0.1, down * 0.1)
    found, clean = (
        recovered(with_head(weight), prompts=64, tokens=100),
        recovered(wide, prompts=64, tokens=100),
    )
    assert found.label == clean.label == "48"
    # It has moved the subspace: some direction of the old one is now outside.
    cosines = torch.linalg.svdvals(found.basis @ clean.basis.T)
    assert cosines[0] == pytest.approx(1.0, abs=1e-6)
    assert (cosines < 0.99).sum() == 8


def test_a_bias_of_the_head_adds_no_dimension(wide) -> None:
    bias = 3 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(5))
    found = recovered(with_head(wide.lm_head.weight.detach(), bias), prompts=64, tokens=100)
    assert found.label == "48"


def test_a_direction_that_moves_all_logits_alike_is_lost(wide) -> None:
    weight = wide.lm_head.weight.detach().clone()
    weight[:, 0] = 1.0
    assert recovered(with_head(weight), prompts=64, tokens=100).label == "47"


def test_a_layer_norm_costs_one_dimension() -> None:
    torch.manual_seed(12)
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=32, n_embd=HIDDEN, n_layer=1, n_head=4, initializer_range=0.3
    )
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        model.transformer.ln_f.bias.normal_()
    assert recovered(model, prompts=64, tokens=100).label == "47"


def test_fine_rounding_is_seen_through(small) -> None:
    found = recovered(small, prompts=130, decimals=3)
    assert (found.label, found.queries) == ("96", 4161)
    assert 3 < found.gap < 100


@pytest.mark.parametrize(("decimals", "least"), [(2, 70), (1, 40)])
def test_coarse_rounding_leaves_a_bound_that_holds(small, decimals: int, least: int) -> None:
    found = recovered(small, prompts=200, decimals=decimals)
    assert found.saturated
    assert found.hidden_size is not None
    assert least <= found.hidden_size <= 96


def test_coarse_rounding_is_undone_by_asking_again(wide) -> None:
    tokens, prompts = sample_tokens(VOCAB, 60), random_prompts(VOCAB, 120)
    oracle = ModelOracle(wide, decimals=1)
    once = recover_subspace(oracle, prompts, tokens)
    assert once.saturated
    again = recover_subspace(oracle, prompts, tokens, repeats=4)
    assert again.label == "48"
    assert again.queries == 1 + (once.queries - 1) * 4


@pytest.mark.parametrize("decimals", [None, 2])
def test_without_a_bias_nothing_is_learnt(small, decimals: int | None) -> None:
    found = recovered(small, prompts=110, allow_bias=False, decimals=decimals)
    assert (found.hidden_size, found.saturated, found.label) == (None, False, "nothing")
    assert found.refused == "logit_bias cannot be combined with logprobs"
    # One query to see how many tokens are shown, and the one that was refused.
    assert (found.queries, found.prompts) == (2, 0)
    assert found.singular_values.shape == (0,)
    assert found.basis.shape == (0, 129)


def test_other_refusals_are_results_too(small) -> None:
    prompts, tokens = random_prompts(129, 110), sample_tokens(129)
    found = recover_subspace(Hiding(small), prompts, tokens)
    assert found.label == "nothing"
    assert "hides what a bias does" in str(found.refused)
    found = recover_subspace(ModelOracle(small, top_k=1), prompts, tokens)
    assert (found.label, found.queries) == ("nothing", 1)
    found = recover_subspace(Metered(small, 0), prompts, tokens)
    assert (found.label, found.queries, found.refused) == ("nothing", 1, "quota exceeded")


def test_what_was_read_before_a_refusal_is_used(small) -> None:
    prompts, tokens = random_prompts(129, 110), sample_tokens(129)
    found = recover_subspace(Metered(small, 1 + 32 * 20 + 5), prompts, tokens)
    assert (found.label, found.prompts, found.queries) == (">= 19", 20, 1 + 32 * 20 + 6)
    assert found.refused == "quota exceeded"
    found = recover_subspace(Metered(small, 1 + 32 * 100), prompts, tokens)
    assert (found.label, found.prompts, found.refused) == ("96", 100, "quota exceeded")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": [3]}, "two different tokens or more"),
        ({"tokens": [3, 4, 3]}, "got 3 of which 2 differ"),
        ({"bias": 0.0}, "positive number, got 0.0"),
        ({"bias": float("nan")}, "positive number, got nan"),
        ({"repeats": 0}, "at least 1, got 0"),
        ({"prompts": [(1, 2)]}, "two prompts or more"),
        ({"prompts": [(1, 2), ()]}, "none of them empty"),
        ({"prompts": [(1, 2), (3,), (1, 2)]}, "a prompt is there twice"),
    ],
)
def test_bad_input_is_an_error_before_anything_is_asked(small, change, message: str) -> None:
    given = {"prompts": [(1, 2), (3, 4)], "tokens": [1, 2, 3]} | change
    with pytest.raises(ValueError, match=message) as error:
        recover_subspace(Metered(small, 0), **given)
    assert "\n" not in str(error.value)
    if "prompts" not in change:
        arguments = {name: value for name, value in given.items() if name != "prompts"}
        with pytest.raises(ValueError, match=message):
            recover_logits(Metered(small, 0), (1, 2), **arguments)
