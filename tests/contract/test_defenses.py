"""What holds for every defense there is, and for one that a stranger adds.

The modules are found, not listed, so a new one is checked by being there.
"""

import importlib
import pickle
import sys
from pathlib import Path
from types import ModuleType
from typing import get_args

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from azeotrope import tasks
from azeotrope.config import Config, ConfigError
from azeotrope.defenses import base as defenses
from azeotrope.defenses.base import (
    Defense,
    FinishedText,
    RewriteContext,
    RewriteStatus,
    RewrittenText,
    Stage,
)
from azeotrope.heads.features import FeatureBatch, FeaturePair, Features, join
from azeotrope.heads.head import Head, ProxyHead
from azeotrope.heads.search import HeadSearch, HeadTraining
from azeotrope.heads.surrogate import Surrogate
from azeotrope.logits.vocabulary import SharedVocabulary
from azeotrope.models import Loaded, load_tokenizer
from azeotrope.tokens import Boundary
from azeotrope.traces import ground_truth
from experiment import settings

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(settings.CONFIGS.glob("*.yaml"))
SPACES = sorted(path.stem for path in (ROOT / "tune_spaces").glob("[a-z]*.py"))
BOUNDARY = Boundary()
TEXT = "<think> joe begins at 12. 12 + 3 = 15. </think> #### 15"


def rewritten_by(defense: Defense, *texts: str) -> list[RewrittenText]:
    return defense.rewrite([FinishedText(text) for text in texts], RewriteContext(BOUNDARY))


def module_of(name: str) -> ModuleType:
    return importlib.import_module(f"azeotrope.defenses.{name}")


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


VOCAB, HIDDEN, PROXY_HIDDEN, PROMPT = 6, 32, 8, 2


def proxy_of(defense: Defense) -> ProxyHead | Surrogate:
    """A proxy's head; or its last layers, for a defense that wants a layer's gradients."""
    if defense.layer is None:
        ids = torch.arange(VOCAB)
        return ProxyHead(drawn(2, VOCAB, PROXY_HIDDEN), None, SharedVocabulary(ids, ids, ids))
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=PROXY_HIDDEN,
        intermediate_size=12,
        num_hidden_layers=3,
        num_attention_heads=2,
        initializer_range=0.5,
        pad_token_id=0,
    )
    student = Loaded(LlamaForCausalLM(config).eval(), load_tokenizer("pocket/teacher"))
    return Surrogate(student, defense.layer, VOCAB)


def head_and_data(
    defense: Defense,
) -> tuple[Head, tuple[ProxyHead | Surrogate, ...], list[FeaturePair]]:
    """What is trained in this defense's stage, on four random texts; two are the teacher's own.

    What enters a layer of a proxy is stored for the prompt too.
    """
    extra = 0 if defense.layer is None else PROMPT - 1
    pairs = []
    for index in range(4):
        tokens, own = 5 + index, index % 2 == 0
        reasoning = torch.arange(tokens) < 3
        shown = f"t{index}", torch.arange(tokens) % VOCAB, reasoning, ~reasoning
        ours = Features(*shown, drawn(10 + index, tokens, HIDDEN), own)
        theirs = Features(*shown, drawn(30 + index, tokens + extra, PROXY_HIDDEN), own)
        pairs.append(FeaturePair(ours, (theirs,)))
    plain = Head(drawn(1, VOCAB, HIDDEN))
    return defense.parametrise(plain, plain, VOCAB), (proxy_of(defense),), pairs


def copies_are_equal(config: Config) -> None:
    kind = type(config)
    assert kind.model_validate_json(config.model_dump_json()) == config
    assert kind.model_validate(config.dump()) == config
    assert pickle.loads(pickle.dumps(config)) == config


# Defenses


@pytest.mark.parametrize("name", defenses.names())
def test_a_defense_module_has_what_is_asked_of_it(name: str) -> None:
    module = module_of(name)
    assert module.Config().name == name
    assert get_args(module.Config.model_fields["name"].annotation) == (name,)
    built = module.build(module.Config())
    assert isinstance(built, Defense)
    assert built.stage in get_args(Stage)
    assert not built.is_identity, "a defense that is named does something"
    assert defenses.resolve({"name": name}).config == module.Config()
    assert module.__doc__


