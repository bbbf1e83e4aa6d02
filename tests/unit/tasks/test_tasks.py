"""Problems, answer extraction and the errors of broken files."""

import hashlib
import json
import subprocess
import sys
import threading
from itertools import islice
from pathlib import Path
from random import Random
from typing import get_args

import pytest
from jaxtyping import TypeCheckError
from pydantic import TypeAdapter, ValidationError

from azeotrope.pocket import language
from azeotrope.pocket.problems import Split, apply, problems
from azeotrope.problems import Problem
from azeotrope.tasks import Gsm8kConfig, JsonlConfig, PocketConfig, TaskConfig, answers, build
from azeotrope.tasks.gsm8k import data_folder

FROZEN = {
    "train": "09761b49f08720fa50d4b508275f7c7199e00142cdc5699db093a789f8896abf",
    "validation": "8ed7c5d6057f1833bb812a018f891ef52ac6f0d5845d0e833bf7a59b3a5e54ae",
    "test": "87068ca5a3b2024eea83a924abd095af6e68a5a0b4406a8c9f2ee22e31c615f3",
}
"""sha256 of the first 1,000 questions of pocket-v1, joined by newlines. A change of any is a new
version of the task: results of different versions cannot be compared."""

SPLITS = get_args(Split)
ROOT = Path(__file__).parents[3]


def write_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def gsm8k_folder(folder: Path, count: int = 6) -> Path:
    rows: list[dict[str, object]] = [
        {
            "question": f"Ann has {i} eggs and buys 1,000. How many?",
            "answer": f"She has {i}+1000=<<{i}+1000={1000 + i}>>{1000 + i} eggs.\n#### 1,00{i}",
        }
        for i in range(count)
    ]
    write_rows(folder / "train.jsonl", rows)
    write_rows(folder / "test.jsonl", rows[:2])
    return folder


@pytest.fixture(scope="module")
def stream() -> dict[str, list[list[str]]]:
    """Computation and question of 2,000 problems a split, as another process writes them.

    Another process has another hash seed, which must not matter; and it does not check the types
    of every call, which makes it ten times as fast.
    """
    code = (
        "import json, sys\n"
        "from itertools import islice\n"
        "from azeotrope.pocket.problems import problems\n"
        "print(json.dumps({split: [[p.arithmetic, p.question] for p in islice(problems(split), "
        "2000)] for split in sys.argv[1:]}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *SPLITS], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def test_pocket_splits_share_no_computation(stream: dict[str, list[list[str]]]) -> None:
    found = {split: {arithmetic for arithmetic, _ in stream[split]} for split in SPLITS}
    assert [len(found[split]) for split in SPLITS] == [2000, 2000, 2000]
    assert not found["train"] & found["validation"]
    assert not found["train"] & found["test"]
    assert not found["validation"] & found["test"]


@pytest.mark.parametrize("split", SPLITS)
def test_pocket_questions_are_frozen(split: str, stream: dict[str, list[list[str]]]) -> None:
    questions = [question for _, question in stream[split]]
    assert hashlib.sha256("\n".join(questions[:1000]).encode()).hexdigest() == FROZEN[split]
    here = build(PocketConfig()).problems(split, 50)
    assert [problem.question for problem in here] == questions[:50]


def test_pocket_answer_is_the_last_value_of_its_steps() -> None:
    for problem in islice(problems("train"), 200):
        value = problem.values[0]
        for operation, k in problem.steps:
            value = apply(operation, value, k)
            assert 0 <= value <= 20
        assert value == problem.answer


def test_ground_truth_without_slips_is_always_right() -> None:
    task = build(PocketConfig(slip=0))
    assert all(task.check(p.solution, p.answer) for p in task.problems("train", 300))


def test_ground_truth_slips_in_a_quarter_of_the_steps() -> None:
    slipped = total = 0
    for problem in islice(problems("train"), 600):
        seed = f"slips of {problem.row}"
        clean = language.reasoning(problem, Random(seed), slip=0.0)
        # A slip is seen at the first step: later ones start from another value, and a draw that
        # slips also consumes one more random number.
        total += 1
        slipped += first_result(language.reasoning(problem, Random(seed), slip=0.25)) != (
            first_result(clean)
        )
    # 0.25, less the slips that clamping to 0..20 undoes; 600 draws have a deviation of 0.018.
    assert 0.19 < slipped / total < 0.29


def first_result(text: str) -> int:
    """The value after the first step, read off the second clause in any of its wordings."""
    clause = text.split(". ")[1]
    return int(clause.split(".")[0].split()[-1])


def test_pocket_skip_continues_the_same_stream() -> None:
    task = build(PocketConfig())
    assert task.problems("test", 5, skip=3) == task.problems("test", 8)[3:]


def test_pocket_refuses_unknown_splits() -> None:
    with pytest.raises(ValueError, match=r"train, validation, test; got 'dev'"):
        build(PocketConfig()).problems("dev", 1)


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("48/2 = 24.\n#### 72", "72"),
        ("#### $1,000.00", "1000"),
        ("#### 18 dollars.", "18"),
        ("#### **72**", "72"),
        ("#### -$18", "-18"),
        ("#### .50", "0.5"),
        ("#### 18\\%", "18"),
        ("#### 7 apples, so\nthe 9 pears stay", "7"),
        ("#### 5\nWait.\n#### 6", "6"),
        ("#### Step one\n2 + 5 = 7\n#### Done", "7"),
        ("First 12. So \\boxed{18} of the 40.", "18"),
        ("so \\boxed{\\frac{3}{4}}", "0.75"),
        ("#### 4, which is \\boxed{5}", "5"),
        ("12 eggs. The answer is 18. There were 40.", "18"),
        ("The final answer is: $1,234", "1234"),
        ("we get 20-5=15 eggs", "15"),
        ("between 10-15", "15"),
        ("it went down to -3", "-3"),
        ("<think> #### 3 </think> #### 4", "4"),
        ("I do not know", None),
        ("", None),
    ],
)
def test_numbers_are_found(completion: str, answer: str | None) -> None:
    assert answers.extract(completion, numeric=True) == answer


