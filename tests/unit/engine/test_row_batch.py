"""The row batch: the reference path's tokens, whichever rows join or leave beside a row."""

from itertools import pairwise

import torch
from engine_answers import reference_answers, watched

from azeotrope.defenses import base
from azeotrope.engine.row_batch import BatchRow, RowBatch
from azeotrope.generation import Sampling, choose, uniforms


def test_rows_that_join_at_any_time_write_the_reference_tokens(teacher, prompts) -> None:
    """Joins, leaves and growing columns: three rows more after every fourth step."""
    kinds = [
        Sampling(temperature=0.0, max_new_tokens=96),
        Sampling(temperature=1.1, top_p=0.9, max_new_tokens=96),
        Sampling(temperature=1.5, max_new_tokens=3),
    ]
    expected, rows = {}, []
    for number, how in enumerate(kinds):
        mine = list(range(number, len(prompts), len(kinds)))
        texts = reference_answers(teacher, [prompts[i] for i in mine], how, seeds=mine)
        expected.update(zip(mine, texts, strict=True))
    for index, prompt in enumerate(prompts):
        how = kinds[index % len(kinds)]
        draws = uniforms(index, how.max_new_tokens).tolist()
        rows.append(
            BatchRow(
                prompt,
                limit=how.max_new_tokens,
                temperature=how.temperature,
                top_p=how.top_p,
                draws=draws,
            )
        )
    batch = RowBatch(teacher.model, end_ids=(teacher.tokenizer.eos_token_id,), pad_id=0)
    late, step, widths = list(rows), 0, []
    with watched(teacher, lambda kwargs: widths.append(kwargs["attention_mask"].shape[1])):
        while late or batch.rows:
            joining, late = (late[:3], late[3:]) if step % 4 == 0 else ([], late)
            batch.step(joining)
            step += 1
    answers = {index: (tuple(row.written), row.finish) for index, row in enumerate(rows)}
    assert answers == expected
    assert {row.finish for row in rows} == {"stop", "length"}
    # Columns of long rows that left are trimmed.
    assert max(widths) <= max(len(row.prompt) + len(row.written) for row in rows)
    assert any(after < before - 1 for before, after in pairwise(widths))


def test_a_defense_sees_all_of_its_rows_in_every_step(teacher, prompts, monkeypatch) -> None:
    seen: list[list[list[int]]] = []

    class Watch(base.Defense):
        stage = "decoding"

        def adjust_logits(self, logits, prefixes):
            seen.append(prefixes)
            return logits

    monkeypatch.setattr(base, "resolve", lambda data: Watch(base.DefenseConfig(**data)))
    defenses = (base.resolve({"name": "watch"}),)
    batch = RowBatch(teacher.model, end_ids=(), pad_id=0)
    first, second = (BatchRow(prompt, defenses, limit=3) for prompt in prompts[:2])
    batch.step([first])
    batch.step([second])
    batch.step()
    batch.step()
    assert [len(prefixes) for prefixes in seen] == [1, 2, 2, 1]
    # The same list from the first step to the last.
    assert all(prefixes[0] is first.written for prefixes in seen[:3])
    assert seen[3][0] is second.written
    assert batch.rows == []


def test_rows_with_different_rules_are_chosen_as_if_alone() -> None:
    torch.manual_seed(0)
    logits, draws = torch.randn(6, 11) * 3, torch.rand(6, dtype=torch.float64)
    temperatures = torch.tensor([0.0, 1.0, 0.5, 2.0, 1.0, 0.0], dtype=torch.float64)
    top_p = torch.tensor([0.3, 1.0, 0.6, 0.9, 0.1, 1.0], dtype=torch.float64)
    together = choose(logits, temperatures, top_p, draws)
    alone = [
        choose(logits[i : i + 1], temperatures[i : i + 1], top_p[i : i + 1], draws[i : i + 1])
        for i in range(6)
    ]
    assert together.tolist() == torch.cat(alone).tolist()
    likeliest = logits.argmax(-1)
    # Temperature 0, and a nucleus of one token.
    assert together[[0, 4, 5]].tolist() == likeliest[[0, 4, 5]].tolist()
    # By hand: half of the mass lies before the second token.
    quarter = torch.tensor([[0.5, 0.25, 0.25]]).log()
    for draw, token in ((0.49, 0), (0.51, 1), (0.76, 2)):
        one = torch.ones(1, dtype=torch.float64)
        assert choose(quarter, one, one, one * draw).tolist() == [token]
