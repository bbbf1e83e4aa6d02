"""CMI trained: any divergence, held-out texts, and a checkpoint that follows DOGe's."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cmi_cases import (
    RANK,
    ROWS,
    cosine_only,
    drawn,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from azeotrope import models
from azeotrope.defenses.cmi import Cmi, Config
from azeotrope.defenses.doge import Config as DogeConfig
from azeotrope.defenses.doge import Doge
from azeotrope.heads.export import export, head_from, proxy_head_from
from azeotrope.heads.features import FeaturePair, compute, join, pair_up
from azeotrope.heads.head import Head
from azeotrope.heads.search import HeadSearch, HeadTraining, UtilityCheck
from azeotrope.heads.utility import Utility
from azeotrope.logits.chunks import head_logits
from azeotrope.tokens import Example
from azeotrope.training import FitConfig, fit


@pytest.mark.parametrize(
    ("divergence", "parameters"),
    [
        ("forward_kl", {}),
        ("reverse_kl", {}),
        ("alpha", {"a": 0.5}),
        ("alpha_beta", {"a": 0.2, "b": 0.7}),
        ("skew_kl", {}),
        ("jensen_shannon", {}),
    ],
)
def test_any_divergence_can_be_turned_away(
    divergence: str, parameters: dict[str, float], teacher: models.Loaded, case: Callable
) -> None:
    surrogates, _ = made = case("last")
    batch = cosine_only(made)
    cmi = Cmi(
        Config(
            layer="last", rank=RANK, strength=1.0, method="double_backward",
            divergence=divergence, parameters=parameters,
        )
    )  # fmt: skip
    head = cmi.parametrise(head_from(teacher), head_from(teacher), ROWS)
    with torch.no_grad():
        # At zero the slope is zero: any small step leaves the plateau.
        head.up.copy_(0.01 * drawn(6, *head.up.shape))
    before = cmi.score(head, surrogates, batch)
    config = FitConfig(steps=12, batch_size=1, learning_rate=0.01, warmup=0.0)
    fit(
        list(head.parameters()), [batch], lambda items: cmi.loss(head, surrogates, items[0]), config
    )
    after = cmi.score(head, surrogates, batch)
    assert before is not None
    assert after is not None
    assert before > 0.99
    assert after < before - 0.02


def trained(
    cmi: Cmi, head: Head, surrogates: tuple[Any, ...], pairs: list[FeaturePair], **changes: object
) -> Any:
    training = {
        "fit": {"steps": 40, "batch_size": 4, "learning_rate": 2e-2},
        "floor": {"rounds": 1, "problems": 1},
        "held_out": 2,
        **changes,
    }
    fine = Utility(1.0, 1.0)
    return HeadSearch(
        head,
        surrogates,
        pairs,
        cmi,
        HeadTraining.model_validate(training),
    ).run(UtilityCheck(lambda _: fine, fine))


def test_training_lowers_the_cosine_on_texts_held_out(
    teacher: models.Loaded, case: Callable
) -> None:
    surrogates, pairs = case("last")
    cmi = Cmi(Config(layer="last", rank=32, strength=1.0))
    head = cmi.parametrise(head_from(teacher), head_from(teacher), ROWS)
    # The last two texts are the ones that training does not see.
    held_out = join(pairs[-2:])
    assert cmi.score(head, surrogates, held_out) == pytest.approx(1.0, abs=1e-5)
    result = trained(cmi, head, surrogates, pairs)
    after = cmi.score(head, surrogates, held_out)
    assert after is not None
    assert after < 0.95
    assert result.rounds[0].score == pytest.approx(after)
    assert result.log[-1].parts.keys() == {"cross-entropy", "cosine"}


def test_doge_then_cmi_is_one_plain_checkpoint(
    teacher: models.Loaded, own: list[Example], truth: list[Example], case: Callable, tmp_path: Path
) -> None:
    clean = head_from(teacher)
    prompts = [list(text.prompt) for text in truth]
    # First DOGe, on last hidden states, exported as a workflow does.
    proxy = models.load("pocket/proxy-a", device="cpu")
    first = Doge(DogeConfig(strength=0.3))
    doged = head_from(teacher)
    training = HeadTraining.model_validate({"fit": {"steps": 20, "batch_size": 3}, "floor": None})
    against = (proxy_head_from(proxy, teacher, "proxy-a"),)
    features = pair_up(compute(teacher.model, own), [compute(proxy.model, own)])
    HeadSearch(doged, against, features, first, training).run()
    exported = models.load("pocket/teacher", device="cpu")
    export(exported, doged, tmp_path / "doge", prompts)
    loaded = models.load(str(tmp_path / "doge"), device="cpu")

    # Then CMI on that head; what it turns away from is still the undefended teacher.
    surrogates, pairs = case("last")
    second = Cmi(Config(layer="last", rank=16, strength=1.0))
    head = second.parametrise(head_from(loaded), clean, ROWS)
    states = join(pairs).teacher
    torch.testing.assert_close(head.clean_logits(states), head_logits(states, clean.weight))
    torch.testing.assert_close(head.logits(states), head_logits(states, doged.weight))
    assert (head.logits(states) - head.clean_logits(states)).abs().max() > 0.1
    before = second.score(head, surrogates, join(pairs))
    assert before is not None
    assert before < 0.9999
    trained(second, head, surrogates, pairs)
    after = second.score(head, surrogates, join(pairs))
    assert after is not None
    assert after < before - 0.02

    check = export(loaded, head.folded(), tmp_path / "both", prompts)
    assert check.prompts == len(prompts)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "both", dtype=torch.float32).eval()
    assert type(plain) is type(teacher.model)
    for text in truth:
        ids = torch.tensor([text.prompt + text.completion])
        with torch.no_grad():
            hidden = teacher.model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
            expected = head.logits(hidden)
            actual = plain(input_ids=ids).logits[0]
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
    # The checkpoint holds the teacher's tensors, and the head apart from the embedding.
    names = {name for path in (tmp_path / "both").glob("*.safetensors") for name in load_file(path)}
    assert names == set(teacher.model.state_dict()) | {"lm_head.weight"}
    assert "auto_map" not in json.loads((tmp_path / "both" / "config.json").read_text())
    assert not list((tmp_path / "both").glob("*.py"))
