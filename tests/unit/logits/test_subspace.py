"""A thief with log-probabilities and a logit bias reads the hidden size; without both, nothing."""

import pickle
from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from azeotrope import models
from azeotrope.heads.folding import fold
from azeotrope.logits.subspace import (
    ModelOracle,
    Oracle,
    RefusedError,
    Shown,
    Subspace,
    random_prompts,
    recover_logits,
    recover_subspace,
    sample_tokens,
)

VOCAB, HIDDEN = 600, 48


@pytest.fixture(scope="module")
def small() -> PreTrainedModel:
    return models.load("pocket/small").model


@pytest.fixture(scope="module")
def teacher() -> PreTrainedModel:
    return models.load("pocket/teacher").model


def llama() -> LlamaForCausalLM:
    torch.manual_seed(11)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=32,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def wide() -> LlamaForCausalLM:
    """A vocabulary far larger than the hidden size, as real models have it."""
    return llama()


class Hiding(ModelOracle):
    """An API that takes a bias, and shows log-probabilities without it."""

    def query(self, prompt_ids: Sequence[int], logit_bias: Mapping[int, float]) -> Shown:
        return super().query(prompt_ids, {})


class Metered(ModelOracle):
    """An API that stops answering after a number of queries."""

    def __init__(self, model: PreTrainedModel, allowance: int) -> None:
        super().__init__(model)
        self.allowance = allowance

    def query(self, prompt_ids: Sequence[int], logit_bias: Mapping[int, float]) -> Shown:
        if self.allowance == 0:
            raise RefusedError("quota exceeded")
        self.allowance -= 1
        return super().query(prompt_ids, logit_bias)


def steal(model: PreTrainedModel, prompts: int, tokens: int | None = None, **rules) -> Subspace:
    vocab = model.config.vocab_size
    return recover_subspace(
        ModelOracle(model, **rules),
        random_prompts(vocab, prompts),
        sample_tokens(vocab, tokens or vocab),
    )


def true_logits(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.tensor(prompts)).logits[:, -1].double()


# What the API answers.


def test_the_oracle_shows_the_likeliest_tokens_of_the_biased_softmax(small) -> None:
    prompt = (1, 20, 30, 4)
    logits = true_logits(small, [prompt])[0]
    rare = int(logits.argmin())
    for bias in ({}, {rare: 100.0, 7: 2.5}):
        expected = logits.clone()
        for token, value in bias.items():
            expected[token] += value
        log_p, ids = expected.log_softmax(0).topk(5)
        shown = ModelOracle(small).query(prompt, bias)
        assert [token for token, _ in shown] == ids.tolist()
        assert [value for _, value in shown] == pytest.approx(log_p.tolist(), abs=1e-5)
    assert shown[0][0] == rare
    rounded = ModelOracle(small, decimals=1).query(prompt, {})
    assert [value for _, value in rounded] == [round(value, 1) for _, value in rounded]
    assert isinstance(ModelOracle(small), Oracle)


def test_the_oracle_runs_the_model_once_a_prompt(small) -> None:
    calls = []
    handle = small.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        recover_logits(ModelOracle(small), (1, 2, 3), range(129))
    finally:
        handle.remove()
    assert len(calls) == 1


def test_the_oracle_refuses_a_bias_by_its_rules(small) -> None:
    oracle = ModelOracle(small, allow_bias=False)
    assert len(oracle.query((1, 2), {})) == 5
    with pytest.raises(RefusedError, match="cannot be combined"):
        oracle.query((1, 2), {3: 1.0})


def test_a_refusal_travels_between_processes() -> None:
    error = pickle.loads(pickle.dumps(RefusedError("quota exceeded")))
    assert isinstance(error, RefusedError)
    assert str(error) == "quota exceeded"


# Logits of one prompt.