def test_words_count_only_where_they_are_marked() -> None:
    assert answers.extract("It is old.\n#### Paris", numeric=False) == "Paris"
    assert answers.extract("The answer is Paris.", numeric=False) == "Paris"
    assert answers.extract("Paris, of 1889", numeric=False) is None


@pytest.mark.parametrize(
    ("given", "reference"),
    [
        ("18.00", "18"),
        ("$18", "18"),
        ("1,000", "1000"),
        ("18 eggs", "18"),
        ("50%", "50"),
        ("\\frac{3}{4}", "0.75"),
        ("1/2", "0.5"),
        ("x^2 + 1", "1 + x^2"),
        ("paris", "Paris."),
    ],
)
def test_equal_answers(given: str, reference: str) -> None:
    assert answers.same(given, reference)


@pytest.mark.parametrize(
    ("given", "reference"),
    [("18.01", "18"), ("1", "1,000"), ("pairs", "paris"), ("-3", "3"), ("1/3", "0.33"), ("", "0")],
)
def test_different_answers(given: str, reference: str) -> None:
    assert not answers.same(given, reference)


def test_expressions_that_would_take_for_ever_are_refused() -> None:
    assert not answers.same("9^9^9^9", "3")
    assert not answers.same("9^{99999999}", "3")
    assert not answers.same("99999999!", "3")
    assert answers.number("1" + " word" * 5000 + "!") is None


def test_expressions_are_compared_in_threads_too() -> None:
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(answers.same("2/4", "\\frac{1}{2}")))
    thread.start()
    thread.join()
    assert found == [True]


def test_gsm8k_solution_has_no_calculator_marks(tmp_path: Path) -> None:
    task = build(Gsm8kConfig(path=str(gsm8k_folder(tmp_path)), validation=2))
    problem = task.problems("train", 1, skip=3)[0]
    assert problem.answer == "1003"
    assert problem.solution == "She has 3+1000=1003 eggs.\n#### 1003"
    assert task.check(problem.solution, problem.answer)
    assert task.check("so it is $1,003.00", problem.answer)
    assert not task.check("#### 1004", problem.answer)


