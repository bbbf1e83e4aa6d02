"""The table, the words and the page, from rows whose numbers are known."""

import json
import re
from pathlib import Path

import pytest

from azeotrope.report.headlines import headline
from azeotrope.report.intervals import wilson
from azeotrope.report.page import word_changes, write_report
from azeotrope.report.paired import PairedTest
from azeotrope.report.rows import ResultRow, results_document
from azeotrope.report.summary import plain_words
from azeotrope.report.tables import best_table, percent, result_table, times


def accuracy(role: str, correct: int, n: int = 400, **fields: object) -> ResultRow:
    named = {"role": role, "model": "teacher" if role == "teacher" else "small", "task": "pocket"}
    measured = {"metric": "accuracy", "value": correct / n, "n": n, "ci95": wilson(correct, n)}
    return ResultRow.model_validate(named | measured | fields)


def study(
    doge: int, *, budgets: tuple[int, ...] = (512,), doge_teacher: int = 360
) -> list[ResultRow]:
    """Base 40, clean 240 and answers_only 140 of 400; each with two seeds."""
    rows = [
        accuracy("teacher", 360),
        accuracy("teacher", 320, decoding="sampled@1"),
        accuracy("teacher", doge_teacher, defense="doge"),
    ]
    for seed in (0, 1):
        rows.append(accuracy("student", 40, seed=seed))
        rows.append(accuracy("student", 100, attack="sft_only", traces=512, seed=seed))
        for step, traces in enumerate(reversed(budgets)):
            for defense, correct in (("none", 240), ("answers_only", 140), ("doge", doge)):
                rows.append(
                    accuracy(
                        "student",
                        max(correct - 60 * step, 4),
                        defense=defense,
                        attack="text_sft",
                        traces=traces,
                        seed=seed,
                    )
                )
    return rows


def words_on(rows: list[ResultRow], defense: str) -> str:
    return next(words for words in plain_words(rows) if f", {defense}," in words)


def page_of(folder: Path, rows: list[ResultRow], **run: object) -> str:
    document = results_document({"name": "demo"} | run, rows)
    (folder / "results.json").write_text(json.dumps(document))
    return write_report(folder).read_text()


def test_headline_numbers_of_a_known_study() -> None:
    by_defense = {item.line.defense: item for item in headline(study(140, doge_teacher=270))}
    assert set(by_defense) == {"answers_only", "doge"}
    doge = by_defense["doge"]
    assert doge.gain_removed.value == pytest.approx((240 - 140) / (240 - 40))
    assert doge.utility_kept.value == pytest.approx(0.75)
    assert doge.student.value == pytest.approx(0.35)
    assert doge.seeds == 2
    # Hiding the reasoning leaves the answers as they are.
    assert by_defense["answers_only"].utility_kept.value == 1.0


def test_the_main_budget_can_be_chosen() -> None:
    rows = study(140, budgets=(256, 512))
    assert {item.traces for item in headline(rows)} == {512}
    chosen = {item.line.defense: item for item in headline(rows, traces=256)}
    assert chosen["doge"].traces == 256
    assert chosen["doge"].gain_removed.value == pytest.approx((180 - 80) / (180 - 40))


def test_price_of_traces_worth_half_as_much() -> None:
    # Each doubling is worth 60 right answers, and the defense takes 60 everywhere.
    rows = study(180, budgets=(128, 256, 512, 1024))
    price = {item.line.defense: item.price_multiplier for item in headline(rows)}
    assert price["doge"].value == pytest.approx(2.0)


def test_table_has_one_line_a_student_in_a_fixed_order() -> None:
    header, *lines = result_table(study(140, doge_teacher=270))
    column = {name: place for place, name in enumerate(header)}
    assert [(line[column["defense"]], line[column["attack"]]) for line in lines] == [
        ("none", "none"),
        ("none", "sft_only"),
        ("none", "text_sft"),
        ("answers_only", "text_sft"),
        ("doge", "text_sft"),
    ]
    doge, clean = lines[-1], lines[2]
    assert doge[column["teacher greedy"]] == "67.5 %"
    assert doge[column["teacher sampled"]] == "-"
    assert clean[column["teacher sampled"]] == "80.0 %"
    assert doge[column["student accuracy"]].startswith("35.0 % [")
    assert doge[column["gain removed"]].startswith("50.0 % [")
    assert clean[column["gain removed"]] == "-"


def test_words_for_no_effect() -> None:
    words = words_on(study(236), "doge")
    assert "no effect" in words
    assert "less than answers_only" in words
    assert "The teacher kept 100.0 %" in words


def test_words_for_a_defense_that_helps_the_attacker() -> None:
    words = words_on(study(320), "doge")
    assert "it helped the attacker" in words
    assert "no effect" not in words


def test_words_for_a_defense_that_works_and_costs() -> None:
    words = words_on(study(60, doge_teacher=200), "doge")
    assert "the defense removed 90.0 %" in words
    assert "more than answers_only" in words
    assert "which is less than all of it" in words


def test_words_for_a_tie_with_hiding_the_reasoning() -> None:
    words = words_on(study(142), "doge")
    assert "no clear difference from answers_only" in words


def test_words_for_what_a_clean_up_recovers() -> None:
    cleaned = accuracy(
        "student", 238, defense="doge", attack="text_sft", cleanup="correct_only", traces=512
    )
    words = words_on([*study(60), cleaned], "doge")
    assert "After the clean-up correct_only: no effect" in words


