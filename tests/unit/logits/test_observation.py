"""What an attacker sees: each event has the teacher's probability, and no mass is invented."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from azeotrope.config import ConfigError, build
from azeotrope.logits import divergences
from azeotrope.logits.observation import Events, View, as_events, merged, observe, temper

VOCAB = 7


def drawn(rows: int = 3, vocab: int = VOCAB, seed: int = 0, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(rows, vocab, generator=generator, dtype=torch.float64)


def is_normalised(log_p: Tensor) -> None:
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(len(log_p), dtype=log_p.dtype))


def test_the_full_view_is_the_softmax() -> None:
    logits = drawn()
    events = observe(logits, View())
    assert events.tokens is None
    assert not events.has_tail
    torch.testing.assert_close(events.log_p, logits.log_softmax(-1))
    torch.testing.assert_close(as_events(logits, events), logits.log_softmax(-1))


@pytest.mark.parametrize("view", [View(top_k=VOCAB), View(top_k=VOCAB, decimals=3)])
def test_the_top_of_everything_is_everything(view: View) -> None:
    logits = drawn()
    whole = View(decimals=view.decimals)
    torch.testing.assert_close(observe(logits, view).log_p, observe(logits, whole).log_p)
    assert observe(logits, view).tokens is None


@pytest.mark.parametrize("top_k", [1, 2, VOCAB - 1])
def test_the_tail_is_one_event_with_all_the_rest(top_k: int) -> None:
    logits, other = drawn(), drawn(seed=1)
    events = observe(logits, View(top_k=top_k))
    assert events.has_tail
    assert events.log_p.shape == (3, top_k + 1)
    p, q = logits.softmax(-1), other.softmax(-1)
    for row in range(3):
        order = p[row].argsort(descending=True)
        assert events.tokens is not None
        assert events.tokens[row].tolist() == order[:top_k].tolist()
        for dense, found in ((p, events.log_p), (q, as_events(other, events))):
            expected = [*dense[row, order[:top_k]].tolist(), dense[row, order[top_k:]].sum().item()]
            assert found[row].exp().tolist() == pytest.approx(expected, rel=1e-9)


@given(seed=st.integers(0, 10_000), top_k=st.integers(1, VOCAB))
def test_seeing_less_never_shows_more_difference(seed: int, top_k: int) -> None:
    logits, other = drawn(seed=seed), drawn(seed=seed + 1)
    for name in ("forward_kl", "reverse_kl", "jensen_shannon"):
        distance = divergences.by_name(name)
        events = observe(logits, View(top_k=top_k))
        seen = distance(events.log_p, as_events(other, events))
        dense = distance(logits.log_softmax(-1), other.log_softmax(-1))
        assert (seen <= dense + 1e-9).all()
        if top_k == VOCAB:
            torch.testing.assert_close(seen, dense)


def test_a_student_that_equals_the_teacher_has_nothing_to_learn() -> None:
    logits = drawn()
    for view in (View(), View(top_k=1), View(top_k=3)):
        events = observe(logits, view)
        found = divergences.forward_kl(events.log_p, as_events(logits, events))
        torch.testing.assert_close(found, torch.zeros(3, dtype=torch.float64), atol=1e-9, rtol=0)


def test_a_students_tail_keeps_its_digits() -> None:
    # 1 - sum q would be 0 in float32.
    student = torch.tensor([[30.0, 0.0, 1.0, 2.0]])
    events = observe(torch.tensor([[5.0, 0.0, 1.0, 2.0]]), View(top_k=1))
    expected = math.log(1 + math.e + math.e**2) - 30
    assert as_events(student, events)[0, 1].item() == pytest.approx(expected, rel=1e-6)


def test_a_certain_teacher_leaves_a_tail_that_is_not_nothing() -> None:
    events = observe(torch.tensor([[100.0, 0.0, 0.0, 0.0]]), View(top_k=2))
    assert events.log_p.isfinite().all()
    assert events.log_p[0, -1].exp().item() == pytest.approx(torch.finfo().eps, rel=1e-3)


@pytest.mark.parametrize("decimals", [0, 1, 4])
def test_rounded_logprobs_are_those_that_are_shown(decimals: int) -> None:
    logits = drawn()
    true = logits.log_softmax(-1)
    rounded = torch.round(true * 10**decimals) / 10**decimals
    full = observe(logits, View(decimals=decimals)).log_p
    is_normalised(full)
    # Rounded probabilities do not sum to 1; their ratios are what was shown.
    torch.testing.assert_close(full - full[:, :1], rounded - rounded[:, :1])
    top = observe(logits, View(decimals=decimals, top_k=3))
    is_normalised(top.log_p)
    assert top.tokens is not None
    shown = rounded.gather(-1, top.tokens)
    found = top.log_p[:, :3]
    torch.testing.assert_close(found - found[:, :1], shown - shown[:, :1])


def test_rounding_that_leaves_no_room_leaves_a_small_tail() -> None:
    # 0.97 and 0.02 are shown as 0 and -3.9: 1 and 0.0202, and nothing is left for the third.
    logits = torch.tensor([[0.97, 0.02, 0.006, 0.004]]).log()
    events = observe(logits, View(decimals=1, top_k=2))
    tail = events.log_p[0, -1].exp().item()
    last = math.exp(-3.9)
    assert tail == pytest.approx(last / (1 + 2 * last), rel=1e-4)
    # No more than what half a unit of the last digit hides, however likely the last token is.
    logits = torch.tensor([[0.508, 0.49, 0.002]]).log()
    tail = observe(logits, View(decimals=1, top_k=2)).log_p[0, -1].exp().item()
    assert tail == pytest.approx(0.05 / (0.05 + 2 * math.exp(-0.7)), rel=1e-4)


def test_enough_digits_change_nothing() -> None:
    logits = drawn()
    torch.testing.assert_close(
        observe(logits, View(decimals=7)).log_p, logits.log_softmax(-1), atol=1e-6, rtol=0
    )


def test_more_tokens_than_there_are_cannot_be_shown() -> None:
    message = "top_k 8 is larger than the vocabulary of 7 tokens; lower it, or leave it out"
    with pytest.raises(ValueError, match=message):
        observe(drawn(), View(top_k=8))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"top_k": 0}, "top_k: Input should be greater than or equal to 1, got 0"),
        ({"decimals": -1}, "decimals: Input should be greater than or equal to 0, got -1"),
        ({"decimals": 8}, "decimals: Input should be less than or equal to 7, got 8"),
        ({"topk": 1}, "unknown key 'topk'; allowed: decimals, top_k"),
    ],
)
def test_a_view_that_makes_no_sense_is_refused(wrong: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(View, wrong)


def test_a_view_says_what_is_missing() -> None:
    labels = [View(), View(top_k=5), View(decimals=2), View(top_k=5, decimals=1)]
    assert [view.label for view in labels] == [
        "full",
        "top_k=5",
        "decimals=2",
        "top_k=5,decimals=1",
    ]


@pytest.mark.parametrize("temperature", [0.5, 2.0, 4.0])
def test_temperature_is_the_softmaxs_own(temperature: float) -> None:
    logits = drawn()
    found = temper(logits.log_softmax(-1), temperature)
    torch.testing.assert_close(found, (logits / temperature).log_softmax(-1))
    assert temper(found, 1.0) is found


def test_a_tail_is_tempered_as_one_event() -> None:
    logits = drawn()
    events = observe(logits, View(top_k=2))
    expected = events.log_p.exp() ** 0.5
    expected = expected / expected.sum(-1, keepdim=True)
    torch.testing.assert_close(temper(events.log_p, 2.0).exp(), expected)


# Another vocabulary: tokens 0 and 3 are written with piece 5, 1 with 2, 4 and 6 with 0; the
# student cannot write 2 and 5.
TO_STUDENT = torch.tensor([5, 2, -1, 5, 0, -1, 0])
PIECES = 9


def test_tokens_with_one_piece_are_one_event() -> None:
    logits, student = drawn(), drawn(vocab=PIECES, seed=2)
    p, q = logits.softmax(-1), student.softmax(-1)
    events = merged(observe(logits, View()), TO_STUDENT)
    assert events.tokens is not None
    assert events.tokens[0].tolist() == [0, 2, 5]
    assert events.has_tail
    known = p[:, [4, 6]].sum(-1), p[:, 1], p[:, [0, 3]].sum(-1)
    expected = torch.stack(known, -1) / torch.stack(known).sum(0)[:, None]
    torch.testing.assert_close(events.log_p[:, :3].exp(), expected, rtol=1e-9, atol=1e-9)
    # Nothing else can come next, so that the student must not say it.
    assert events.log_p[:, 3].exp().max() < 1e-12
    seen = as_events(student, events).exp()
    torch.testing.assert_close(seen[:, :3], q[:, [0, 2, 5]])
    torch.testing.assert_close(seen[:, 3], q[:, [1, 3, 4, 6, 7, 8]].sum(-1))


def test_tokens_that_are_complete_count_for_the_tail() -> None:
    logits = drawn()
    p = logits.softmax(-1)
    complete = torch.arange(VOCAB) == 2
    events = merged(observe(logits, View()), TO_STUDENT, complete)
    known = p[:, [4, 6]].sum(-1), p[:, 1], p[:, [0, 3]].sum(-1), p[:, 2]
    expected = torch.stack(known, -1) / torch.stack(known).sum(0)[:, None]
    torch.testing.assert_close(events.log_p.exp(), expected)


@pytest.mark.parametrize("top_k", [1, 3, VOCAB - 1])
def test_merging_what_was_shown_adds_it_up(top_k: int) -> None:
    logits, student = drawn(rows=20), drawn(rows=20, vocab=PIECES, seed=2)
    p, q = logits.softmax(-1), student.softmax(-1)
    seen = observe(logits, View(top_k=top_k))
    events = merged(seen, TO_STUDENT)
    theirs = as_events(student, events)
    assert seen.tokens is not None
    assert events.tokens is not None
    is_normalised(events.log_p)
    is_normalised(theirs)
    for row in range(20):
        mass: dict[int, float] = {}
        for token in seen.tokens[row].tolist():
            piece = int(TO_STUDENT[token])
            if piece >= 0:
                mass[piece] = mass.get(piece, 0) + p[row, token].item()
        tail = 1 - p[row, seen.tokens[row]].sum().item()
        total = sum(mass.values()) + tail
        found = {
            piece: events.log_p[row, index].exp().item()
            for index, piece in enumerate(events.tokens[row].tolist())
            if piece >= 0
        }
        assert found == pytest.approx({piece: m / total for piece, m in mass.items()}, rel=1e-9)
        assert events.log_p[row, -1].exp().item() == pytest.approx(tail / total, rel=1e-9)
        rest = 1 - sum(q[row, piece].item() for piece in mass)
        assert theirs[row, -1].exp().item() == pytest.approx(rest, rel=1e-9)
        named = [index for index, piece in enumerate(events.tokens[row].tolist()) if piece < 0]
        assert theirs[row, named].exp().sum() == 0


def test_one_to_one_merging_only_renames() -> None:
    logits = drawn()
    order = torch.tensor([3, 1, 6, 0, 5, 2, 4])
    student = torch.zeros_like(logits)
    student[:, order] = logits
    for view in (View(), View(top_k=3)):
        events = merged(observe(logits, view), order)
        value = divergences.forward_kl(events.log_p, as_events(student, events))
        torch.testing.assert_close(value, torch.zeros(3, dtype=torch.float64), atol=1e-9, rtol=0)


def test_small_probabilities_survive_merging() -> None:
    logits = torch.tensor([[200.0, 0.0, 0.0, 0.0, 1.0, 0.0, 2.0]])
    events = merged(observe(logits, View()), TO_STUDENT)
    expected = [math.log(math.e + math.e**2) - 200, -200.0, 0.0]
    assert events.log_p[0, :3].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("view", [View(), View(top_k=2), View(top_k=VOCAB - 1)])
@pytest.mark.parametrize("name", divergences.BY_NAME)
def test_gradients_through_events_are_finite(view: View, name: str) -> None:
    needed = {"alpha": {"a": 0.5}, "alpha_beta": {"a": 0.2, "b": 0.7}}
    distance = divergences.by_name(name, **needed.get(name, {}))
    for scale in (1.0, 30.0, 300.0):
        logits = drawn(scale=scale).float()
        for events in (observe(logits, view), merged(observe(logits, view), TO_STUDENT)):
            student = drawn(vocab=PIECES, seed=3, scale=scale).float().requires_grad_()
            shown = student[:, :VOCAB] if events.tokens is None else student
            value = distance(events.log_p, as_events(shown, events)).sum()
            assert value.isfinite()
            (gradient,) = torch.autograd.grad(value, student)
            assert gradient.isfinite().all()


def test_a_student_whose_every_token_is_shown_has_next_to_no_tail() -> None:
    events = Events(torch.tensor([[0.6, 0.3, 0.1]]).log(), torch.tensor([[1, 0]]))
    student = torch.tensor([[0.0, 1.0]], requires_grad=True)
    value = divergences.jensen_shannon(events.log_p, as_events(student, events))
    least = as_events(student, events)[0, 2].exp().item()
    assert least == pytest.approx(torch.finfo().eps, rel=1e-4)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0
