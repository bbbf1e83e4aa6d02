"""Completions end with every token that may end them, whichever file names it."""

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import AddedToken

from azeotrope import endings, models
from azeotrope.collect import collect
from azeotrope.endings import end_ids, end_of_turn, end_pairs, learned_end
from azeotrope.engine.row_batch import BatchRow, RowBatch
from azeotrope.generation import Sampling
from azeotrope.tasks import PocketConfig
from azeotrope.tasks import build as build_task
from azeotrope.tokens import Boundary, encode, encode_prompt, from_ids

COUNT = 24
GREEDY = Sampling(temperature=0.0)


@pytest.fixture
def renamed(tmp_path: Path) -> str:
    """The pocket teacher whose tokenizer names another end than the one that the model writes."""
    source = Path(models.resolve("pocket/teacher"))
    folder = tmp_path / "renamed"
    shutil.copytree(source, folder)
    changes = {
        "tokenizer_config.json": {"eos_token": "<unk>"},
        "generation_config.json": {"eos_token_id": [3, 2]},
    }
    for name, change in changes.items():
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    return str(folder)


def templated(tokenizer, end: str, *, special: bool = True):
    """A tokenizer whose template ends an assistant's turn with this token."""
    tokenizer.add_tokens([AddedToken(end, special=special)], special_tokens=special)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}"
        "{% if m['role'] == 'assistant' %}" + end + "\n{% endif %}{% endfor %}"
    )
    return tokenizer


def test_rows_end_where_the_generation_configuration_says(renamed: str) -> None:
    task = build_task(PocketConfig())
    problems = task.problems("test", COUNT)
    expected = collect(models.load("pocket/teacher"), task, problems, GREEDY)
    assert sum(trace.correct for trace in expected) > COUNT / 2
    loaded = models.load(renamed)
    assert end_ids(loaded.tokenizer) == {2, 3}
    written = collect(loaded, task, problems, GREEDY)
    assert [t.completion_ids for t in written] == [t.completion_ids for t in expected]
    assert [t.correct for t in written] == [t.correct for t in expected]
    assert all(trace.finished for trace in written)


def test_the_row_batch_ends_there_too(renamed: str) -> None:
    task, loaded = build_task(PocketConfig()), models.load(renamed)
    prompt = encode_prompt(loaded.tokenizer, task.messages(task.problems("test", 1)[0].question))
    row = BatchRow(prompt, limit=96)
    batch = RowBatch(loaded.model, end_ids=end_ids(loaded.tokenizer), pad_id=0)
    batch.step([row])
    while not row.is_done:
        batch.step()
    assert row.finish == "stop"
    assert 2 not in row.written


def test_the_end_that_the_model_wrote_is_the_one_that_is_learned(renamed: str) -> None:
    tokenizer = models.load_tokenizer(renamed)
    for end in (2, 3):
        example = from_ids(tokenizer, (1, 5), (6, 7, end), boundary=Boundary(), max_length=64)
        assert example.completion == (6, 7, end)
        assert example.answer[-1]
    cut = from_ids(tokenizer, (1, 5), (6, 7), boundary=Boundary(), max_length=64)
    assert cut.completion == (6, 7)


@pytest.mark.parametrize("end", ["<end_of_turn>", "<|end|>", "<|eot_id|>"])
def test_the_end_of_turn_of_the_template_ends_and_is_learned(end: str) -> None:
    tokenizer = templated(models.load_tokenizer("pocket/teacher"), end)
    turn = tokenizer.convert_tokens_to_ids(end)
    assert end_of_turn(tokenizer) == learned_end(tokenizer) == turn
    assert end_ids(tokenizer) == {turn, tokenizer.eos_token_id}
    example = encode(
        tokenizer,
        [{"role": "user", "content": "how many"}],
        "so 2",
        boundary=Boundary(),
        max_length=64,
    )
    assert example.completion[-1] == turn


def test_text_after_a_message_is_no_end_of_turn() -> None:
    tokenizer = templated(models.load_tokenizer("pocket/teacher"), "then", special=False)
    assert end_of_turn(tokenizer) is None
    assert learned_end(tokenizer) == tokenizer.eos_token_id


def test_a_template_that_takes_no_assistant_falls_back_to_the_tokenizer() -> None:
    tokenizer = models.load_tokenizer("pocket/teacher")
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert learned_end(tokenizer) == tokenizer.eos_token_id


def test_without_any_end_there_is_one_clear_error() -> None:
    tokenizer = models.load_tokenizer("pocket/teacher")
    tokenizer.chat_template, tokenizer.eos_token = None, None
    endings.declare(tokenizer, None)
    with pytest.raises(ValueError, match=r"no end-of-sequence token.*set tokenizer\.eos_token"):
        end_ids(tokenizer)


def test_ends_of_two_tokenizers_mean_the_same() -> None:
    teacher = templated(models.load_tokenizer("pocket/teacher"), "<|eot_id|>")
    student = models.load_tokenizer("pocket/other")
    turn = teacher.convert_tokens_to_ids("<|eot_id|>")
    ends = {turn: student.eos_token_id, teacher.eos_token_id: student.eos_token_id}
    assert end_pairs(teacher, student) == ends
    # The student's own end of the same spelling is kept apart.
    assert end_pairs(teacher, teacher) == {turn: turn, teacher.eos_token_id: teacher.eos_token_id}
