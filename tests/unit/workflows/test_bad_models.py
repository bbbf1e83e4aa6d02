"""Models that do not fit the settings are refused before any weights are loaded."""

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, PreTrainedTokenizerFast

from azeotrope import models
from experiment import settings
from experiment.preflight import preflight

pytestmark = pytest.mark.usefixtures("nothing_starts")
FEW = (
    "traces=20",
    "exam_problems=20",
    "teacher_problems=20",
    "defenses.0.training.floor.problems=20",
)
CMI = "name: trial\ndefenses:\n  - {parts: [{name: cmi}], training: {truth: 20}}\n"


def test_a_proxy_that_shares_no_words_is_refused_before_it_is_loaded(
    refused, tmp_path: Path
) -> None:
    folder = tmp_path / "stranger"
    words = WordLevel({f"w{i}": i for i in range(30)}, unk_token="w0")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), eos_token="w1")
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=30, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    message = refused(f"proxies=[pocket/proxy-a, {folder}]")
    assert message.startswith(f"proxies: {folder} shares ")
    assert "of the teacher's 129 tokens; a proxy must know at least 50%" in message


def test_more_tokens_than_a_context_holds(refused) -> None:
    message = refused("max_length=300")
    assert "max_length 300 is longer than the context of pocket/" in message
    assert "256 tokens; lower max_length" in message


def test_the_logit_side_is_content_with_what_is_there(tmp_path: Path) -> None:
    few = [f"defenses.{i}.training.{n}=20" for i in (0, 1) for n in ("truth", "refresh_traces")]
    few += ["probe.information=0", "probe.begun=20"]
    preflight(settings.load("pocket_logits", [f"cache={tmp_path}", *FEW, *few, "head_traces=20"]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["defenses.0.parts.0.rank=161"],
            "defense cmi: rank 161 is larger than the teacher's hidden size 160;",
        ),
        (
            ["proxies=[pocket/proxy-a, pocket/other]"],
            "defense cmi: the surrogate pocket/other has another vocabulary (296 tokens) than the "
            "teacher (129 tokens);",
        ),
        (
            ["defenses.0.parts.0.layer=first"],
            "defense cmi: the surrogate has no tensor 'first' that a gradient can be taken of; "
            "give `last`, `penultimate`, `lm_head.weight` or one such as:",
        ),
        (
            ["defenses.0.parts.0.layer=model.layers.2.mlp.down_proj.weight"],
            "defense cmi: the surrogate has no tensor 'model.layers.2.mlp.down_proj.weight'",
        ),
        (
            ["defenses.0.training.truth=0"],
            "defense cmi: it looks at ground-truth texts, but training.truth is 0; say how many, "
            "or set utility_on and cosine_on to own",
        ),
        (
            ["defenses.0.training.floor.from_pass=2"],
            "floor.from_pass 2 is no pass of 2 (counted from 0; refreshes 1)",
        ),
        (
            ["attacks=[{name: forward_kl, view: {top_k: 130}}]"],
            "attack forward_kl: view.top_k 130 is larger than the teacher's vocabulary of 129 "
            "tokens; lower it, or leave it out to see them all",
        ),
        (
            ["attack={name: alpha, view: {top_k: 130}}"],
            "attack alpha: view.top_k 130 is larger than the teacher's vocabulary of 129 tokens",
        ),
        (
            ["defenses.0.lesson.attacks=[{name: abkd, view: {top_k: 130}}]"],
            "attack abkd: view.top_k 130 is larger than the teacher's vocabulary of 129 tokens",
        ),
        (
            ["attacks=[{name: alpha}, {name: forward_kl}, {name: alpha, temperature: 2}]"],
            "two attacks are called alpha (none); give each a `variant` of its own",
        ),
        (
            ["attacks=[{name: alpha, variant: a=0}, {name: alpha, variant: a=0}]"],
            "two attacks are called alpha (a=0); give each a `variant` of its own",
        ),
        (
            ["attacks=[{name: text_sft}]"],
            "two attacks are called text_sft (none); give each a `variant` of its own",
        ),
        (
            ["attacks=[{name: forward_kl, view: {top_k: 0}}]"],
            "attack forward_kl: view.top_k: Input should be greater than or equal to 1, got 0",
        ),
        (
            ["attacks=[{name: forward_kl, pairs: 8, view: {top_k: 5}}]"],
            "attack forward_kl: an inversion needs full logits; leave out view.top_k or pairs",
        ),
        (["probe.subspace=[pocket/smal]"], "no pocket model 'pocket/smal'; there are"),
        (["probe.information=3"], "the estimate needs 4 texts, or 0 to skip it"),
        (["defenses.0.lesson.attacks=[]"], "defenses.0.lesson.attacks"),
    ],
)
def test_the_logit_side_is_checked_before_anything_loads(
    refused, overrides: list[str], expected: str
) -> None:
    message = refused(*overrides, yaml=CMI)
    assert expected in message
    assert "\n" not in message


def test_a_surrogate_of_another_vocabulary_is_refused(refused, tmp_path: Path) -> None:
    # It knows enough of the teacher's tokens to be a proxy, but one of them has another number.
    place = shutil.copytree(models.resolve("pocket/proxy-a"), tmp_path / "near")
    tokenizer = models.load_tokenizer("pocket/proxy-a")
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = data["model"]["vocab"]
    one, other = sorted(vocab, key=vocab.__getitem__)[-2:]
    vocab[one], vocab[other] = vocab[other], vocab[one]
    (place / "tokenizer.json").write_text(json.dumps(data))
    message = refused(f"proxies=[{place}]", yaml=CMI)
    assert message.startswith(f"defense cmi: the surrogate {place} has another vocabulary (129 ")
    assert message.endswith("take a proxy of the teacher's family")


def capped(folder: Path) -> Path:
    """A model that caps its logits and knows the proxies' tokens."""
    models.load_tokenizer("pocket/teacher").save_pretrained(folder)
    config = Gemma2Config(
        vocab_size=129, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=256,
        final_logit_softcapping=30.0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def test_a_proxy_that_caps_its_logits_is_refused_before_anything_is_written(
    refused, tmp_path: Path
) -> None:
    message = refused(f"proxies=[{capped(tmp_path / 'capped')}]")
    assert message.startswith("defense doge: Gemma2ForCausalLM caps its final logits at 30")
    assert "so it cannot be a proxy" in message


@pytest.mark.parametrize("setting", ["attack={name: forward_kl}", "attacks=[{name: minillm}]"])
def test_the_logits_of_a_teacher_that_caps_them_cannot_be_attacked(
    refused, tmp_path: Path, setting: str
) -> None:
    message = refused(
        f"teacher={capped(tmp_path / 'capped')}",
        setting,
        yaml="name: trial\ndefenses: [{parts: [{name: answers_only}]}]\n",
    )
    assert message.startswith("attack ")
    assert "so it cannot be a teacher" in message


def test_a_teacher_that_caps_its_logits_is_refused_before_it_writes(
    refused, tmp_path: Path
) -> None:
    place = capped(tmp_path / "capped")
    for yaml in (CMI, "name: trial\ndefenses: [{parts: [{name: doge}]}]\n"):
        message = refused(f"teacher={place}", "defenses.0.parts.0.strength=0.1", yaml=yaml)
        assert message.startswith("teacher: Gemma2ForCausalLM squashes its final logits")
        assert "it cannot be folded. Set final_logit_softcapping to null" in message