@pytest.mark.parametrize("name", defenses.names())
def test_a_defense_survives_json_and_pickle(name: str) -> None:
    config = module_of(name).Config(strength=0.25)
    copies_are_equal(config)
    again = pickle.loads(pickle.dumps(defenses.resolve(config.dump())))
    assert again.config == config
    assert again.stage == defenses.resolve(config.dump()).stage


@pytest.mark.parametrize("name", defenses.names())
def test_strength_zero_is_the_identity(name: str) -> None:
    defense = defenses.resolve({"name": name, "strength": 0})
    assert defense.is_identity
    assert rewritten_by(defense, TEXT) == [RewrittenText(TEXT, "unchanged")]
    logits = drawn(5, 3, 7)
    assert torch.equal(defense.adjust_logits(logits.clone(), [[1], [], [2, 3]]), logits)
    head, proxies, data = head_and_data(defense)
    before = head.folded().weight.detach().clone()
    HeadSearch(head, proxies, data, defense, HeadTraining(floor=None)).run()
    assert torch.equal(head.folded().weight, before)


@pytest.mark.parametrize("name", defenses.names())
def test_a_defense_acts_in_its_stage_and_only_there(name: str) -> None:
    defense = defenses.resolve({"name": name})
    logits = drawn(5, 3, 7)
    adjusted = defense.adjust_logits(logits.clone(), [[1], [], [2, 3]])
    first, second = rewritten_by(defense, TEXT, TEXT)
    rewritten = first.text
    assert second.text == rewritten
    assert first.status in get_args(RewriteStatus)
    assert rewritten_by(defense) == []
    assert (adjusted.shape, adjusted.dtype) == (logits.shape, logits.dtype)
    assert not adjusted.isnan().any()
    assert tasks.build(tasks.PocketConfig()).check(rewritten, "15")
    if defense.stage != "decoding":
        assert torch.equal(adjusted, logits)
    assert (rewritten != TEXT) == (defense.stage == "text")
    assert (first.status != "unchanged") == (defense.stage == "text")
    defense.close()
    head, proxies, data = head_and_data(defense)
    batch: FeatureBatch = join(data)
    if defense.stage != "weights":
        with pytest.raises(TypeError, match="has no training loss"):
            defense.loss(head, proxies, batch)
        return
    found = defense.loss(head, proxies, batch)
    assert found.count == len(batch.targets)
    assert found.total.isfinite()
    assert all(isinstance(value, float) for value in found.parts.values())
    scored = defense.score(head, proxies, batch)
    assert scored is None or isinstance(scored, float)
    # Whatever is trained in its place, what is exported is a plain head of the same shape.
    before = head.folded().weight.detach().clone()
    training = HeadTraining.model_validate({"fit": {"steps": 2, "batch_size": 2}, "floor": None})
    HeadSearch(head, proxies, data, defense, training).run()
    after = head.folded()
    assert type(after) is Head
    assert after.weight.shape == before.shape
    assert after.weight.dtype == torch.float32
    assert after.weight.isfinite().all()
    assert not torch.equal(after.weight, before)


@pytest.mark.parametrize("name", defenses.names())
def test_a_defense_refuses_what_it_does_not_know(name: str) -> None:
    allowed = ", ".join(sorted(module_of(name).Config.model_fields))
    with pytest.raises(ConfigError) as error:
        defenses.resolve({"name": name, "strenght": 1})
    assert f"unknown key 'strenght'; allowed: {allowed}" in str(error.value)
    with pytest.raises(ConfigError, match=f"defense {name}: strength: .*got -1"):
        defenses.resolve({"name": name, "strength": -1})


def test_an_unknown_defense_lists_those_there_are() -> None:
    listed = ", ".join(defenses.names())
    with pytest.raises(ConfigError, match=f"unknown defense 'doeg'; there are {listed}"):
        defenses.resolve({"name": "doeg"})


def table_rows() -> list[str]:
    lines = (ROOT / "README.md").read_text().splitlines()
    return [line for line in lines if line.lstrip().startswith("|")]


@pytest.mark.parametrize("name", defenses.names())
def test_the_readme_has_a_row_for_it(name: str) -> None:
    assert any(f"`{name}`" in row for row in table_rows()), f"README.md has no row for `{name}`"


