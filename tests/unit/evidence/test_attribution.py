"""Texts are attributed to the key that marked them and to no other; unmarked ones to none."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from azeotrope import models, tasks
from azeotrope.collect import collect
from azeotrope.config import ConfigError
from azeotrope.defenses.answers_only import Config as AnswersOnlyConfig
from azeotrope.defenses.answers_only import build as answers_only
from azeotrope.defenses.base import Defense
from azeotrope.defenses.watermark import CONTEXT, Config, build, detect
from azeotrope.evidence.attribution import attribute
from azeotrope.generation import Sampling
from gateway.accounts.sqlite_keys import KEYS_FILE, SqliteKeyStore
from workflows import cli
from workflows.attribute import CONFIGURED, read_texts

TASK = tasks.build(tasks.PocketConfig())
OWNERS = tuple(f"customer {number}" for number in range(20))
SECRETS = {name: f"the secret of {name}" for name in OWNERS}


def marks_of(secrets: dict[str, str]) -> dict[str, Defense]:
    return {holder: build(Config(key=secret)) for holder, secret in secrets.items()}


MARKS = marks_of(SECRETS)


@pytest.fixture(scope="module")
def teacher() -> models.Loaded:
    return models.load("pocket/teacher", device="cpu")


def written(teacher: models.Loaded, key: str | None, strength: float = 2.0) -> list[str]:
    """Texts as an owner finds them: without token ids and without prompts."""
    defense = build(Config(key=key, strength=strength)) if key else build(Config(strength=0))
    traces = collect(teacher, TASK, TASK.problems("test", 40), Sampling(), hooks=[defense])
    return [trace.text for trace in traces]


@pytest.fixture(scope="module")
def unmarked(teacher: models.Loaded) -> list[str]:
    return written(teacher, None)


def encoded(teacher: models.Loaded, texts: list[str]) -> list[list[int]]:
    return [teacher.tokenizer.encode(text, add_special_tokens=False) for text in texts]


def test_marked_text_is_attributed_to_its_key_and_to_no_other(teacher: models.Loaded) -> None:
    ids = encoded(teacher, written(teacher, SECRETS[OWNERS[7]]))
    first, *rest = attribute(ids, MARKS)
    assert first.holders == (OWNERS[7],)
    assert first.detected
    assert first.p_value < 1e-6
    assert len(rest) == 19
    assert not any(verdict.detected for verdict in rest)
    # It is the detector's own result, corrected for twenty marks; repeated texts prove no more.
    assert first.detection == detect(ids, key=SECRETS[OWNERS[7]])
    assert first.p_value == pytest.approx(20 * first.detection.p_value)
    assert attribute(ids * 3, MARKS)[0] == first


def test_unmarked_text_is_attributed_to_no_key(teacher: models.Loaded, unmarked: list[str]) -> None:
    assert not any(item.detected for item in attribute(encoded(teacher, unmarked), MARKS))


def test_texts_of_two_keys_are_attributed_to_both(teacher: models.Loaded) -> None:
    # Each half is noise to the other's mark: at the strength of one key's texts, one is missed.
    texts = [text for n in (2, 3) for text in written(teacher, SECRETS[OWNERS[n]], strength=5.0)]
    verdicts = attribute(encoded(teacher, texts), MARKS)
    detected = [verdict.holders for verdict in verdicts if verdict.detected]
    assert sorted(detected) == [(OWNERS[2],), (OWNERS[3],)]


def test_a_rotated_key_has_its_successors_mark_and_is_tried_once() -> None:
    ids = [list(range(40))]
    (only,) = attribute(ids, marks_of({"old": "k", "new": "k"}))
    assert only.holders == ("old", "new")
    assert only.p_value == detect(ids, key="k").p_value


def test_unmarked_text_is_attributed_as_seldom_as_the_rate_says() -> None:
    # One text after another under ten marks each: the least of ten p-values, times ten.
    rate, trials = 0.2, 200
    ids = [[(7 * position * position) % 50 for position in range(60)]]
    alarms = sum(
        any(verdict.detected for verdict in attribute(ids, marks_of(marks), alarm_rate=rate))
        for marks in (
            {f"{trial}-{n}": f"{trial}-{n}" for n in range(10)} for trial in range(trials)
        )
    )
    # 40 of 200 are expected at most; more than 62 come by chance less than once in ten thousand.
    assert alarms <= 62


def test_too_little_evidence_and_wrong_settings_are_reported() -> None:
    mark = marks_of({"a": "k"})
    (verdict,) = attribute([[1] * CONTEXT], mark)
    assert (verdict.detection.scored, verdict.detection.z, verdict.detected) == (0, 0.0, False)
    with pytest.raises(ValueError, match="no mark"):
        attribute([[1, 2]], {})
    with pytest.raises(ValueError, match="between 0 and 1, got 1"):
        attribute([[1, 2]], mark, alarm_rate=1.0)
    with pytest.raises(TypeError, match="AnswersOnly leaves no mark"):
        attribute([[1, 2]], {"a": answers_only(AnswersOnlyConfig())})


def test_z_by_hand() -> None:
    # 40 pairs of a quarter: 10 are green on average, with a variance of 7.5.
    detection = detect([list(range(44))], key="k")
    assert detection.scored == 40
    assert detection.z == pytest.approx((detection.green - 10) / 7.5**0.5)


# The command


def output_of(*args: object, command: str = "attribute") -> str:
    result = CliRunner().invoke(
        cli.app, [command, *map(str, args)], catch_exceptions=False, env={"COLUMNS": "160"}
    )
    assert result.exit_code == 0, result.output
    assert not result.stderr
    return result.stdout


@pytest.fixture
def store(tmp_path: Path) -> Path:
    keys = SqliteKeyStore(tmp_path / "home" / KEYS_FILE)
    for name in OWNERS:
        keys.create(name)
    return tmp_path / "home"


def test_the_command_names_the_key(
    teacher: models.Loaded, unmarked: list[str], store: Path, tmp_path: Path
) -> None:
    keys = SqliteKeyStore(store / KEYS_FILE)
    leaking = keys.list()[4]
    # A key that was revoked or rotated is still identified by its mark.
    successor, _ = keys.rotate(leaking.id)
    file = tmp_path / "found.jsonl"
    texts = written(teacher, leaking.watermark_key)
    file.write_text("".join(json.dumps({"text": text, "at": 1}) + "\n" for text in texts))
    output = output_of(file, "pocket/teacher", "--store", store)
    verdict = next(line for line in output.splitlines() if "carry the mark of" in line)
    assert {leaking.id, successor.id} == set(
        verdict.partition("mark of ")[2].partition(" (")[0].split(", ")
    )
    assert "40 texts, 21 marks tried" in output
    # The command's name in earlier releases.
    assert output_of(file, "pocket/teacher", "--store", store, command="trace") == output
    assert leaking.name in output
    assert leaking.watermark_key not in output
    plain = tmp_path / "unmarked.txt"
    plain.write_text("\n".join(text.replace("\n", " ") for text in unmarked))
    assert "No mark is found" in output_of(plain, "pocket/teacher", "--store", store)


def test_the_source_says_how_the_mark_was_made(
    teacher: models.Loaded, store: Path, tmp_path: Path
) -> None:
    point = {
        "defense": "watermark",
        "checkpoint": models.resolve("pocket/teacher"),
        "decoding": [{"name": "watermark", "key": "the source's", "context": 3, "share": 0.5}],
    }
    run = tmp_path / "run"
    run.mkdir()
    (run / "points.json").write_text(json.dumps([point]))
    defense = build(Config.model_validate(point["decoding"][0]))
    traces = collect(teacher, TASK, TASK.problems("test", 40), Sampling(), hooks=[defense])
    file = tmp_path / "found.jsonl"
    file.write_text("".join(json.dumps({"text": item.text}) + "\n" for item in traces))
    output = output_of(file, run, "--store", store)
    assert f"carry the mark of {CONFIGURED}" in output
    assert "(share 0.5, context 3)" in output
    assert "No mark is found" in output_of(file, run, "--store", store, "--context", 5)


def test_wrong_input_is_one_error(store: Path, tmp_path: Path) -> None:
    file = tmp_path / "texts.txt"
    with pytest.raises(ConfigError, match="no file"):
        read_texts(file)
    file.write_text("\n \n")
    with pytest.raises(ConfigError, match="holds no text"):
        read_texts(file)
    file.write_text('{"prompt": "a", "answer": "b"}\n')
    with pytest.raises(
        ConfigError, match=r"row 1 has no text in a field `text`; .* prompt, answer"
    ):
        read_texts(file)
    file.write_text('{"text": "a"}\n\nno json\n')
    with pytest.raises(ConfigError, match="row 2 is no JSON"):
        read_texts(file)
    file.write_text("a b\n\nc {\n")
    assert read_texts(file) == ["a b", "c {"]
    with pytest.raises(ConfigError, match="no keys in"):
        output_of(file, "pocket/teacher", "--store", tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="no pocket model"):
        output_of(file, "pocket/nobody", "--store", store)
    assert "too short to judge" in output_of(file, "pocket/teacher", "--store", store)