def test_gsm8k_validation_is_the_end_of_train_and_keeps_its_ids(tmp_path: Path) -> None:
    path = str(gsm8k_folder(tmp_path))
    task = build(Gsm8kConfig(path=path, validation=2))
    assert [p.id for p in task.problems("validation", 2)] == [
        "gsm8k/validation/4",
        "gsm8k/validation/5",
    ]
    other = build(Gsm8kConfig(path=path, validation=1))
    assert other.problems("validation", 1)[0] == task.problems("validation", 1, skip=1)[0]
    questions = {p.question for p in task.problems("train", 4)}
    assert not questions & {p.question for p in task.problems("validation", 2)}


def test_gsm8k_asks_for_the_mark_it_looks_for(tmp_path: Path) -> None:
    task = build(Gsm8kConfig(path=str(gsm8k_folder(tmp_path)), validation=1))
    [message] = task.messages("How many eggs?")
    assert message["role"] == "user"
    assert message["content"].startswith("How many eggs?\n\n")
    assert message["content"].endswith("#### <number>")
    # A model that only repeats the instruction has not answered.
    assert task.extract(message["content"]) is None
    # Formatting a whole problem into the prompt would give its answer away.
    with pytest.raises((TypeError, TypeCheckError)):
        task.messages(task.problems("test", 1)[0])  # type: ignore[arg-type]


def test_gsm8k_says_how_many_problems_there_are(tmp_path: Path) -> None:
    path = str(gsm8k_folder(tmp_path))
    task = build(Gsm8kConfig(path=path, validation=2))
    with pytest.raises(ValueError, match="2 problems in test, fewer than the 3"):
        task.problems("test", 3)
    with pytest.raises(ValueError, match="splits train, validation, test; got 'dev'"):
        task.problems("dev", 1)
    with pytest.raises(ValueError, match="validation=6 would take all 6 train rows"):
        build(Gsm8kConfig(path=path, validation=6))


def test_broken_rows_are_named_in_one_error(tmp_path: Path) -> None:
    gsm8k_folder(tmp_path)
    good = '{"question": "q", "answer": "a #### 1"}'
    broken = [
        "{not json",
        '{"question": "q"}',
        '{"question": "q", "answer": "no mark"}',
        '{"question": "q", "answer": "#### many"}',
        '{"question": 3, "answer": "#### 1"}',
        "[1, 2]",
        '{"question": " ", "answer": "#### 1"}',
    ]
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join([good, "", *broken]) + "\n")
    with pytest.raises(ValueError, match="cannot be used") as caught:
        build(Gsm8kConfig(path=str(tmp_path), validation=0))
    text = str(caught.value)
    assert text.startswith(f"{path}: 7 of 8 rows cannot be used: line 3 is not JSON (")
    assert 'line 4 has no "answer" (it has question)' in text
    assert 'line 5 has an "answer" without a final "#### number"' in text
    assert "line 6 has an \"answer\" with 'many' after ####, not a number" in text
    assert 'line 7 has a "question" that is a int, not a text' in text
    assert "line 8" not in text
    assert text.endswith("; and 2 more")


def test_bytes_that_are_not_text_are_a_broken_row(tmp_path: Path) -> None:
    gsm8k_folder(tmp_path)
    (tmp_path / "test.jsonl").write_bytes(b'{"question": "\xff\xfe", "answer": "#### 1"}\n')
    with pytest.raises(ValueError, match=r"test\.jsonl: 1 of 1 rows cannot be used: line 1 is not"):
        build(Gsm8kConfig(path=str(tmp_path), validation=0))