# Configurations and search spaces


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_configuration_is_valid(path: Path) -> None:
    config = settings.load(path.stem, [])
    assert config.name == path.stem
    assert type(config).model_validate(config.dump()) == config
    assert settings.load(str(path), []) == config


def value_at(data: object, path: str) -> object:
    for part in path.split("."):
        data = data[int(part)] if isinstance(data, list) else data[part]  # type: ignore[index]
    return data


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("place", ["low", "middle", "high"])
def test_every_point_of_a_search_space_is_valid(name: str, place: str) -> None:
    space = importlib.import_module(f"tune_spaces.{name}")
    point = {}
    for item in space.SPACE:
        assert 0 < item.low < item.high or (item.scale == "linear" and item.low < item.high)
        assert item.why.strip()
        middle = (
            (item.low * item.high) ** 0.5 if item.scale == "log" else (item.low + item.high) / 2
        )
        point[item.path] = {"low": item.low, "middle": middle, "high": item.high}[place]
    chosen = [f"defenses.0.{path}={value!r}" for path, value in point.items()]
    base = "defenses.0.parts.0.name=" + name
    config = settings.load("pocket_demo", [base, *chosen])
    for path, value in point.items():
        assert value_at(config.dump(), f"defenses.0.{path}") == pytest.approx(value)
    # What is not searched keeps the value it has without a search.
    plain = settings.load("pocket_demo", [base])
    assert config.defenses[0].training.fit.steps == plain.defenses[0].training.fit.steps
    assert config.defenses[1:] == plain.defenses[1:]
    assert set(space.OBJECTIVES.values()) <= {"max", "min"}
    assert space.OBJECTIVES


# A stranger's defense

SHOUTING = '''
"""Shout: a defense whose author has changed no file but this one."""

from typing import Literal

from azeotrope.defenses.base import Defense, DefenseConfig, RewrittenText
from azeotrope.tokens import spans


class Config(DefenseConfig):
    name: Literal["shouting"] = "shouting"
    mark: str = "!"


class Shouting(Defense):
    stage = "text"

    def rewrite(self, texts, context):
        return [self._shouted(item.text, context.boundary) for item in texts]

    def _shouted(self, text, boundary):
        reasoning, _ = spans(text, boundary)
        if self.is_identity or reasoning.start == reasoning.end:
            return RewrittenText(text, "unchanged")
        loud = text[reasoning.start : reasoning.end].upper().replace(".", self.config.mark)
        return RewrittenText(text[: reasoning.start] + loud + text[reasoning.end :], "changed")


def build(config: Config) -> Shouting:
    return Shouting(config)
'''


def test_a_stranger_adds_a_defense_with_one_module_and_one_yaml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shouting.py").write_text(SHOUTING)
    yaml = tmp_path / "loud.yaml"
    yaml.write_text("name: loud\ndefenses:\n  - parts: [{name: shouting, mark: '!!'}]\n")
    with pytest.raises(ConfigError, match="unknown defense 'shouting'"):
        settings.load(str(yaml), [])
    monkeypatch.setattr(
        "azeotrope.defenses.__path__", [*importlib.import_module("azeotrope.defenses").__path__]
    )
    importlib.import_module("azeotrope.defenses").__path__.append(str(tmp_path))
    try:
        assert "shouting" in defenses.names()
        for check in (
            test_a_defense_module_has_what_is_asked_of_it,
            test_a_defense_survives_json_and_pickle,
            test_strength_zero_is_the_identity,
            test_a_defense_acts_in_its_stage_and_only_there,
            test_a_defense_refuses_what_it_does_not_know,
        ):
            check("shouting")
        config = settings.load(str(yaml), [])
        assert config.defenses[0].label == "shouting"
        (defense,) = config.defenses[0].resolve()
        (shouted,) = rewritten_by(defense, TEXT)
        assert shouted.text == "<think> JOE BEGINS AT 12!! 12 + 3 = 15!! </think> #### 15"
        task = tasks.build(tasks.PocketConfig(slip=0))
        for trace in ground_truth(task, task.problems("train", 5)):
            loud = rewritten_by(defense, trace.text)[0].text
            assert "!!" in loud
            assert task.check(loud, trace.reference)
            assert loud.lower().replace("!!", ".") == trace.text
    finally:
        sys.modules.pop("azeotrope.defenses.shouting", None)
        vars(importlib.import_module("azeotrope.defenses")).pop("shouting", None)
