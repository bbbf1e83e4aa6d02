"""The reference path: equal to full forward passes, row by row, whatever stands beside a row."""

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from azeotrope.decoding import DecodingHooks
from azeotrope.generation import Completion, Sampling, generate

VOCAB, NEVER, PAD = 17, 16, 0
PROMPTS = [[3, 4, 5, 6, 7], [8], [2, 9, 1], [11, 12, 13, 14, 15, 1, 2]]
GREEDY = Sampling(temperature=0.0, max_new_tokens=12)


@pytest.fixture(scope="module")
def model() -> Qwen2ForCausalLM:
    torch.manual_seed(7)
    # Weights this large make a peaked distribution, so that greedy and sampled text differ.
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.4,
        tie_word_embeddings=False,
    )
    return Qwen2ForCausalLM(config).double().eval()


@torch.inference_mode()
def reference(model: Qwen2ForCausalLM, prompt: list[int], steps: int, eos: int) -> Completion:
    """The most likely tokens by full forward passes: no cache, no padding, one row."""
    ids = list(prompt)
    for _ in range(steps):
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] == eos:
            return Completion(tuple(ids[len(prompt) :]), True)
    return Completion(tuple(ids[len(prompt) :]), False)


def run(model, prompts, sampling, *, eos=NEVER, **more) -> list[Completion]:
    return generate(model, prompts, sampling, end_ids=(eos,), pad_id=PAD, **more)


@pytest.fixture(scope="module")
def eos(model) -> int:
    """A token that some rows write early, some late and some never."""
    written = [reference(model, prompt, 12, NEVER).ids for prompt in PROMPTS]
    for token in range(VOCAB):
        ends = {ids.index(token) if token in ids else None for ids in written}
        if len(ends) >= 3 and max(end or 0 for end in ends) > 1:
            return token
    raise AssertionError("the random model writes no token that ends rows at different steps")


def test_greedy_equals_the_full_forward_reference(model, eos) -> None:
    for end in (NEVER, eos):
        expected = [reference(model, prompt, 12, end) for prompt in PROMPTS]
        assert run(model, PROMPTS, GREEDY, eos=end) == expected


def test_finished_rows_end_with_eos_and_leave_the_batch(model, eos) -> None:
    sizes: list[int] = []

    def count(_module, _args, kwargs) -> None:
        sizes.append(len(kwargs["input_ids"]))

    hook = model.register_forward_pre_hook(count, with_kwargs=True)
    found = run(model, PROMPTS, GREEDY, eos=eos)
    hook.remove()
    assert {completion.finished for completion in found} >= {True}
    for completion in found:
        assert completion.finished == (completion.ids[-1] == eos)
        assert eos not in completion.ids[:-1]
        assert completion.finished or len(completion.ids) == 12
    longest = max(len(completion.ids) for completion in found)
    assert sizes == [sum(len(c.ids) > step for c in found) for step in range(longest)]


@pytest.mark.parametrize(
    "sampling",
    [
        GREEDY,
        Sampling(temperature=1.0, max_new_tokens=12),
        Sampling(temperature=0.7, top_p=0.8, max_new_tokens=12),
    ],
)
def test_a_row_does_not_depend_on_the_rows_beside_it(model, eos, sampling) -> None:
    seeds = [100 + index for index in range(len(PROMPTS))]
    together = run(model, PROMPTS, sampling, eos=eos, seeds=seeds)
    alone = [
        run(model, [prompt], sampling, eos=eos, seeds=[seed])[0]
        for prompt, seed in zip(PROMPTS, seeds, strict=True)
    ]
    assert together == alone
    turned = run(model, PROMPTS[::-1], sampling, eos=eos, seeds=seeds[::-1])
    assert turned == together[::-1]


def test_seeds_decide_what_is_sampled(model) -> None:
    sampling = Sampling(temperature=2.0, max_new_tokens=20)
    first, again, other = run(model, [[3, 4]] * 3, sampling, seeds=[1, 1, 2])
    assert first == again
    assert first != other