def adaptive_study() -> list[ResultRow]:
    """A defense that a clean-up undoes: 60 of 400 right without it, 238 with it."""
    cleaned = [
        accuracy(
            "student",
            238,
            defense="doge",
            attack="text_sft",
            cleanup="correct_only",
            traces=512,
            seed=seed,
        )
        for seed in (0, 1)
    ]
    return [*study(60), *cleaned]


def test_the_best_attack_is_named_first_beside_the_naive_one(tmp_path: Path) -> None:
    first, *details = plain_words(adaptive_study())
    assert first.startswith(
        "Best attack on doge, student small: text_sft, after correct_only, accuracy 59.5 % ["
    )
    assert "the naive attack text_sft reaches 15.0 % [" in first
    assert not any(words.startswith("Best attack") for words in details)
    header, baseline, doge = best_table(headline(adaptive_study()))
    column = {name: position for position, name in enumerate(header)}
    assert baseline[column["naive attack"]] == "the same"
    assert doge[column["best attack"]] == "text_sft, after correct_only"
    assert doge[column["naive attack"]] == "text_sft"
    page = page_of(tmp_path, adaptive_study())
    assert page.index("The attacker's best result") < page.index("In plain words")


def test_variants_have_a_column_only_where_there_are_some() -> None:
    rows = adaptive_study()
    assert "variant" not in result_table(rows)[0]
    varied = accuracy("student", 90, defense="doge", attack="text_sft", variant="a=1", traces=512)
    header, *lines = result_table([*rows, varied])
    column = {name: position for position, name in enumerate(header)}
    found = [(line[column["variant"]], line[column["clean-up"]]) for line in lines[-3:]]
    assert found == [("none", "none"), ("none", "correct_only"), ("a=1", "none")]
    words = words_on([*rows, varied], "doge")
    assert "After the clean-up correct_only: no effect" in words
    assert "With a=1: the defense removed" in words


def test_the_paired_test_is_told_beside_utility_kept() -> None:
    test = PairedTest(defense="doge", decoding="greedy", n=400, p=0.0012)
    words = plain_words(study(140, doge_teacher=270), paired=[test])
    (doge,) = [sentence for sentence in words if ", doge," in sentence]
    assert "which is less than all of it (McNemar test on 400 problems: p = 0.0012)." in doge


def test_words_when_there_was_nothing_to_steal() -> None:
    rows = [row for row in study(40) if row.attack != "text_sft" or row.defense != "none"]
    for seed in (0, 1):
        rows.append(accuracy("student", 40, attack="text_sft", traces=512, seed=seed))
    assert "there was no gain to remove" in words_on(rows, "doge")


def test_bounds_and_gaps_are_written_out() -> None:
    by_defense = {item.line.defense: item for item in headline(study(140))}
    assert times(by_defense["doge"].price_multiplier) == "-"
    low = study(8, budgets=(256, 512))
    price = {item.line.defense: item.price_multiplier for item in headline(low)}["doge"]
    assert times(price).startswith("at least 2 times [")
    assert times(price).endswith("no limit]")
    assert re.fullmatch(r"50\.0 % \[\d+\.\d, \d+\.\d\]", percent(by_defense["doge"].gain_removed))


def test_word_changes_mark_what_differs_and_lose_nothing() -> None:
    clean, defended = "3 + 4 = 7.\nThe answer is 7", "3 + 4 makes 7.\nThe answer is 7 ok"
    before, after = word_changes(clean, defended)
    assert "".join(piece.text for piece in before) == clean
    assert "".join(piece.text for piece in after) == defended
    assert [piece.text.strip() for piece in before if piece.changed] == ["="]
    assert [piece.text.strip() for piece in after if piece.changed] == ["makes", "ok"]


def test_page_escapes_what_models_write(tmp_path: Path) -> None:
    attack = "<script>alert(1)</script>"
    example = dict.fromkeys(("question", "answer", "clean", "defense"), attack)
    example["defended"] = f"{attack} more"
    (tmp_path / "examples.json").write_text(json.dumps([example]))
    page = page_of(tmp_path, study(140), note=attack)
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<ins>more</ins>" in page


def test_page_needs_nothing_from_outside(tmp_path: Path) -> None:
    (tmp_path / "curves.json").write_text(
        json.dumps([{"label": "clean", "kind": "student", "x": [0, 1], "y": [2.0, 1.5], "seed": 0}])
    )
    page = page_of(tmp_path, study(140, budgets=(256, 512)))
    sources = re.findall(r'(?:src|href)="([^"]{0,20})', page)
    assert len(sources) == 4
    assert all(source.startswith("data:image/svg+xml") for source in sources)
    assert page.count('alt="') == 4
    names = {path.stem for path in (tmp_path / "figures").glob("*.png")}
    assert names == {"utility_vs_gain", "budget_curve", "students", "loss_curves"}


def test_page_leaves_out_what_was_not_measured(tmp_path: Path) -> None:
    page = page_of(tmp_path, [accuracy("student", 40), accuracy("teacher", 360)])
    assert "All students" in page
    assert "10.0 % [" in page
    for missing in ("In plain words", "Headline numbers", "budget_curve", "side by side"):
        assert missing not in page
    assert "Figures" not in page_of(tmp_path, [])


def test_broken_companions_are_named(tmp_path: Path) -> None:
    (tmp_path / "curves.json").write_text('[{"label": "clean"}]')
    with pytest.raises(ValueError, match=r"curves\.json cannot be used: entry 0: kind"):
        page_of(tmp_path, study(140))
