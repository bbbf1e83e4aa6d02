"""The mark is detected with its key and with no other, and rarely in unmarked text."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, binomtest

from azeotrope import models, tasks
from azeotrope.collect import collect
from azeotrope.config import ConfigError
from azeotrope.decoding import DecodingHooks
from azeotrope.defenses import base
from azeotrope.defenses.watermark import (
    PUBLIC_KEY,
    Config,
    GreenCount,
    Watermark,
    build,
    detect,
    green_list,
)
from azeotrope.generation import Sampling
from azeotrope.tokens import encode_prompt

VOCAB = 50
TASK = tasks.build(tasks.PocketConfig())


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def teacher() -> models.Loaded:
    return models.load("pocket/teacher", device="cpu")


def written(
    teacher: models.Loaded, defense: Watermark, problems: int = 40, temperature: float = 1.0
) -> list[tuple[int, ...]]:
    sampling = Sampling(temperature=temperature)
    traces = collect(teacher, TASK, TASK.problems("test", problems), sampling, hooks=[defense])
    return [trace.completion_ids for trace in traces]


@pytest.fixture(scope="module")
def unmarked(teacher: models.Loaded) -> list[tuple[int, ...]]:
    return written(teacher, build(Config(strength=0)))


# The list


def test_the_green_list_of_a_key_and_a_context_is_always_this_one() -> None:
    # If these numbers change, texts that were marked before can no longer be detected.
    first = green_list([5], 24, key="a key", share=0.25)
    assert np.flatnonzero(first).tolist() == [7, 11, 17, 21]
    second = green_list([5, 7], 24, key="a key", share=0.5)
    assert np.flatnonzero(second).tolist() == [0, 2, 4, 5, 6, 8, 9, 10, 11, 15, 17, 21, 23]


def test_a_longer_vocabulary_continues_the_list() -> None:
    whole = green_list([3, 4], 1000, key="k")
    for vocab in (1, 7, 8, 9, 999):
        assert np.array_equal(green_list([3, 4], vocab, key="k"), whole[:vocab])


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.9])
def test_the_share_of_green_tokens_is_gamma(share: float) -> None:
    vocab, contexts = 20_000, 10
    lists = [green_list([token], vocab, key="k", share=share) for token in range(contexts)]
    exact = round(share * 256) / 256
    count, draws = int(np.sum(lists)), vocab * contexts
    assert binomtest(count, draws, exact).pvalue > 1e-4
    # Lists of different contexts have as much in common as chance gives them.
    common = int(np.sum(lists[0] & lists[1]))
    assert binomtest(common, vocab, exact**2).pvalue > 1e-4


def test_key_and_every_token_of_the_context_matter() -> None:
    usual = green_list([1, 2, 3], 4000, key="k", share=0.5)
    changed = [
        green_list([1, 2, 3], 4000, key="K", share=0.5),
        green_list([1, 2, 4], 4000, key="k", share=0.5),
        green_list([0, 2, 3], 4000, key="k", share=0.5),
        green_list([2, 1, 3], 4000, key="k", share=0.5),
        green_list([2, 3], 4000, key="k", share=0.5),
        green_list([1, 2, 3], 4000, key="k" * 200, share=0.5),
    ]
    for variant in changed:
        assert binomtest(int(np.sum(usual == variant)), 4000, 0.5).pvalue > 1e-4


# Adjusting logits


def test_green_tokens_are_raised_by_the_strength_and_red_ones_stay() -> None:
    logits = drawn(4, VOCAB)
    logits[0, :10] = -torch.inf
    before = logits.clone()
    defense = build(Config(strength=1.5, context=2, key="k"))
    adjusted = defense.adjust_logits(logits, [[1, 2], [9, 1, 2], [7], []])
    green = torch.from_numpy(green_list([1, 2], VOCAB, key="k"))
    assert torch.equal(adjusted[:2], torch.where(green, before[:2] + 1.5, before[:2]))
    # Too few tokens: no list.
    assert torch.equal(adjusted[2:], before[2:])
    assert torch.equal(logits, before), "the input is not changed"
    # A token that is forbidden stays so.
    assert (adjusted[0, :10] == -torch.inf).all()


def test_strength_zero_is_the_identity(teacher: models.Loaded) -> None:
    logits = drawn(2, VOCAB)
    defense = build(Config(strength=0))
    assert defense.is_identity
    assert defense.adjust_logits(logits, [[1, 2, 3, 4], [5, 6, 7, 8]]) is logits
    problems = TASK.problems("test", 5)
    plain = collect(teacher, TASK, problems, Sampling())
    marked = collect(teacher, TASK, problems, Sampling(), hooks=[defense])
    assert marked == plain


@given(
    prefixes=st.lists(st.lists(st.integers(0, 3), max_size=4), min_size=1, max_size=6),
    context=st.integers(1, 3),
)
def test_a_row_does_not_depend_on_the_rows_beside_it(
    prefixes: list[list[int]], context: int
) -> None:
    logits = drawn(len(prefixes), VOCAB)
    config = Config(context=context, key="k")
    together = build(config).adjust_logits(logits, prefixes)
    for row, prefix in enumerate(prefixes):
        alone = build(config).adjust_logits(logits[row : row + 1], [prefix])
        assert torch.equal(alone[0], together[row])


def test_the_precision_of_the_logits_is_kept_and_gradients_pass() -> None:
    defense = build(Config())
    context = [[1, 2, 3, 4]]
    with torch.inference_mode():
        half = defense.adjust_logits(drawn(1, VOCAB).bfloat16(), context)
    assert half.dtype == torch.bfloat16
    logits = drawn(1, VOCAB).requires_grad_()
    # The list that was cached in inference mode can be used outside it too.
    defense.adjust_logits(logits, context).sum().backward()
    assert torch.equal(logits.grad, torch.ones(1, VOCAB))


# Detecting


def test_each_pair_counts_once_and_the_tail_is_that_of_the_binomial() -> None:
    # Six draws of one half: P(at least 5 green) = (6 + 1) / 64.
    green = green_list([9], VOCAB, key="k", share=0.5)
    yes, no = np.flatnonzero(green)[:5].tolist(), np.flatnonzero(~green)[:1].tolist()
    texts = [[9, token] for token in (*yes, *no)]
    count = detect(texts, key="k", share=0.5, context=1)
    assert (count.green, count.scored) == (5, 6)
    assert count.p_value == pytest.approx(7 / 64)
    assert detect(texts * 10, key="k", share=0.5, context=1) == count
    # Four draws of a quarter: P(at least 3) = 4 (1/4)^3 3/4 + (1/4)^4 = 13/256.
    quarter = green_list([9], VOCAB, key="k")
    three = [*np.flatnonzero(quarter)[:3].tolist(), int(np.flatnonzero(~quarter)[0])]
    count = detect([[9, token] for token in three], key="k", context=1)
    assert count.p_value == pytest.approx(13 / 256)


def test_pairs_do_not_cross_texts_and_a_piece_of_a_text_can_be_judged() -> None:
    assert detect([[1, 2, 3], [4, 5, 6]], key="k", context=1).scored == 4
    assert detect([[1, 2, 3], [4, 5, 6]], key="k", context=2).scored == 2
    text = list(range(30))
    whole, first, second = (detect([part], key="k") for part in (text, text[:14], text[10:]))
    # Each half has its own four tokens of context, so nothing is counted twice or lost.
    assert whole.green == first.green + second.green
    assert whole.scored == first.scored + second.scored == 26


def test_nothing_to_count_proves_nothing() -> None:
    for texts in ([], [[]], [[1, 2, 3, 4]]):
        assert detect(texts, key="k") == GreenCount(green=0, scored=0, p_value=1.0)


def test_arrays_and_tensors_are_counted_like_lists() -> None:
    texts = [[1, 2, 3, 1, 2, 3, 1, 2], [3, 1, 2, 3, 1, 2, 3, 1]]
    expected = detect(texts, key="k", context=2)
    assert expected.scored == 3
    for kind in (np.array(texts), torch.tensor(texts)):
        assert detect(kind, key="k", context=2) == expected


def test_padding_and_an_empty_key_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 0, got -100; take the padding out"):
        detect([[1, 2, 3, 4, 5, -100]], key="k")
    with pytest.raises(ValueError, match="key is empty"):
        detect([[1, 2, 3, 4, 5]], key="")
    with pytest.raises(ConfigError, match=r"key: .*at least 1 character"):
        base.resolve({"name": "watermark", "key": ""})


def test_the_key_is_not_shown_with_the_configuration() -> None:
    assert "secret words" not in repr(Config(key="secret words"))


def test_a_server_can_tell_the_public_key() -> None:
    assert build(Config()).uses_public_key
    assert build(Config(key=PUBLIC_KEY)).uses_public_key
    assert not build(Config(key="secret words")).uses_public_key


# Unmarked text, over keys


@pytest.mark.parametrize(("context", "texts", "share"), [(1, 20, 0.5), (4, 3, 0.25)])
def test_the_p_value_is_the_rate_of_false_alarms(
    unmarked: list[tuple[int, ...]], context: int, texts: int, share: float
) -> None:
    keys = 500
    p_values = [
        detect(unmarked[:texts], key=f"key {number}", share=share, context=context).p_value
        for number in range(keys)
    ]
    for level in (0.5, 0.2, 0.05, 0.01):
        alarms = sum(p <= level for p in p_values)
        # More than this by chance once in ten thousand runs, and these keys never change.
        assert alarms <= binom.isf(1e-4, keys, level), f"{alarms} of {keys} at {level}"
    # The test has power as well: the levels are nearly reached.
    assert sum(p <= 0.2 for p in p_values) >= binom.isf(1 - 1e-4, keys, 0.15)


@settings(max_examples=10)
@given(
    texts=st.lists(st.lists(st.integers(0, 5), min_size=3, max_size=20), min_size=1, max_size=8),
    share=st.sampled_from([0.25, 0.5]),
)
def test_however_a_text_repeats_itself_its_colours_are_fair_draws(
    texts: list[list[int]], share: float
) -> None:
    counts = [detect(texts, key=f"key {n}", share=share, context=2) for n in range(50)]
    green, scored = sum(count.green for count in counts), sum(count.scored for count in counts)
    assert binomtest(green, scored, share).pvalue > 1e-6
    assert sum(count.p_value <= 0.05 for count in counts) <= binom.isf(1e-6, 50, 0.05)


# Marked text


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_marked_text_is_detected_by_its_own_key_alone(
    teacher: models.Loaded, unmarked: list[tuple[int, ...]], temperature: float
) -> None:
    defense = build(Config(key="ours"))
    texts = written(teacher, defense, temperature=temperature)
    assert defense.detect(texts).p_value < 1e-6
    assert defense.detect(texts) == detect(texts, key="ours")
    assert detect(texts, key="theirs").p_value > 0.01
    assert defense.detect(unmarked).p_value > 0.01


def test_a_watermark_is_not_detected_in_a_model() -> None:
    class Student:
        def complete(self, prompts):
            return [[1]] * len(prompts)

    with pytest.raises(TypeError, match="detected in texts"):
        build(Config()).detect(Student())


def test_the_prompt_is_not_counted(teacher: models.Loaded) -> None:
    """The lists of a completion follow from the completion alone."""
    problems = TASK.problems("test", 2)
    prompts = [encode_prompt(teacher.tokenizer, TASK.messages(item.question)) for item in problems]
    assert prompts[0] != prompts[1]
    seen: list[list[int]] = []
    defense = build(Config(context=1))

    class Watch(DecodingHooks):
        def adjust_logits(self, logits, prefixes):
            seen.extend(list(prefix) for prefix in prefixes)
            adjusted = defense.adjust_logits(logits, prefixes)
            for row, prefix in enumerate(prefixes):
                changed = (adjusted[row] != logits[row]).numpy()
                expected = (
                    green_list(prefix[-1:], logits.shape[-1], key=PUBLIC_KEY)
                    if prefix
                    else np.zeros(logits.shape[-1], dtype=bool)
                )
                assert np.array_equal(changed, expected)
            return adjusted

    collect(teacher, TASK, problems, Sampling(max_new_tokens=10), hooks=[Watch()])
    assert seen[0] == []
    assert len(seen) > 10
