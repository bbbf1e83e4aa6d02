"""Mistakes end before anything is loaded, in one line that says what was given and what is allowed.

Every test goes the way of the command line: settings are read, then the preflight runs.
"""

import importlib
import json
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import Gemma2Config, LlamaConfig, PreTrainedTokenizerFast

from azeotrope import models
from azeotrope.config import ConfigError
from experiment import settings
from experiment.preflight import preflight
from workflows import cli

ROOT = Path(__file__).parents[3]
LIMIT_S = 5.0
FEW = (
    "traces=20",
    "exam_problems=20",
    "teacher_problems=20",
    "defenses.0.training.floor.problems=20",
)


@pytest.fixture(scope="module", autouse=True)
def _imported() -> None:
    # What is imported at its first use is not what is limited here.
    importlib.import_module("transformers.models.llama.modeling_llama")


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    # Time of this process alone, so that a busy machine does not fail tests that are right.
    started = time.process_time()
    yield
    assert time.process_time() - started < LIMIT_S


@pytest.fixture
def refused(tmp_path: Path):
    """Load and check a configuration that must fail; gives back the one line."""

    def refused(*overrides: str, yaml: str = "name: trial\n") -> str:
        path = tmp_path / "trial.yaml"
        path.write_text(yaml)
        with pytest.raises(ConfigError) as error:
            preflight(settings.load(str(path), [f"cache={tmp_path / 'cache'}", *overrides]))
        assert not (tmp_path / "cache").exists()
        return str(error.value)

    return refused


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


def rows(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines) + "\n")
    return str(path)


GOOD_ROW = json.dumps({"question": "1 + 1?", "answer": "2"})


def test_broken_rows_are_named_by_file_and_line(refused, tmp_path: Path) -> None:
    good = rows(tmp_path / "good.jsonl", GOOD_ROW)
    bad = rows(
        tmp_path / "bad.jsonl", GOOD_ROW, '{"question": ', '{"question": "?"}', "[1]", GOOD_ROW
    )
    message = refused("task.name=jsonl", f"task.train={bad}", f"task.test={good}")
    assert f"{bad}: 3 of 5 rows cannot be used" in message
    assert "line 2 is not JSON" in message
    assert 'line 3 has no "answer" (it has question)' in message
    assert "line 4 is a list" in message
    missing = tmp_path / "missing.jsonl"
    message = refused("task.name=jsonl", f"task.train={missing}", f"task.test={good}")
    assert f"no file {missing}" in message
    assert "one JSON object per line" in message


def test_asking_for_more_problems_than_there_are(refused, tmp_path: Path) -> None:
    few = rows(tmp_path / "few.jsonl", GOOD_ROW, GOOD_ROW, GOOD_ROW)
    message = refused("task.name=jsonl", f"task.train={few}", f"task.test={few}", "traces=5")
    assert "3 problems in train, fewer than the 5 requested" in message


def test_a_proxy_that_shares_no_words_is_refused_before_it_is_loaded(
    refused, tmp_path: Path
) -> None:
    folder = tmp_path / "stranger"
    words = WordLevel({f"w{i}": i for i in range(30)}, unk_token="w0")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), eos_token="w1")
    tokenizer.save_pretrained(folder)
    # Only a tokenizer and a config: there are no weights that could be loaded.
    LlamaConfig(vocab_size=30, max_position_embeddings=256).save_pretrained(folder)
    message = refused(f"proxies=[pocket/proxy-a, {folder}]")
    assert message.startswith(f"proxies: {folder} shares ")
    assert "of the teacher's 129 tokens; a proxy must know at least 50%" in message


def test_more_tokens_than_a_context_holds(refused) -> None:
    message = refused("max_length=300")
    assert "max_length 300 is longer than the context of pocket/" in message
    assert "256 tokens; lower max_length" in message


CMI = "name: trial\ndefenses:\n  - {parts: [{name: cmi}], training: {truth: 20}}\n"


def test_the_logit_side_is_content_with_what_is_there(tmp_path: Path) -> None:
    few = [f"defenses.{i}.training.{n}=20" for i in (0, 1) for n in ("truth", "refresh_traces")]
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


