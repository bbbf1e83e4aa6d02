"""An exported teacher is a plain checkpoint with the trained head and an untouched trunk."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from azeotrope import models
from azeotrope.heads.export import (
    ExportError,
    export,
    head_from,
    proxy_head_from,
    put_head,
)
from azeotrope.heads.head import Head

PROMPTS = [[1, 9, 20, 33, 40], [1, 12, 5]]
VOCABULARY = 23


def stored_tensors(folder: Path) -> list[str]:
    """Names of all tensors in a checkpoint's safetensors files."""
    return [name for path in folder.glob("*.safetensors") for name in load_file(path)]


def changed(loaded: models.Loaded) -> Head:
    head = head_from(loaded)
    noise = torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        head.weight.add_(0.1 * noise)
    return head


@pytest.fixture
def teacher() -> models.Loaded:
    return models.load("pocket/teacher", device="cpu")


@pytest.fixture
def tied() -> models.Loaded:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    words = WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), eos_token="w2")
    return models.Loaded(AutoModelForCausalLM.from_config(config).eval(), tokenizer)


@torch.no_grad()
def test_a_plain_load_gives_the_logits_of_the_head(teacher: models.Loaded, tmp_path: Path) -> None:
    head = changed(teacher)
    trunk = {
        name: value.clone()
        for name, value in teacher.model.state_dict().items()
        if not name.startswith("lm_head")
    }
    original = models.load("pocket/teacher", device="cpu").model
    check = export(teacher, head, tmp_path / "out", PROMPTS)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for ids in PROMPTS:
        tokens = torch.tensor([ids])
        hidden = original.base_model(input_ids=tokens).last_hidden_state
        logits = plain(input_ids=tokens).logits
        torch.testing.assert_close(logits, hidden @ head.weight.T, atol=1e-4, rtol=0)
        assert (logits - original(input_ids=tokens).logits).abs().max() > 0.1
    after = plain.state_dict()
    assert set(after) == {*trunk, "lm_head.weight"}
    for name, value in trunk.items():
        assert torch.equal(after[name], value), name
    assert torch.equal(plain.lm_head.weight, head.weight)
    assert plain.config.tie_word_embeddings is False
    assert sorted(stored_tensors(tmp_path / "out")) == sorted(after)
    assert check.largest_logit_difference <= 1e-4
    assert (check.tied, check.trunk_tensors, check.prompts) == (False, len(trunk), len(PROMPTS))
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "joe has 12 eggs. <think> 12 + 3 = 15. </think> #### 15"
    assert again(text).input_ids == teacher.tokenizer(text).input_ids


def test_a_head_of_ones_own_leaves_the_model_alone(teacher: models.Loaded) -> None:
    layer = models.head_of(teacher.model)
    before = layer.weight.detach().clone()
    changed(teacher)
    assert torch.equal(layer.weight, before)


@torch.no_grad()
def test_a_tied_model_is_untied_and_keeps_its_embedding(
    tied: models.Loaded, tmp_path: Path
) -> None:
    prompts = [[3, 5, 7], [1, 22]]
    embedding = tied.model.get_input_embeddings().weight.detach().clone()
    head = changed(tied)
    assert models.is_tied(tied.model)
    export(tied, head, tmp_path / "out", prompts)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not models.is_tied(plain)
    assert plain.config.tie_word_embeddings is False
    assert torch.equal(plain.get_input_embeddings().weight, embedding)
    assert torch.equal(plain.lm_head.weight, head.weight)
    assert not torch.equal(plain.lm_head.weight, embedding)
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(stored_tensors(tmp_path / "out"))


@torch.no_grad()
def test_put_head_may_be_called_every_round(tied: models.Loaded) -> None:
    embedding = tied.model.get_input_embeddings().weight.detach().clone()
    head = changed(tied)
    for scale in (1.0, -2.0):
        head.weight.mul_(scale)
        put_head(tied, head)
        assert torch.equal(models.head_of(tied.model).weight, head.weight)
        assert torch.equal(tied.model.get_input_embeddings().weight, embedding)


def tampering(part: str, amount: float):
    """A `save` that writes another value into the first parameter with this in its name."""
    honest = models.save

    @torch.no_grad()
    def save(loaded: models.Loaded, folder: Path) -> None:
        parameter = next(p for name, p in loaded.model.named_parameters() if part in name)
        original = parameter.clone()
        parameter.view(-1)[0] += amount
        honest(loaded, folder)
        parameter.copy_(original)

    return save


@pytest.mark.parametrize("part", ["embed_tokens", "layers.2.mlp", "model.norm"])
def test_another_trunk_on_disk_is_found(
    part: str, teacher: models.Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "save", tampering(part, 1e-3))
    with pytest.raises(ExportError, match=f"holds a tensor .*{part}.* that differs"):
        export(teacher, changed(teacher), tmp_path / "out", PROMPTS)


def test_another_head_on_disk_is_found(
    teacher: models.Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "save", tampering("lm_head", 1.0))
    with pytest.raises(ExportError, match="away from the trained head's"):
        export(teacher, changed(teacher), tmp_path / "out", PROMPTS)


def test_a_head_that_is_still_tied_on_disk_is_found(
    tied: models.Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "untie", lambda model: None)
    with pytest.raises(ExportError):
        export(tied, changed(tied), tmp_path / "out", [[3, 5]])


def test_a_proxy_head_holds_the_rows_that_are_shared(teacher: models.Loaded) -> None:
    proxy = models.load("pocket/other", device="cpu")
    head = proxy_head_from(proxy, teacher, "other")
    theirs, ours = proxy.tokenizer.get_vocab(), teacher.tokenizer.get_vocab()
    names = {index: token for token, index in ours.items()}
    weight = models.head_of(proxy.model).weight
    for row, teacher_id in zip(head.weight, head.teacher_ids.tolist(), strict=True):
        assert torch.equal(row, weight[theirs[names[teacher_id]]])
    assert not head.is_whole
