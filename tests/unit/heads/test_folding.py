"""A folded head says what the matrix makes of the logits, and models that cannot be folded are
refused."""

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    PreTrainedModel,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
)

from azeotrope import models
from azeotrope.heads.export import put_head
from azeotrope.heads.folding import check_foldable, fold
from azeotrope.heads.head import Head
from azeotrope.logits.chunks import head_logits

TOKENS, PADDED, HIDDEN, RANK = 9, 12, 6, 3


def drawn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def factors(tokens: int = TOKENS, seed: int = 3) -> tuple[Tensor, Tensor]:
    """B of [tokens, rank] and A of [rank, tokens]."""
    return drawn(tokens, RANK, seed=seed), drawn(RANK, tokens, seed=seed + 1)


def matrix(up: Tensor, down: Tensor) -> Tensor:
    return torch.eye(len(up), dtype=up.dtype) + up @ down


@pytest.mark.parametrize("with_bias", [True, False])
def test_a_folded_head_is_the_matrix_on_the_logits(with_bias: bool) -> None:
    weight, hidden = drawn(TOKENS, HIDDEN, seed=0), drawn(5, HIDDEN, seed=1)
    bias = drawn(TOKENS, seed=2) if with_bias else None
    before = weight.clone()
    up, down = factors()
    folded, shifted = fold(weight, bias, up, down)
    assert (shifted is not None) == with_bias
    logits = head_logits(hidden, weight, bias)
    expected = logits.double() @ matrix(up, down).T
    torch.testing.assert_close(
        head_logits(hidden, folded, shifted).double(), expected, rtol=1e-5, atol=1e-4
    )
    torch.testing.assert_close(folded, matrix(up, down) @ weight)
    if bias is not None:
        torch.testing.assert_close(shifted, matrix(up, down) @ bias)
    assert torch.equal(weight, before), "the head that was given stays as it is"
    assert torch.linalg.matrix_rank(folded - weight) == RANK


def test_rows_that_pad_a_head_are_neither_read_nor_changed() -> None:
    weight, bias = drawn(PADDED, HIDDEN, seed=0), drawn(PADDED, seed=2)
    up, down = factors()
    folded, shifted = fold(weight, bias, up, down)
    assert shifted is not None
    assert torch.equal(folded[TOKENS:], weight[TOKENS:])
    assert torch.equal(shifted[TOKENS:], bias[TOKENS:])
    junk = weight.clone()
    junk[TOKENS:] = 1e9
    assert torch.equal(fold(junk, bias, up, down)[0][:TOKENS], folded[:TOKENS])
    alone, _ = fold(weight[:TOKENS], None, up, down)
    torch.testing.assert_close(folded[:TOKENS], alone)


def test_two_folds_are_the_product_of_their_matrices() -> None:
    weight, bias = drawn(TOKENS, HIDDEN, seed=0), drawn(TOKENS, seed=2)
    one, two = factors(seed=3), factors(seed=5)
    folded, shifted = fold(*fold(weight, bias, *one), *two)
    product = matrix(*two) @ matrix(*one)
    torch.testing.assert_close(folded, product @ weight)
    torch.testing.assert_close(shifted, product @ bias)
    # In the other order it is another head.
    swapped, _ = fold(*fold(weight, bias, *two), *one)
    assert not torch.allclose(swapped, folded)


def test_folding_nothing_changes_nothing() -> None:
    weight = drawn(TOKENS, HIDDEN, seed=0)
    up, down = factors()
    assert torch.equal(fold(weight, None, torch.zeros_like(up), down)[0], weight)


def test_a_fold_is_undone_by_woodburys_inverse() -> None:
    weight = drawn(TOKENS, HIDDEN, seed=0)
    up, down = factors()
    inner = torch.linalg.inv(torch.eye(RANK, dtype=up.dtype) + down @ up)
    again, _ = fold(fold(weight, None, up, down)[0], None, -up @ inner, down)
    torch.testing.assert_close(again, weight)


def test_a_half_precision_head_is_folded_in_the_factors_precision() -> None:
    weight = drawn(TOKENS, HIDDEN, seed=0, dtype=torch.bfloat16)
    up, down = (factor.float() for factor in factors())
    folded, _ = fold(weight, None, up, down)
    assert folded.dtype == torch.bfloat16
    exact, _ = fold(weight.float(), None, up, down)
    assert torch.equal(folded, exact.bfloat16())


