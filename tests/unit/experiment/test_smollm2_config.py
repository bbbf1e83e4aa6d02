"""Configurations of real models: names, early exits, no students, and checks without a network."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from azeotrope import models, packaged
from azeotrope.config import ConfigError
from azeotrope.environment import variable
from azeotrope.pocket import smollm2
from azeotrope.report.intervals import wilson
from azeotrope.report.page import write_report
from azeotrope.report.rows import ResultRow, results_document
from azeotrope.report.summary import plain_words
from azeotrope.report.tables import result_table, teacher_table
from azeotrope.tasks import Gsm8kConfig, JsonlConfig, PocketConfig, build
from experiment import preflight, settings
from experiment.cells import cells_of
from experiment.display import Display
from experiment.plan import ProblemRange, TraceRequest
from experiment.results import _notes
from experiment.steps import Steps
from workflows import validate

ROOT = Path(__file__).parents[3]
VOCABULARY = 19
IDS = torch.tensor([[1, 5, 9, 2, 7, 4]])


@pytest.fixture
def tiny() -> models.Loaded:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    words = WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), eos_token="w2")
    return models.Loaded(AutoModelForCausalLM.from_config(config).eval(), tokenizer)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home of converted models, and no data sets."""
    monkeypatch.setenv(variable("cache"), str(tmp_path / "home"))
    monkeypatch.delenv("AZEOTROPE_DATA", raising=False)
    return tmp_path / "home"


