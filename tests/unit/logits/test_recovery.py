"""An attacker with log-probabilities and a logit bias reads the logits of a prompt."""

import pickle

import pytest
import torch
from oracle_doubles import Hiding, Metered, true_logits
from transformers import PreTrainedModel

from azeotrope import models
from azeotrope.logits.oracle import ModelOracle, Oracle, RefusedError
from azeotrope.logits.recovery import random_prompts, recover_logits, sample_tokens


@pytest.fixture(scope="module")
def small() -> PreTrainedModel:
    return models.load("pocket/small").model


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
    found = recover_logits(ModelOracle(small), prompt, tokens, top_k=5)
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
    with pytest.raises(RefusedError, match="shows 1 log-probabilities per query"):
        recover_logits(ModelOracle(small, top_k=1), (1, 2, 3), range(129))


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


def test_an_empty_prompt_is_an_error(small) -> None:
    with pytest.raises(ValueError, match="prompt is empty"):
        recover_logits(Metered(small, 0), (), [1, 2])
