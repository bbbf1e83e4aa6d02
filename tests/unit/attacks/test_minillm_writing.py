"""MiniLLM: students write texts that are drawn from the mixture of student and teacher."""

from collections import Counter

import pytest
import torch

# The gradient
from tiny_models import EOS, VOCAB, every_text, example, log_softmax, minillm, small, teacher_head
from torch import Tensor

from azeotrope.generation import Sampling, generate
from azeotrope.heads.features import blocks_of
from azeotrope.mixture import Mixture


@pytest.mark.parametrize(("share", "temperature"), [(0.0, 1.0), (0.3, 1.0), (0.8, 1.7)])
def test_the_next_token_is_the_mixtures_when_other_rows_have_finished(
    share: float, temperature: float
) -> None:
    """Rows of other lengths end at other steps; the teacher's cache keeps up with all of them."""
    teacher, student = small(0), small(1)
    prompts = [(3, 4), (1,), (4, 4, 4, 1), (3, 1, 0), (1, 1)]
    seen: list[tuple[Tensor, list[list[int]]]] = []

    class Watched(Mixture):
        def adjust_rows(self, logits, rows):
            mixed = super().adjust_rows(logits, rows)
            seen.append((mixed.clone(), [list(row.written) for row in rows]))
            return mixed

    mixture = Watched(
        teacher.model, teacher_head(teacher).logits, share=share, temperature=temperature
    )

    sampling = Sampling(temperature=1.0, max_new_tokens=11)
    found = generate(
        student.model, prompts, sampling,
        end_ids=(EOS,), pad_id=0, seeds=list(range(45, 50)), hooks=[mixture],
    )  # fmt: skip
    ends = {len(item.ids) for item in found}
    assert len(ends) >= 3, "rows leave at different steps"
    for step, (log_m, prefixes) in enumerate(seen):
        alive = [row for row, item in enumerate(found) if len(item.ids) > step]
        assert prefixes == [list(found[row].ids[:step]) for row in alive]
        for row, mixed in zip(alive, log_m, strict=True):
            item = example(prompts[row], (*found[row].ids[:step], 0))
            p, q = (
                log_softmax(loaded, item, VOCAB, temperature)[-1].detach().exp()
                for loaded in (teacher, student)
            )
            torch.testing.assert_close(
                mixed[:VOCAB].exp(), share * p + (1 - share) * q, rtol=1e-4, atol=1e-6
            )
            assert (mixed[VOCAB:] == -torch.inf).all(), "rows that pad a head are never written"


def test_texts_are_drawn_from_the_mixture() -> None:
    teacher, student = small(0), small(1)
    attack = minillm(teacher, student, mix=0.4, max_new_tokens=2)
    count = 4000
    items = [example((3, 4), (EOS,), str(number)) for number in range(count)]
    found = Counter(item.completion for item in attack.write(student, items))
    expected = {}
    for text in every_text(2):
        item = example((3, 4), text)
        p, q = (log_softmax(x, item, VOCAB).detach().exp() for x in (teacher, student))
        mixed = 0.4 * p + 0.6 * q
        expected[text] = mixed.gather(-1, torch.tensor(text)[:, None]).prod().item()
    assert set(found) <= set(expected)
    for text, share in expected.items():
        spread = (share * (1 - share) / count) ** 0.5
        assert abs(found[text] / count - share) < 5 * spread + 1e-3, text


def test_the_weights_correct_for_the_mixture() -> None:
    """At the first token, whose context is given, the weighted mean is the student's own."""
    teacher, student = small(0), small(1)
    item = example((3, 4), (0,))
    p, q = (log_softmax(x, item, VOCAB)[0].detach().exp() for x in (teacher, student))
    for mix in (0.2, 0.7):
        attack = minillm(teacher, student, mix=mix)
        mixed = mix * p + (1 - mix) * q
        found = sum(
            mixed[token] * attack.distance(student, [example((3, 4), (token,))], [1])
            for token in range(VOCAB)
        )
        assert found.item() == pytest.approx((q * (q / p).log()).sum().item(), rel=1e-5)


def test_a_students_dropout_is_off_while_it_writes_and_on_again() -> None:
    teacher, student = small(0), small(1)
    for layer in blocks_of(student.model):
        layer.self_attn.attention_dropout = 0.9  # type: ignore[union-attr, assignment]
    attack = minillm(teacher, student, max_new_tokens=8)
    items = [example((3, 4), (EOS,), str(number)) for number in range(20)]
    calm = attack.write(student, items)
    student.model.train()
    assert attack.write(student, items) == calm
    assert student.model.training