@pytest.mark.parametrize("top_k", [2, 5, 129])
def test_all_logits_of_a_prompt_come_back(small, top_k: int) -> None:
    prompt = (1, 20, 30, 4)
    logits = true_logits(small, [prompt])[0]
    oracle = Metered(small, 1 + -(-128 // (top_k - 1)))
    oracle.top_k = top_k
    found = recover_logits(oracle, prompt, range(129))
    torch.testing.assert_close(found, logits - logits[0], rtol=0, atol=1e-4)
    assert oracle.allowance == 0


def test_chosen_logits_come_back_in_their_order(small) -> None:
    prompt, tokens = (5, 6, 7), [90, 3, 128, 40, 17, 5, 77]
    logits = true_logits(small, [prompt])[0, tokens]
    found = recover_logits(ModelOracle(small), prompt, tokens, shown=5)
    torch.testing.assert_close(found, logits - logits[0], rtol=0, atol=1e-4)


def test_repeats_average_the_rounding_away(small) -> None:
    prompt = (5, 6, 7)
    logits = true_logits(small, [prompt])[0]
    # The likeliest token as the reference: its own log-probability is next to 0 and without the
    # dither rounds the same way every time.
    tokens = logits.argsort(descending=True).tolist()
    truth = logits[tokens] - logits.max()
    errors = [
        (recover_logits(ModelOracle(small, decimals=1), prompt, tokens, repeats=n) - truth)
        .square()
        .mean()
        .sqrt()
        .item()
        for n in (1, 64)
    ]
    # Two uniform errors of width 0.1: 0.1 sqrt(2 / 12) = 0.041, and an eighth of it.
    assert errors[0] == pytest.approx(0.041, rel=0.4)
    assert errors[1] == pytest.approx(0.041 / 8, rel=0.4)


def test_an_api_that_hides_the_bias_is_a_refusal(small) -> None:
    with pytest.raises(RefusedError, match=r"does not show token \d+ under a bias of 100"):
        recover_logits(Hiding(small), (1, 2, 3), range(129))
    with pytest.raises(RefusedError, match="a greater one is needed"):
        recover_logits(ModelOracle(small), (1, 2, 3), range(129), bias=0.01)
    with pytest.raises(RefusedError, match="shows 1 log-probabilities a query"):
        recover_logits(ModelOracle(small, top_k=1), (1, 2, 3), range(129))


# The subspace.


def test_the_hidden_size_of_a_pocket_model_is_recovered_exactly(small) -> None:
    found = steal(small, prompts=110)
    assert (found.hidden_size, found.saturated, found.label) == (96, False, "96")
    assert found.gap > 1000
    assert found.queries == 1 + 110 * 32
    assert (found.prompts, len(found.tokens), found.refused) == (110, 129, None)
    assert len(found.singular_values) == 109


def test_two_prompts_more_than_the_hidden_size_are_needed_and_enough(small) -> None:
    assert steal(small, prompts=98).label == "96"
    # As many singular values as prompts - 1, and none of them shows where they end.
    assert steal(small, prompts=97).label == ">= 96"
    assert steal(small, prompts=60).label == ">= 59"


def test_two_tokens_more_than_the_hidden_size_are_needed_and_enough(wide) -> None:
    assert steal(wide, prompts=60, tokens=HIDDEN + 2).label == "48"
    assert steal(wide, prompts=60, tokens=HIDDEN + 1).label == ">= 48"
    assert steal(wide, prompts=60, tokens=20).label == ">= 19"


def test_a_hidden_size_beyond_the_vocabulary_gives_only_a_bound(teacher) -> None:
    assert teacher.config.hidden_size == 160
    found = steal(teacher, prompts=140)
    assert (found.hidden_size, found.saturated, found.gap) == (128, True, 1.0)
    assert found.label == ">= 128"


def test_a_part_of_a_large_vocabulary_is_enough(wide) -> None:
    found = steal(wide, prompts=64, tokens=100)
    assert (found.hidden_size, found.saturated) == (HIDDEN, False)
    assert found.queries == 1 + 64 * 25


def test_the_basis_spans_the_head_up_to_a_constant(wide) -> None:
    found = steal(wide, prompts=64, tokens=100)
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
        steal(with_head(weight), prompts=64, tokens=100),
        steal(wide, prompts=64, tokens=100),
    )
    assert found.label == clean.label == "48"
    # It has moved the subspace: some direction of the old one is now outside.
    cosines = torch.linalg.svdvals(found.basis @ clean.basis.T)
    assert cosines[0] == pytest.approx(1.0, abs=1e-6)
    assert (cosines < 0.99).sum() == 8


def test_a_bias_of_the_head_adds_no_dimension(wide) -> None:
    bias = 3 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(5))
    found = steal(with_head(wide.lm_head.weight.detach(), bias), prompts=64, tokens=100)
    assert found.label == "48"


def test_a_direction_that_moves_all_logits_alike_is_lost(wide) -> None:
    weight = wide.lm_head.weight.detach().clone()
    weight[:, 0] = 1.0
    assert steal(with_head(weight), prompts=64, tokens=100).label == "47"


def test_a_layer_norm_costs_one_dimension() -> None:
    torch.manual_seed(12)
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=32, n_embd=HIDDEN, n_layer=1, n_head=4, initializer_range=0.3
    )
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        model.transformer.ln_f.bias.normal_()
    assert steal(model, prompts=64, tokens=100).label == "47"


def test_fine_rounding_is_seen_through(small) -> None:
    found = steal(small, prompts=130, decimals=3)
    assert (found.label, found.queries) == ("96", 4161)
    assert 3 < found.gap < 100


@pytest.mark.parametrize(("decimals", "least"), [(2, 70), (1, 40)])
def test_coarse_rounding_leaves_a_bound_that_holds(small, decimals: int, least: int) -> None:
    found = steal(small, prompts=200, decimals=decimals)
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
    found = steal(small, prompts=110, allow_bias=False, decimals=decimals)
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


# Bad input.


def test_tokens_are_drawn_once_each_from_the_vocabulary() -> None:
    assert sample_tokens(129) == list(range(129))
    drawn = sample_tokens(49152)
    assert len(set(drawn)) == len(drawn) == 1024
    assert min(drawn) >= 0
    assert max(drawn) < 49152
    assert drawn == sample_tokens(49152)
    assert drawn != sample_tokens(49152, seed=1)
    with pytest.raises(ValueError, match="got vocab 129 and count 1"):
        sample_tokens(129, 1)


def test_prompts_are_different() -> None:
    drawn = random_prompts(3, 27, length=3)
    assert len(set(drawn)) == 27
    with pytest.raises(ValueError, match="no 28 different prompts of 3 tokens out of 3"):
        random_prompts(3, 28, length=3)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"top_k": 0}, "between 1 and the vocabulary 129, got 0"),
        ({"top_k": 130}, "between 1 and the vocabulary 129, got 130"),
        ({"decimals": -1}, "decimals must be 0 or more"),
    ],
)
def test_impossible_rules_of_an_api_are_refused(small, rules, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelOracle(small, **rules)


@pytest.mark.parametrize(
    ("prompt", "bias", "message"),
    [
        ((), {}, "prompt is empty"),
        ((1, 129), {}, "129 is not in the vocabulary of 129"),
        ((1,), {-1: 2.0}, "-1 is not in the vocabulary"),
    ],
)
def test_impossible_queries_are_refused(small, prompt, bias, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelOracle(small).query(prompt, bias)


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


def test_an_empty_prompt_is_an_error(small) -> None:
    with pytest.raises(ValueError, match="prompt is empty"):
        recover_logits(Metered(small, 0), (), [1, 2])
