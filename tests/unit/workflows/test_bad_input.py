"""Settings that do not fit are refused before anything loads.

The message says in one line what was given and what is allowed. Every test goes the way of the
command line: settings are read, then the preflight runs.
"""

import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from azeotrope.config import ConfigError
from experiment import settings
from experiment.preflight import preflight

pytestmark = pytest.mark.usefixtures("nothing_starts")
FEW = (
    "traces=20",
    "exam_problems=20",
    "teacher_problems=20",
    "defenses.0.training.floor.problems=20",
)


def test_without_a_mistake_nothing_is_said(tmp_path: Path) -> None:
    preflight(settings.load("pocket_demo", [f"cache={tmp_path}", *FEW]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["traces_=5"], ["unknown key 'traces_'", "allowed: attack, attacks, boundary,", "traces"]),
        (
            ["sampling.temprature=1"],
            ["'sampling.temprature'", "allowed: max_new_tokens, temperature, top_p"],
        ),
        (
            ["students.0.nmae=x"],
            ["unknown key 'students.0.nmae'; allowed: lora, model, name"],
        ),
        (
            ["students.0.lora.rnk=3"],
            ["unknown key 'students.0.lora.rnk'; allowed: ", "rank"],
        ),
        (
            ["defenses.0.parts.0.strenght=1"],
            ["defense doge: unknown key 'strenght'; allowed: clamp, mask, name,", "strength"],
        ),
        (
            ["defenses.0.training.floor.greed=1"],
            ["unknown key 'defenses.0.training.floor.greed'; allowed: ", "greedy"],
        ),
        (["attack.name=text_sft", "attack.fit.step=1"], ["attack text_sft", "fit.step", "steps"]),
        (
            ["task.name=pocket", "task.slipp=0.5"],
            ["unknown key 'task.pocket.slipp'; allowed: name, slip"],
        ),
        (
            ["task.name=jsonl", "task.train=a", "task.test=b", "task.tset=c"],
            ["unknown key 'task.jsonl.tset'; allowed: name, test, train, validation"],
        ),
        (["task.slipp=0.5"], ["task", "slipp", "allowed: name, slip"]),
    ],
)
def test_unknown_keys_name_the_known_ones(refused, overrides: list[str], expected: list) -> None:
    message = refused(*overrides)
    for part in expected:
        assert part in message, message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("defenses.0.parts.0.strength=-1", ["defense doge", "strength", "greater than", "-1"]),
        ("defenses.0.parts.0.name=doeg", ["unknown defense 'doeg'", "answers_only, cmi, doge"]),
        ("attack.name=text_stf", ["unknown attack 'text_stf'", "text_sft"]),
        (
            "cleanups=[polish]",
            ["unknown clean-up 'polish'", "correct_only, digits, drop_reasoning"],
        ),
        ("proxies=[]", ["needs at least one proxy", "`proxies` is empty"]),
        ("task.name=pockets", ["task", "pockets", "'gsm8k', 'jsonl', 'pocket'"]),
        ("max_length=90", ["max_length 90 leaves no room", "max_new_tokens 96"]),
        ("traces=many", ["traces", "valid integer", "'many'"]),
        ("traces=0", ["traces", "greater than or equal to 1", "got 0"]),
        ("seeds=[]", ["seeds", "at least 1"]),
        ("defenses.7.parts=[]", ["defenses.7.parts", "'7' is not an index into a list of 2"]),
        ("name=Two Words", ["name", "pattern", "'Two Words'"]),
        ("traces", ["key.sub=value", "'traces'"]),
    ],
)
def test_a_value_that_does_not_fit_says_what_would(refused, override: str, expected: list) -> None:
    message = refused(override)
    for part in expected:
        assert part in message, message
    assert "\n" not in message


def test_a_missing_configuration_lists_those_that_are_shipped(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no configuration 'demo'; give a YAML file or one of: "):
        settings.load("demo", [])
    with pytest.raises(ConfigError, match=r"no configuration file at .*nowhere\.yaml"):
        settings.load(str(tmp_path / "nowhere.yaml"), [])
    (tmp_path / "list.yaml").write_text("- 1\n- 2\n")
    with pytest.raises(ConfigError, match="must hold a mapping of keys, got list"):
        settings.load(str(tmp_path / "list.yaml"), [])
    (tmp_path / "broken.yaml").write_text("name: [1\n")
    with pytest.raises(ConfigError, match=r"broken\.yaml is not valid YAML"):
        settings.load(str(tmp_path / "broken.yaml"), [])


def test_a_missing_checkpoint_says_what_was_expected(refused, tmp_path: Path) -> None:
    place = tmp_path / "nothing"
    message = refused(f"teacher={place}")
    assert f"no checkpoint at {place}: expected a folder with config.json" in message
    for key in ("teacher=pocket/techer", "proxies=[pocket/techer]"):
        message = refused(key)
        assert "no pocket model 'pocket/techer'; there are pocket/large" in message
        assert "pocket/teacher" in message
    message = refused("students.0.model=pocket/tiny")
    assert "no pocket model 'pocket/tiny'" in message


def test_a_disk_that_is_nearly_full(refused, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(1 << 40, 1 << 40, 100 << 20))
    message = refused()
    assert "has 100 MB free and a run needs at least 500 MB" in message
    assert "set `cache` and `runs` to another disk" in message


def test_a_defense_that_needs_no_proxy_is_content_without(tmp_path: Path) -> None:
    yaml = tmp_path / "alone.yaml"
    yaml.write_text("name: alone\nproxies: []\ndefenses:\n  - parts: [{name: answers_only}]\n")
    config = settings.load(str(yaml), [f"cache={tmp_path}", *FEW])
    preflight(config)
    assert config.proxies == ()
    assert list(tmp_path.iterdir()) == [yaml]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("boundary.answer_pattern=(", "is no regular expression"),
        ("attack.fit.accumulation=3", "does not divide into 3 micro-batches"),
        ("cache=s3://bucket/cache", "is an address"),
        ("runs=/dev/null/runs", "is not a folder"),
        ("defenses.0.parts.0.strength=.inf", "strength"),
        ("sampling.temperature=.nan", "temperature"),
        ("resources.cpus=.inf", "cpus"),
        ("proxies=[pocket/teacher]", "is the teacher itself"),
    ],
)
def test_settings_that_would_end_a_run_later(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings.load("pocket_demo", [override])
