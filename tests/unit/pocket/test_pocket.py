"""The embedded benchmark: frozen, right, readable by both tokenizers, and disjoint."""

import hashlib
import re
from itertools import islice
from random import Random

import pytest

from azeotrope.pocket import language
from azeotrope.pocket.problems import EASY_LARGEST, LARGEST, apply, problems
from azeotrope.tasks import PocketConfig
from azeotrope.tasks.pocket import Pocket

COUNT = 300


def take(split: str, count: int = COUNT, **more):
    return list(islice(problems(split, **more), count))


def recompute(question: str) -> int:
    """The answer read from the words of the question alone."""
    start, *steps, _ = re.findall(r"[^.?]+[.?]", question)
    value = int(re.search(r"\d+", start)[0])
    for step in steps:
        number = re.search(r"\d+", step)
        if "double" in step:
            value *= 2
        elif re.search(r"finds|wins|arrive|buys", step):
            value += int(number[0])
        elif re.search(r"drops|gives away|lost|sells", step):
            value -= int(number[0])
        else:
            raise AssertionError(f"no operation in {step!r}")
    return value


@pytest.mark.parametrize("difficulty", ["easy", "full"])
def test_answers_equal_a_computation_from_the_text(difficulty: str) -> None:
    for problem in take("test", difficulty=difficulty):
        assert problem.answer == recompute(problem.question)
        value = problem.values[0]
        for (operation, k), after in zip(problem.steps, problem.values[1:], strict=True):
            value = apply(operation, value, k)
            assert value == after
        assert all(0 <= value <= LARGEST for value in problem.values)


def test_easy_problems_never_exceed_ten_and_full_ones_always_do() -> None:
    for steps in ((1, 4), (3, 4)):
        easy = take("train", difficulty="easy", steps=steps)
        full = take("train", difficulty="full", steps=steps)
        assert all(max(problem.values) <= EASY_LARGEST for problem in easy)
        assert all(max(problem.values) > EASY_LARGEST for problem in full)
        lengths = {len(problem.steps) for problem in easy + full}
        assert lengths == set(range(steps[0], steps[1] + 1))


def test_no_computation_is_in_two_splits_or_twice_in_one() -> None:
    seen = {split: [p.arithmetic for p in take(split, 500)] for split in ("train", "test")}
    seen["validation"] = [p.arithmetic for p in take("validation", 500, seed=5)]
    for split, found in seen.items():
        assert len(set(found)) == len(found), split
    assert not set(seen["train"]) & set(seen["test"])
    assert not set(seen["train"]) & set(seen["validation"])
    assert not set(seen["test"]) & set(seen["validation"])


def test_the_stream_is_frozen() -> None:
    # A change of this hash is another benchmark: give it another VERSION and new weights.
    text = "\n".join(f"{p.row} {p.question} {p.answer}" for p in take("test"))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "3972cb00498bb1af"


def test_a_row_does_not_depend_on_how_many_are_read() -> None:
    assert take("test", 20) == take("test", 50)[:20]
    assert take("test", 20, seed=1) != take("test", 20)
    task = Pocket(PocketConfig())
    assert task.problems("test", 5, skip=10) == task.problems("test", 15)[10:]


@pytest.mark.parametrize("notation", ["digits", "words"])
def test_text_survives_a_tokenizer(tokenizer, notation) -> None:
    rng = Random(3)
    for problem in take("train"):
        completion = language.reasoning(problem, rng, notation=notation)
        for text in (problem.question, completion):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == text


def test_the_word_tokenizer_gives_each_number_one_token(word) -> None:
    for value in range(LARGEST + 1):
        for notation in ("digits", "words"):
            text = language.write_number(value, notation)
            assert len(word(text, add_special_tokens=False)["input_ids"]) == 1


def test_words_undo_to_digits_exactly() -> None:
    changed = 0
    for index, problem in enumerate(take("train")):
        digits = language.reasoning(problem, Random(index), notation="digits")
        words = language.reasoning(problem, Random(index), notation="words")
        assert language.digits_for_words(words) == digits
        assert language.digits_for_words(digits) == digits
        changed += words != digits
        reasoning, _, answer = words.partition("</think>")
        assert not re.search(r"\d", reasoning)
        assert answer == f" #### {problem.answer}"
    assert changed == COUNT


def test_reasoning_states_each_value_and_slips_carry_on() -> None:
    task = Pocket(PocketConfig(slip=0.0))
    slipping = Pocket(PocketConfig(slip=1.0))
    wrong = 0
    for clean, slipped in zip(
        task.problems("test", 100), slipping.problems("test", 100), strict=True
    ):
        assert task.check(clean.solution, clean.answer)
        assert task.extract(clean.solution) == clean.answer
        # The stated answer is the last number of the reasoning, right or wrong.
        body, _, answer = slipped.solution.partition("</think>")
        assert answer.removeprefix(" #### ") == re.findall(r"\d+", body)[-1]
        wrong += not task.check(slipped.solution, slipped.answer)
    assert wrong > 50


def test_only_a_stated_answer_counts() -> None:
    task = Pocket(PocketConfig())
    assert task.extract("<think> 4 </think> #### 12") == "12"
    assert task.extract("<think> #### 12 </think> so twelve") is None
    assert task.extract("<think> the answer is 12") is None
    with pytest.raises(ValueError, match=r"splits .*; got 'dev'"):
        task.problems("dev", 1)
