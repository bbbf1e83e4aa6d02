"""What feature and scoring actors read of a trace file, and the numbers they write."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from actors.proxy import ProxyActor
from actors.scorer import ScoreActor
from actors.teacher import FeatureJob, TeacherActor, read_examples
from azeotrope import models, tasks
from azeotrope.collect import collect
from azeotrope.generation import Sampling
from azeotrope.heads.features import read_features
from azeotrope.tokens import encode_prompt
from azeotrope.traces import Trace, ground_truth, write_traces

PROXIES = ("pocket/proxy-a", "pocket/proxy-b")


@pytest.fixture(scope="module")
def teacher() -> models.Loaded:
    return models.load("pocket/teacher", device="cpu")


@pytest.fixture(scope="module")
def written(teacher: models.Loaded) -> list[Trace]:
    """Sampled answers, one of which is wrong."""
    task = tasks.build(tasks.PocketConfig())
    found = collect(teacher, task, task.problems("train", 5), Sampling(temperature=1.0))
    return [replace(trace, correct=number != 2) for number, trace in enumerate(found)]


@pytest.fixture(scope="module")
def reference() -> list[Trace]:
    task = tasks.build(tasks.PocketConfig(slip=0))
    return ground_truth(task, task.problems("train", 5))


def job(folder: Path, traces: list[Trace], **settings: object) -> FeatureJob:
    write_traces(folder / "0.parquet", traces)
    return FeatureJob.model_validate(
        {
            "traces": str(folder / "0.parquet"),
            "folder": str(folder / "out"),
            "task": tasks.PocketConfig(),
            **settings,
        }
    )


def sent(given: FeatureJob) -> dict[str, np.ndarray]:
    return {"job": np.array([given.model_dump_json()])}


# Texts


def test_what_the_teacher_wrote_is_read_by_its_own_tokens(
    teacher: models.Loaded, written: list[Trace], tmp_path: Path
) -> None:
    found, own = read_examples(job(tmp_path, written), teacher)
    assert own
    assert [(e.id, e.prompt, e.completion) for e in found] == [
        (trace.id, trace.prompt_ids, trace.completion_ids) for trace in written
    ]


def test_a_text_that_no_model_wrote_goes_through_the_teachers_tokenizer(
    teacher: models.Loaded, reference: list[Trace], tmp_path: Path
) -> None:
    found, own = read_examples(job(tmp_path, reference), teacher)
    assert not own
    task = tasks.build(tasks.PocketConfig())
    for example, trace in zip(found, reference, strict=True):
        assert example.id == trace.id
        assert example.prompt == encode_prompt(teacher.tokenizer, task.messages(trace.question))
        # Reference solutions end, and a student learns to.
        assert example.completion[-1] == teacher.tokenizer.eos_token_id
        assert teacher.tokenizer.decode(example.completion[:-1]) == trace.text
        assert any(example.reasoning)
        assert any(example.answer)


def test_a_text_that_was_cut_does_not_end(
    teacher: models.Loaded, reference: list[Trace], tmp_path: Path
) -> None:
    cut = [replace(reference[0], finished=False), *reference[1:]]
    found, _ = read_examples(job(tmp_path, cut), teacher)
    ends = [e.completion[-1] == teacher.tokenizer.eos_token_id for e in found]
    assert ends == [False, True, True, True, True]


@pytest.mark.parametrize("kind", ["written", "reference"])
def test_wrong_texts_can_be_left_out(
    kind: str, teacher: models.Loaded, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    traces = request.getfixturevalue(kind)
    traces = [replace(trace, correct=number != 2) for number, trace in enumerate(traces)]
    every, _ = read_examples(job(tmp_path / "a", traces), teacher)
    right, _ = read_examples(job(tmp_path / "b", traces, only_correct=True), teacher)
    assert len(every) == 5
    assert right == [example for number, example in enumerate(every) if number != 2]


def test_a_file_of_both_kinds_is_refused(
    teacher: models.Loaded, written: list[Trace], reference: list[Trace], tmp_path: Path
) -> None:
    other = replace(reference[3], id="a-text")
    given = job(tmp_path, [*written[:3], other])
    with pytest.raises(ValueError, match=r"1 of 4 traces in .* no token ids, first a-text; a file"):
        read_examples(given, teacher)


def test_features_say_who_wrote_the_text(
    written: list[Trace], reference: list[Trace], tmp_path: Path
) -> None:
    teacher = TeacherActor("pocket/teacher")
    proxy = ProxyActor("pocket/proxy-a", "pocket/teacher", 0)
    blocks = len(proxy.loaded.model.base_model.layers)
    assert blocks == 2, "the last block's inputs are not the last states"
    for name, traces, own in (("own", written, True), ("truth", reference, False)):
        given = job(tmp_path / name, traces, layer="last")
        for actor in (teacher, proxy):
            actor(sent(given))
        ours = read_features(tmp_path / name / "out/teacher")
        theirs = read_features(tmp_path / name / "out/proxy-0")
        examples, _ = read_examples(given, teacher.loaded)
        assert [item.own for item in (*ours, *theirs)] == [own] * 10
        for one, other, example in zip(ours, theirs, examples, strict=True):
            assert one.targets.tolist() == other.targets.tolist() == list(example.completion)
            assert len(one.hidden) == len(example.completion)
            # What enters a block is kept for the prompt too.
            assert len(other.hidden) == len(example) - 1


# Scores


def direct(
    names: tuple[str, ...], traces: list[Trace], teacher: models.Loaded, given: FeatureJob
) -> dict[str, float]:
    """Mean log-probability a token under whole models, text by text."""
    examples, _ = read_examples(given, teacher)
    found = {}
    for example, trace in zip(examples, traces, strict=True):
        ids = torch.tensor([example.prompt + example.completion])
        first, means = len(example.prompt) - 1, []
        for name in names:
            model = models.load(name, device="cpu").model
            with torch.no_grad():
                log_p = model(input_ids=ids).logits[0, first:-1].double().log_softmax(-1)
            targets = torch.tensor(example.completion)
            means.append(float(log_p.gather(-1, targets[:, None]).mean()))
        found[trace.id] = sum(means) / len(means)
    return found


@pytest.mark.parametrize("names", [PROXIES[:1], PROXIES])
@pytest.mark.parametrize("kind", ["written", "reference"])
def test_scores_are_mean_log_probabilities(
    kind: str,
    names: tuple[str, ...],
    teacher: models.Loaded,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("actors.scorer.BATCH", 2)
    traces: list[Trace] = request.getfixturevalue(kind)
    given = job(tmp_path, traces)
    batch = sent(given)
    assert ScoreActor(names, "pocket/teacher")(batch) is batch
    found = json.loads((tmp_path / "out/0.json").read_text())
    expected = direct(names, traces, teacher, given)
    assert list(found) == list(expected)
    assert found == pytest.approx(expected, rel=1e-5)
    assert len({round(value, 3) for value in found.values()}) == len(traces)


def test_only_right_traces_are_scored_and_what_is_there_is_kept(
    written: list[Trace], tmp_path: Path
) -> None:
    actor = ScoreActor(PROXIES[:1], "pocket/teacher")
    given = job(tmp_path, written, only_correct=True)
    actor(sent(given))
    output = tmp_path / "out/0.json"
    right = [trace.id for trace in written if trace.correct]
    assert list(json.loads(output.read_text())) == right
    output.write_text("{}")
    actor(sent(given))
    assert output.read_text() == "{}"


def test_a_proxy_with_permuted_ids_gives_the_same_scores(
    word: PreTrainedTokenizerFast, written: list[Trace], tmp_path: Path
) -> None:
    plain = models.load("pocket/proxy-a", device="cpu")
    order = list(np.random.default_rng(0).permutation(len(word)))
    data = json.loads(word.backend_tokenizer.to_str())
    data["model"]["vocab"] = {t: int(order[i]) for t, i in data["model"]["vocab"].items()}
    for added in data["added_tokens"]:
        added["id"] = int(order[added["id"]])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(data)),
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
    )
    permutation = torch.tensor(np.array(order))
    with torch.no_grad():
        # The two are tied: one shuffle is both.
        tied = models.is_tied(plain.model)
        layers = [plain.model.get_input_embeddings(), models.head_of(plain.model)]
        for layer in layers[:1] if tied else layers:
            layer.weight[permutation] = layer.weight.clone()
    mixed = models.Loaded(plain.model, tokenizer)
    models.save(mixed, tmp_path / "mixed")
    for name, folder in (("pocket/proxy-a", "one"), (str(tmp_path / "mixed"), "two")):
        ScoreActor((name,), "pocket/teacher")(sent(job(tmp_path / folder, written)))
    one, two = (json.loads((tmp_path / name / "out/0.json").read_text()) for name in ("one", "two"))
    assert one == pytest.approx(two, rel=1e-5)