def test_adjusted_logits_are_what_is_sampled_from(model) -> None:
    seen: list[list[list[int]]] = []

    class Force(DecodingHooks):
        def adjust_logits(self, logits, prefixes):
            assert logits.shape == (len(prefixes), VOCAB)
            seen.append([list(ids) for ids in prefixes])
            forced = torch.full_like(logits, -torch.inf)
            # The second row must end at the third token.
            for index, ids in enumerate(prefixes):
                forced[index, 9 if len(ids) == 2 and index == 1 else 5] = 0.0
            return forced

    for sampling in (
        Sampling(temperature=0.0, max_new_tokens=4),
        Sampling(temperature=1.0, max_new_tokens=4),
        Sampling(temperature=1.0, top_p=0.5, max_new_tokens=4),
    ):
        seen.clear()
        found = run(model, PROMPTS[:2], sampling, eos=9, seeds=[0, 1], hooks=[Force()])
        assert found == [Completion((5, 5, 5, 5), False), Completion((5, 5, 9), True)]
        # It sees each active row's completion so far, without the prompt.
        assert seen == [[[], []], [[5], [5]], [[5, 5], [5, 5]], [[5, 5, 5]]]


def test_a_tiny_nucleus_is_greedy(model, eos) -> None:
    tiny = Sampling(temperature=1.0, top_p=1e-6, max_new_tokens=12)
    assert run(model, PROMPTS, tiny, eos=eos, seeds=[0, 1, 2, 3]) == run(
        model, PROMPTS, GREEDY, eos=eos
    )


@pytest.mark.parametrize(("temperature", "top_p"), [(0.7, 1.0), (1.5, 1.0), (1.5, 0.6)])
def test_sampled_frequencies_match_the_distribution(model, temperature, top_p) -> None:
    prompt, draws = [3, 4, 5], 4000
    with torch.inference_mode():
        logits = model(torch.tensor([prompt])).logits[0, -1]
    expected = torch.softmax(logits / temperature, dim=-1)
    if top_p < 1:
        # The fewest tokens whose mass reaches top_p, found one by one.
        kept, mass = [], 0.0
        for token in expected.argsort(descending=True).tolist():
            if mass >= top_p:
                break
            kept.append(token)
            mass += expected[token].item()
        assert 1 < len(kept) < VOCAB
        nucleus = torch.zeros_like(expected)
        nucleus[kept] = expected[kept] / mass
        expected = nucleus
    sampling = Sampling(temperature=temperature, top_p=top_p, max_new_tokens=1)
    found = run(model, [prompt] * draws, sampling, seeds=list(range(draws)))
    counts = torch.bincount(torch.tensor([c.ids[0] for c in found]), minlength=VOCAB)
    sigma = (draws * expected * (1 - expected)).sqrt()
    assert ((counts - draws * expected).abs() <= 4 * sigma).all()
    assert counts[expected == 0].sum() == 0


def test_what_cannot_be_generated_is_refused(model) -> None:
    with pytest.raises(ValueError, match="a prompt of 60 tokens and max_new_tokens=12 exceed"):
        run(model, [[1], [1] * 60], GREEDY)
    with pytest.raises(ValueError, match="a prompt has no tokens"):
        run(model, [[1], []], GREEDY)
    with pytest.raises(ValueError, match="one seed per prompt, got none for 2"):
        run(model, [[1], [2]], Sampling())
    with pytest.raises(ValueError, match="one seed per prompt, got 1 for 2"):
        run(model, [[1], [2]], Sampling(), seeds=[1])
    assert run(model, [], GREEDY) == []


def test_the_context_may_be_filled_to_the_last_position(model) -> None:
    found = run(model, [[1] * 52], GREEDY)
    assert found == [reference(model, [1] * 52, 12, NEVER)]


def test_labels_of_result_tables() -> None:
    assert GREEDY.label == "greedy"
    assert Sampling(temperature=1.0).label == "sampled@1"
    assert Sampling(temperature=0.7).label == "sampled@0.7"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_no_numbers_end_the_call(model, value: float) -> None:
    class Broken(DecodingHooks):
        def adjust_logits(self, logits, prefixes):
            return torch.full_like(logits, value) if len(prefixes[0]) == 2 else logits

    with pytest.raises(ValueError, match="token 2 of a row has no distribution"):
        run(model, PROMPTS, GREEDY, hooks=[Broken()])