def test_factors_wider_than_the_head_are_refused() -> None:
    with pytest.raises(ValueError, match="factors have 12 tokens, but the head has 9 rows"):
        fold(drawn(TOKENS, HIDDEN, seed=0), None, *factors(PADDED))


@torch.no_grad()
def test_a_model_with_a_folded_head_gives_the_mapped_logits() -> None:
    loaded = models.load("pocket/teacher", device="cpu")
    check_foldable(loaded.model)
    head = models.head_of(loaded.model)
    rows = len(head.weight)
    up, down = drawn(rows, 4, seed=1).float() / 4, drawn(4, rows, seed=2).float() / 8
    tokens = torch.arange(20, 40).unsqueeze(0)
    before = loaded.model(tokens).logits[0]
    embedding = loaded.model.get_input_embeddings().weight.clone()  # type: ignore[operator]
    put_head(loaded, Head(*fold(head.weight, head.bias, up, down)))
    after = loaded.model(tokens).logits[0]
    torch.testing.assert_close(after, before @ matrix(up, down).T, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(after, before, atol=0.1)
    assert torch.equal(loaded.model.get_input_embeddings().weight, embedding)  # type: ignore[arg-type]


def gemma(cap: float | None) -> PreTrainedModel:
    config = Gemma2Config(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        final_logit_softcapping=cap,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    return Gemma2ForCausalLM(config)


def test_a_cap_on_the_logits_is_refused() -> None:
    message = r"Gemma2ForCausalLM squashes its final logits .*, cap 30\).*cannot be folded. Set"
    with pytest.raises(ValueError, match=message):
        check_foldable(gemma(30.0))
    check_foldable(gemma(None))


def test_a_cap_of_another_name_is_refused_without_weights() -> None:
    config = RecurrentGemmaConfig(
        vocab_size=20, hidden_size=8, intermediate_size=16, num_hidden_layers=3,
        num_attention_heads=2, lru_width=8, logits_soft_cap=20.0,
    )  # fmt: skip
    with torch.device("meta"):
        model = RecurrentGemmaForCausalLM(config)
    with pytest.raises(ValueError, match=r"cap 20\).*Set logits_soft_cap to null"):
        check_foldable(model)


def granite(scaling: float) -> PreTrainedModel:
    """A family that divides what its head gives."""
    torch.manual_seed(0)
    config = GraniteConfig(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        logits_scaling=scaling,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return GraniteForCausalLM(config).eval()


def test_a_model_that_scales_its_logits_can_be_folded_if_the_scale_is_known() -> None:
    for scale in (1.0, 8.0):
        check_foldable(granite(scale))
    odd = granite(1.0)
    head = odd.get_output_embeddings()
    odd.lm_head.register_forward_hook(lambda *_: 1.1 * head.weight.new_ones(1, 8, len(head.weight)))
    with pytest.raises(ValueError, match="GraniteForCausalLM serves other logits than its head"):
        check_foldable(odd)


class Quantised(nn.Module):
    """What libraries put in the place of a linear layer."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(20, 8).to(dtype), requires_grad=False)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_a_quantised_head_is_refused(dtype: torch.dtype) -> None:
    model = gemma(None)
    model.set_output_embeddings(Quantised(dtype))
    with pytest.raises(ValueError, match=r"is quantised \(Quantised\); fold into the unquantised"):
        check_foldable(model)


def test_a_quantised_trunk_with_a_plain_head_can_be_folded() -> None:
    model = gemma(None)
    model.config.quantization_config = {"quant_method": "fp8"}
    check_foldable(model)
    # Floating-point weights in a layer of a library's own may still be packed.
    model.set_output_embeddings(Quantised(torch.bfloat16))
    with pytest.raises(ValueError, match="is quantised"):
        check_foldable(model)


def test_a_model_without_a_head_is_refused() -> None:
    config = BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
    )
    with pytest.raises(ValueError, match="BertModel has no output head to fold into"):
        check_foldable(BertModel(config))