def test_a_teacher_that_caps_its_logits_is_refused_before_it_writes(
    refused, tmp_path: Path
) -> None:
    # It knows the proxies' tokens; there are no weights that could be loaded.
    place = tmp_path / "capped"
    models.load_tokenizer("pocket/teacher").save_pretrained(place)
    Gemma2Config(
        vocab_size=129, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=256,
        final_logit_softcapping=30.0,
    ).save_pretrained(place)  # fmt: skip
    for yaml in (CMI, "name: trial\ndefenses: [{parts: [{name: doge}]}]\n"):
        message = refused(f"teacher={place}", "defenses.0.parts.0.strength=0.1", yaml=yaml)
        assert message.startswith("teacher: Gemma2ForCausalLM squashes its final logits")
        assert "it cannot be folded. Set final_logit_softcapping to null" in message


def test_every_problem_that_a_run_asks_for_is_counted(refused, tmp_path: Path) -> None:
    def lacks(counts: dict[str, int], *overrides: str) -> str:
        """What is said when a task has so many problems and no more."""
        for name, count in counts.items():
            lines = [json.dumps({"question": f"{name} {i}?", "answer": "1"}) for i in range(count)]
            rows(tmp_path / f"{name}.jsonl", *lines)
        task = (f"task.{name}={tmp_path / f'{name}.jsonl'}" for name in counts)
        size = ("traces=20", "head_traces=15", "exam_problems=30", "teacher_problems=25")
        floor = "defenses.0.training.floor.problems=20"
        return refused("task.name=jsonl", *task, *size, floor, *overrides, yaml=CMI)

    enough = {"train": 60, "validation": 60, "test": 60}
    found = lacks({**enough, "test": 29})
    assert "29 problems in test, fewer than the 30 requested" in found
    found = lacks({**enough, "validation": 19})
    assert "19 problems in validation, fewer than the 20 requested" in found
    # Apart from the thief's 20 problems there are to be 20 with ground truth.
    found = lacks({**enough, "train": 39}, "defenses.0.training.apart=true")
    assert "39 problems in train, fewer than the 40 requested" in found
    # A lesson is always apart, and its exam asks 50 problems.
    lesson = "defenses.0.lesson={traces: 25, attacks: [{name: alpha}]}"
    found = lacks({**enough, "train": 44}, lesson)
    assert "44 problems in train, fewer than the 45 requested" in found
    found = lacks({**enough, "validation": 49}, lesson)
    assert "49 problems in validation, fewer than the 50 requested" in found
    found = lacks({**enough, "validation": 24}, "probe.information=25")
    assert "24 problems in validation, fewer than the 25 requested" in found
    found = lacks({**enough, "validation": 29, "test": 1}, "exam_split=validation")
    assert "29 problems in validation, fewer than the 30 requested" in found


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("defenses.0.training.floor.begun=0.9", "floor.begun: none of the ground truth of 4 valid"),
        ("probe.begun=3", "probe.begun: none of the ground truth of 3 test problems is right"),
    ],
)
def test_answers_are_begun_only_where_the_ground_truth_is_right(
    refused, override: str, said: str
) -> None:
    floor = "defenses.0.training.floor.problems=4"
    assert said in refused("task.slip=1", floor, override, yaml=CMI)


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
    ("arguments", "expected"),
    [
        (["pipeline", "demo"], "no configuration 'demo'"),
        (["pipeline", "BROKEN"], "is not valid YAML"),
        (["pipeline", "pocket_demo", "teacher=pocket/techer"], "no pocket model 'pocket/techer'"),
        (["pipeline", "pocket_demo", "name=Two Words"], "Two Words"),
    ],
)
def test_the_command_line_says_it_in_one_line(
    arguments: list[str],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("name: [1\nother: {\n")
    given = [str(broken) if argument == "BROKEN" else argument for argument in arguments]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["azeotrope", *given])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert expected in lines[0]


def test_a_fault_of_ours_keeps_its_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(cli, "app", fails)
    with pytest.raises(ZeroDivisionError, match="ours"):
        cli.main()


@pytest.fixture(scope="module")
def finished_process(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    # Most of the time is imports of a fresh interpreter, which is not what is limited here.
    folder = tmp_path_factory.mktemp("empty")
    return subprocess.run(
        [sys.executable, "-m", "workflows", "pipeline", "pocket_demo", "sampling.temprature=1",
         f"runs={folder}", f"cache={folder / 'cache'}"],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def test_a_process_ends_with_code_2_and_one_line(
    finished_process: subprocess.CompletedProcess[str],
) -> None:
    assert finished_process.returncode == 2, finished_process.stderr
    lines = finished_process.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert "unknown key 'sampling.temprature'; allowed: max_new_tokens" in lines[0]
    assert "Traceback" not in finished_process.stdout + finished_process.stderr
