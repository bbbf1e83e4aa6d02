"""Losses in token chunks equal the dense ones, and see completion tokens alone."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import Qwen2Config, Qwen2ForCausalLM

from azeotrope.heads import chunked
from azeotrope.logits.chunks import token_chunks
from azeotrope.tokens import Example, collate

TOKENS, VOCAB, HIDDEN, PAD = 11, 13, 6, 0


def tensors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator, requires_grad=True)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator, requires_grad=True)
    bias = torch.randn(VOCAB, generator=generator, requires_grad=True)
    return hidden, weight, bias, torch.randint(VOCAB, (TOKENS,), generator=generator)


@pytest.mark.parametrize("tokens", [1, 2, 5, 10, 11, 100])
@pytest.mark.parametrize("with_bias", [True, False])
def test_chunked_cross_entropy_equals_dense(tokens: int, with_bias: bool) -> None:
    hidden, weight, bias, targets = tensors()
    leaves = [hidden, weight, bias] if with_bias else [hidden, weight]
    dense = F.cross_entropy(
        F.linear(hidden, weight, bias if with_bias else None), targets, reduction="sum"
    )
    expected = torch.autograd.grad(dense, leaves)
    total, count, _ = chunked.cross_entropy(
        hidden, weight, targets, bias if with_bias else None, budget=tokens * VOCAB
    )
    assert count == TOKENS
    torch.testing.assert_close(total, dense, rtol=1e-6, atol=1e-5)
    for actual, gradient in zip(torch.autograd.grad(total, leaves), expected, strict=True):
        torch.testing.assert_close(actual, gradient, rtol=1e-5, atol=1e-5)


def test_a_head_of_zeros_costs_log_vocab_a_token() -> None:
    hidden, _, _, targets = tensors()
    total, count, _ = chunked.cross_entropy(
        hidden, torch.zeros(VOCAB, HIDDEN), targets, budget=3 * VOCAB
    )
    assert total.item() == pytest.approx(count * math.log(VOCAB), rel=1e-6)


def test_no_tokens_cost_nothing() -> None:
    _, weight, _, targets = tensors()
    total, count, _ = chunked.cross_entropy(torch.zeros(0, HIDDEN), weight, targets[:0])
    assert (total.item(), count) == (0.0, 0)


@pytest.mark.parametrize("budget", [1, VOCAB, 2 * VOCAB + 1, 4 * VOCAB, 1 << 20])
def test_chunks_cover_every_token_once_within_the_budget(budget: int) -> None:
    pieces = list(token_chunks(TOKENS, VOCAB, budget))
    assert [i for piece in pieces for i in range(TOKENS)[piece]] == list(range(TOKENS))
    assert all(
        piece.stop - piece.start == 1 or (piece.stop - piece.start) * VOCAB <= budget
        for piece in pieces
    )


@pytest.fixture(scope="module")
def model() -> Qwen2ForCausalLM:
    torch.manual_seed(3)
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    return Qwen2ForCausalLM(config).eval()


def example(prompt: tuple[int, ...], completion: tuple[int, ...]) -> Example:
    flags = (False,) * len(completion)
    return Example("x", prompt, completion, flags, flags)


ROWS = [example((1, 5), (6, 7, 8, 2)), example((1, 9, 10, 11), (3,)), example((1,), (4, 2))]


def test_sequence_loss_equals_the_dense_loss_of_each_row_alone(model) -> None:
    expected = 0.0
    for row in ROWS:
        ids = torch.tensor([row.prompt + row.completion])
        scores = model(ids).logits[0, len(row.prompt) - 1 : -1]
        expected += F.cross_entropy(scores, torch.tensor(row.completion), reduction="sum").item()
    total, count, _ = chunked.sequence_loss(model, collate(ROWS, PAD))
    assert count == 4 + 1 + 2
    assert total.item() == pytest.approx(expected, rel=1e-5)


def test_padding_and_prompt_targets_change_nothing(model) -> None:
    batch = collate(ROWS, PAD)
    total, count, _ = chunked.sequence_loss(model, batch)
    elsewhere = torch.where(batch.mask, batch.targets, (batch.targets + 3) % VOCAB)
    lengths = torch.tensor([len(row) - 1 for row in ROWS])
    padding = torch.arange(batch.input_ids.shape[1]) >= lengths[:, None]
    assert padding.any()
    dirty = torch.where(padding, (batch.input_ids + 7) % VOCAB, batch.input_ids)
    loss = chunked.sequence_loss(model, replace(batch, targets=elsewhere, input_ids=dirty))
    assert loss.count == count
    assert torch.equal(loss.total, total)
    # The test can tell: a masked target does change the loss.
    wrong = torch.where(batch.mask, (batch.targets + 3) % VOCAB, batch.targets)
    assert not torch.equal(chunked.sequence_loss(model, replace(batch, targets=wrong)).total, total)


def test_padding_gets_no_gradient(model) -> None:
    model.zero_grad()
    chunked.sequence_loss(model, collate(ROWS, PAD)).total.backward()
    gradient = model.get_input_embeddings().weight.grad
    assert gradient[PAD].abs().sum() == 0
    assert gradient[5].abs().sum() > 0
    model.zero_grad()