def write_gsm8k(folder: Path, train: int = 40, test: int = 40) -> Path:
    folder.mkdir(parents=True)
    for name, count in (("train", train), ("test", test)):
        rows = [{"question": f"{name} {i}?", "answer": f"{i}.\n#### {i}"} for i in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


# Names and early exits -----------------------------------------------------------------------


def test_names_of_smollm2(home: Path) -> None:
    assert packaged.layers_of("smollm2") is None
    assert packaged.layers_of("smollm2:20") == 20
    assert packaged.folder_of("smollm2").parent == home
    assert packaged.folder_of("smollm2") != packaged.folder_of("smollm2:20")
    assert not packaged.is_packaged("smollm2:") | packaged.is_packaged("smollm2-1.7b")
    for name in ("smollm2:0", "smollm2:30"):
        with pytest.raises(ValueError, match="an early exit keeps 1 to 29"):
            packaged.layers_of(name)


def test_a_name_resolves_once_it_is_converted(home: Path, tiny: models.Loaded) -> None:
    with pytest.raises(FileNotFoundError, match="smollm2:3 is not converted yet"):
        models.resolve("smollm2:3")
    models.save(tiny, packaged.folder_of("smollm2:3"))
    assert models.resolve("smollm2:3") == str(packaged.folder_of("smollm2:3"))
    assert models.fingerprint("smollm2:3") != "smollm2:3"
    # What exists is used as it is: nothing is installed here that could convert it.
    assert smollm2.ensure(packaged.folder_of("smollm2:3"), 3) == packaged.folder_of("smollm2:3")


@torch.no_grad()
def test_an_early_exit_is_the_same_model_cut_short(tiny: models.Loaded, tmp_path: Path) -> None:
    cut = smollm2.early_exit(tiny, 3)
    assert cut.model.config.num_hidden_layers == 3
    assert tiny.model.config.num_hidden_layers == 4
    assert models.is_tied(cut.model)
    # The state after the third layer, normalised and read by the whole model's own head.
    inner = tiny.model(input_ids=IDS, output_hidden_states=True).hidden_states[3]
    expected = tiny.model.lm_head(tiny.model.model.norm(inner))
    torch.testing.assert_close(cut.model(input_ids=IDS).logits, expected)
    models.save(cut, tmp_path)
    again = models.load(str(tmp_path), device="cpu")
    assert torch.equal(again.model(input_ids=IDS).logits, cut.model(input_ids=IDS).logits)
    for layers in (0, 4):
        with pytest.raises(ValueError, match=f"of 4 layers keeps 1 to 3, got {layers}"):
            smollm2.early_exit(tiny, layers)


def test_an_early_exit_is_cut_from_the_model_that_is_there(
    home: Path, tiny: models.Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    models.save(tiny, packaged.folder_of("smollm2"))
    monkeypatch.setattr(smollm2, "weights", lambda: Path("unread.gguf"))
    folder = smollm2.ensure(packaged.folder_of("smollm2:2"), 2)
    assert models.load(str(folder), device="cpu").model.config.num_hidden_layers == 2


# The data set's place ------------------------------------------------------------------------


def test_the_variable_names_a_folder_only_where_no_path_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AZEOTROPE_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    assert Gsm8kConfig().folder is None
    monkeypatch.setenv("AZEOTROPE_DATA", str(tmp_path))
    assert Gsm8kConfig().folder is None
    folder = write_gsm8k(tmp_path / "gsm8k")
    assert Gsm8kConfig().folder == folder
    assert Gsm8kConfig(path="/elsewhere").folder == Path("/elsewhere")
    assert build(Gsm8kConfig(validation=5)).problems("test", 1)[0].question == "test 0?"
    # Where the files are is no part of what a stage is named by.
    assert Gsm8kConfig().dump()["path"] is None


def test_a_data_folder_above_the_working_folder_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AZEOTROPE_DATA", raising=False)
    folder = write_gsm8k(tmp_path / "shared/data/gsm8k")
    below = tmp_path / "checkout/runs"
    below.mkdir(parents=True)
    monkeypatch.chdir(below)
    assert Gsm8kConfig().folder == folder
    monkeypatch.setenv("AZEOTROPE_DATA", str(below))
    assert Gsm8kConfig().folder is None


def test_what_must_be_downloaded_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZEOTROPE_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    assert not Gsm8kConfig().is_local
    assert Gsm8kConfig(path="somewhere").is_local
    assert PocketConfig().is_local
    assert JsonlConfig(train="a.jsonl", test="b.jsonl").is_local


# Configurations ------------------------------------------------------------------------------


def test_both_configurations_are_valid_without_a_network(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("something tried to reach a network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(smollm2, "weights", lambda: Path("unread.gguf"))
    monkeypatch.chdir(tmp_path)
    for name in ("smollm2_gsm8k", "qwen_gpu"):
        table = validate.run(settings.load(name, []))
        assert table.title == f"{name} is valid"
    assert list(tmp_path.iterdir()) == []


def test_the_command_downloads_nothing_and_writes_nothing(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    environment = {key: value for key, value in os.environ.items() if key != "AZEOTROPE_DATA"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(cache), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "workflows", "validate", "qwen_gpu"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for text in ("Qwen/Qwen2.5-7B-Instruct", "downloaded when the run starts", "6 to train"):
        assert text in done.stdout
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_missing_package_is_one_error_that_names_the_remedy(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="make smollm"):
        preflight.preflight(settings.load("smollm2_gsm8k", []))
    assert not home.exists()


def test_layers_that_do_not_exist_are_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "weights", lambda: Path("unread.gguf"))
    config = settings.load("smollm2_gsm8k", ["proxies=['smollm2:30']"])
    with pytest.raises(ConfigError, match="an early exit keeps 1 to 29"):
        preflight.preflight(config, convert=False)


def test_problems_a_task_does_not_have_are_told_before_the_run(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smollm2, "weights", lambda: Path("unread.gguf"))
    folder = write_gsm8k(tmp_path / "gsm8k")
    task = [f"task={{name: gsm8k, path: {folder}, validation: 16}}"]
    preflight.preflight(settings.load("smollm2_gsm8k", task), convert=False)
    few = settings.load("smollm2_gsm8k", [*task, "teacher_problems=41"])
    with pytest.raises(ConfigError, match="40 problems in test, fewer than the 41 requested"):
        preflight.preflight(few, convert=False)
    # A head is checked on held-out problems before it is exported, with a floor or without.
    short = settings.load("smollm2_gsm8k", [*task, "task.validation=15"])
    with pytest.raises(ConfigError, match="15 problems in validation, fewer than the 16"):
        preflight.preflight(short, convert=False)


def test_the_size_of_a_shard_names_the_stages_of_what_is_generated() -> None:
    config = settings.load("pocket_demo", [])
    problems = ProblemRange("train", 20)
    request = TraceRequest("pocket/teacher", "teacher", problems, config.sampling)
    keys, counts = set(), []
    for shard in (4, 250):
        sharded = settings.load("pocket_demo", [f"shard={shard}"])
        steps = Steps.of(sharded, Display()).traces
        stage = steps.stage_of(request)
        keys.add(stage.key)
        counts.append([job.count for job in steps.jobs(request, stage)])
    assert len(keys) == 2
    # However large shards may be, two workers get something to do.
    assert counts == [[4] * 5, [10, 10]]


# No students ---------------------------------------------------------------------------------


def test_an_experiment_may_have_no_students() -> None:
    config = settings.load("pocket_demo", ["students=[]"])
    assert config.students == ()
    assert cells_of(config) == []
    assert config.models == ("pocket/teacher", "pocket/proxy-a", "pocket/proxy-b")
    # Without students there are no exams, so their problems are not needed.
    many = settings.load("pocket_demo", ["students=[]", "exam_problems=1000000000"])
    preflight.preflight(many, convert=False)
    assert ("students", "none: the teacher is defended and examined, and not attacked") in (
        validate.stages(config)
    )


def teacher_row(correct: int, n: int = 24, **fields: object) -> ResultRow:
    measured = {"metric": "accuracy", "value": correct / n, "n": n, "ci95": wilson(correct, n)}
    named = {"role": "teacher", "model": "teacher", "task": "gsm8k"}
    return ResultRow.model_validate(named | measured | fields)


def test_a_report_without_students_says_what_it_does_not_show(tmp_path: Path) -> None:
    rows = [
        teacher_row(2),
        teacher_row(0, decoding="sampled@0.7"),
        teacher_row(1, defense="doge", strength=0.3),
        teacher_row(0, defense="doge", strength=0.3, decoding="sampled@0.7"),
    ]
    assert len(result_table(rows)) == 1
    assert [line[1] for line in teacher_table(rows)[1:]] == ["none", "none"] + ["doge (0.3)"] * 2
    words = plain_words(rows)
    assert "does not show what a defense takes from an attacker" in words[0]
    assert words[1].startswith("The undefended teacher solves, greedy: 2 of 24 problems")
    assert "The teacher kept 50.0 %" in words[3]
    assert words[4].endswith("The undefended one solves none, so the utility kept is undefined.")
    note = "doge: a note on the search."
    document = results_document({"name": "bare", "notes": [note]}, rows)
    (tmp_path / "results.json").write_text(json.dumps(document))
    page = write_report(tmp_path).read_text()
    assert "The teacher</h2>" in page
    assert "All students</h2>" not in page
    assert f"<li>{note}</li>" in page


def test_a_teacher_whose_search_accepted_nothing_is_called_undefended() -> None:
    words = plain_words([teacher_row(5), teacher_row(5, defense="doge", strength=0.0)])
    assert "At strength 0 it is the undefended teacher." in words[2]


def test_a_floor_that_asked_nothing_or_refused_everything_is_told() -> None:
    def head(greedy: float, accepted: bool) -> dict[str, Any]:
        return {"clean": {"greedy": greedy, "sampled": 0.5}, "rounds": [{"accepted": accepted}]}

    assert _notes("doge", [head(0.5, True)]) == []
    assert _notes("doge", [{"clean": None, "rounds": []}]) == []
    assert "asked nothing of the defended one" in _notes("doge", [head(0.0, True)])[0]
    assert "none of 1 rounds kept the utility floor" in _notes("doge", [head(0.5, False)])[0]