def test_a_missing_or_empty_file_says_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"train\.jsonl; expected one JSON object per line"):
        build(Gsm8kConfig(path=str(tmp_path)))
    gsm8k_folder(tmp_path)
    (tmp_path / "test.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match=r"test\.jsonl has no rows"):
        build(Gsm8kConfig(path=str(tmp_path), validation=0))


def test_the_published_gsm8k_reads_whole() -> None:
    root = data_folder()
    if root is None:
        pytest.skip("there is no data folder with gsm8k/; AZEOTROPE_DATA may name one")
    folder = root / "gsm8k"
    task = build(Gsm8kConfig(path=str(folder)))
    every = [
        *task.problems("train", 6973),
        *task.problems("validation", 500),
        *task.problems("test", 1319),
    ]
    assert all(task.check(problem.solution, problem.answer) for problem in every)
    assert not any("<<" in problem.solution for problem in every)
    assert every[0].solution.endswith("altogether in April and May.\n#### 72")
    assert task.problems("test", 1)[0].answer == "18"


def test_jsonl_keeps_what_the_files_say(tmp_path: Path) -> None:
    train = write_rows(
        tmp_path / "train.jsonl",
        [
            {"question": "2 + 2?", "answer": 4, "solution": "Two and two is four."},
            {"question": "500 + 500?", "answer": "1,000"},
            {"question": "3 + 3?", "answer": "6", "solution": "3 + 3 = 6\n#### 6.0"},
        ],
    )
    test = write_rows(tmp_path / "test.jsonl", [{"question": "1 + 1?", "answer": "2"}])
    task = build(JsonlConfig(train=str(train), test=str(test)))
    found = [(p.row, p.question, p.answer, p.solution) for p in task.problems("train", 3)]
    assert found == [
        (0, "2 + 2?", "4", "Two and two is four.\n#### 4"),
        (1, "500 + 500?", "1000", "#### 1000"),
        (2, "3 + 3?", "6", "3 + 3 = 6\n#### 6.0"),
    ]
    assert all(task.check(p.solution, p.answer) for p in task.problems("train", 3))
    with pytest.raises(ValueError, match="files for train, test; got 'validation'"):
        task.problems("validation", 1)


def test_jsonl_compares_words_as_words(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"question": "Capital of France?", "answer": "Paris"},
        {"question": "Half of one?", "answer": "1/2"},
    ]
    path = str(write_rows(tmp_path / "rows.jsonl", rows))
    task = build(JsonlConfig(train=path, test=path))
    france, half = task.problems("test", 2)
    assert task.check("It lies on the Seine.\n#### paris", france.answer)
    assert not task.check("#### Lyon", france.answer)
    assert task.check("#### 0.5", half.answer)
    assert not task.check("I count 2 halves, so 0.5", half.answer)


def test_jsonl_refuses_a_solution_with_another_answer(tmp_path: Path) -> None:
    row: dict[str, object] = {"question": "2 + 2?", "answer": "4", "solution": "five\n#### 5"}
    path = str(write_rows(tmp_path / "rows.jsonl", [row]))
    with pytest.raises(ValueError, match="line 1 has answer '4' but a solution that ends in '5'"):
        build(JsonlConfig(train=path, test=path))


def test_jsonl_name_follows_the_text_and_overlap_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = write_rows(tmp_path / "a.jsonl", [{"question": "2 + 2?", "answer": "4"}])
    other = write_rows(tmp_path / "b.jsonl", [{"question": "2 + 3?", "answer": "5"}])
    name = build(JsonlConfig(train=str(first), test=str(other))).name
    assert not caplog.records
    assert build(JsonlConfig(train=str(first), test=str(other))).name == name
    assert build(JsonlConfig(train=str(first), test=str(first))).name != name
    assert "1 questions of train are also in test" in caplog.text


def test_the_name_selects_the_type() -> None:
    adapter = TypeAdapter(TaskConfig)
    assert adapter.validate_python({"name": "pocket", "slip": 0.5}) == PocketConfig(slip=0.5)
    assert adapter.validate_python({"name": "gsm8k"}) == Gsm8kConfig()
    with pytest.raises(ValidationError, match="'gsm8k', 'jsonl', 'pocket'"):
        adapter.validate_python({"name": "gsm9k"})
    with pytest.raises(ValidationError, match="slip"):
        adapter.validate_python({"name": "gsm8k", "slip": 0.5})


def test_problem_ids_tell_splits_apart(tmp_path: Path) -> None:
    task = build(Gsm8kConfig(path=str(gsm8k_folder(tmp_path)), validation=1))
    assert isinstance(task.problems("test", 1)[0], Problem)
    ids = [p.id for split, n in (("train", 5), ("test", 2)) for p in task.problems(split, n)]
    assert len(set(ids)) == 7


def test_importing_tasks_stays_light() -> None:
    code = (
        "import sys, azeotrope.tasks\n"
        "print([name for name in ('datasets', 'math_verify', 'sympy.parsing') "
        "if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
