"""The tail of a student computes what the whole student does, and so do its derivatives."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from azeotrope.heads.chunked import hidden_states
from azeotrope.heads.features import blocks_of, compute
from azeotrope.heads.surrogate import Surrogate, first_block, surrogate_from
from azeotrope.models import Loaded, load, load_tokenizer
from azeotrope.tokens import Example, collate

LENGTHS = [(3, 5), (6, 2), (1, 9)]
NAMED = "model.layers.1.mlp.down_proj.weight"
LAYERS = ["last", "penultimate", NAMED, "model.norm.weight", "lm_head.weight"]


def examples(vocab: int) -> list[Example]:
    generator = torch.Generator().manual_seed(4)
    examples = []
    for number, (prompt, completion) in enumerate(LENGTHS):
        ids = torch.randint(vocab, (prompt + completion,), generator=generator).tolist()
        flags = (False,) * completion
        examples.append(
            Example(str(number), tuple(ids[:prompt]), tuple(ids[prompt:]), flags, flags)
        )
    return examples


def gemma() -> Loaded:
    """Blocks of two kinds, scaled embeddings, norms elsewhere."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=4,
        max_position_embeddings=64,
        initializer_range=0.4,
        final_logit_softcapping=None,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    return Loaded(Gemma2ForCausalLM(config).eval(), load_tokenizer("pocket/teacher"))


MODELS = {
    "proxy": lambda: load("pocket/proxy-a", device="cpu"),
    "other": lambda: load("pocket/other", device="cpu"),
    "gemma": gemma,
}


def close(actual: Tensor, expected: Tensor) -> None:
    """Equal to float32's rounding.

    The norms of these models compute in float32 whatever the weights are, and a processor may sum
    batches of another shape in another order.
    """
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-5)


class Case:
    """A surrogate, what enters it, and the whole model in float64 beside it."""

    def __init__(self, name: str, layer: str, dtype: torch.dtype = torch.float64) -> None:
        self.whole: PreTrainedModel = MODELS[name]().model
        self.whole.to(dtype=dtype)  # type: ignore[call-arg]
        self.whole.set_attn_implementation("eager")
        tail = MODELS[name]()
        tail.model.to(dtype=dtype)  # type: ignore[call-arg]
        texts = examples(min(self.whole.config.vocab_size, 40))
        self.batch = collate(texts, pad_id=0)
        block = first_block(self.whole, layer)
        features = compute(self.whole, texts, before_block=block, batch_size=2)
        self.inputs = torch.cat([item.hidden for item in features])
        self.rows: Sequence[int] = [len(text) - 1 for text in texts]
        self.counts: Sequence[int] = [len(text.completion) for text in texts]
        self.surrogate = Surrogate(tail, layer, 40)

    def hidden(self, tensors: dict[str, Tensor]) -> Tensor:
        return self.surrogate.hidden(tensors, self.inputs, self.rows, self.counts)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", MODELS)
def test_the_tail_gives_the_last_hidden_states(name: str, layer: str) -> None:
    case = Case(name, layer)
    with torch.no_grad():
        expected = hidden_states(case.whole, case.batch)
    close(case.hidden({}), expected)
    close(case.hidden(case.surrogate.watched()).detach(), expected)
    blocks = len(blocks_of(case.whole))
    expected_blocks = {"last": 1, "penultimate": 2, NAMED: blocks - 1, "lm_head.weight": 0}.get(
        layer, 1
    )
    assert len(case.surrogate.trunk.layers) == expected_blocks  # type: ignore[arg-type]
    assert not any(parameter.requires_grad for parameter in case.surrogate.parameters())


@pytest.mark.parametrize("layer", ["last", "penultimate", NAMED, "model.norm.weight"])
@pytest.mark.parametrize("name", ["proxy", "gemma"])
def test_gradients_are_those_of_the_whole_model(name: str, layer: str) -> None:
    case = Case(name, layer)
    watched = case.surrogate.watched()
    # Where each watched tensor lies in the whole model.
    start = first_block(case.whole, layer)
    names = {short: "model." + short.replace("layers.0.", f"layers.{start}.") for short in watched}
    whole = dict(case.whole.named_parameters())
    assert all(torch.equal(watched[short], whole[names[short]]) for short in watched)
    if layer in {"last", "penultimate"}:
        block = {n for n in whole if n.startswith(f"model.layers.{start}.")}
        assert set(names.values()) == block
    else:
        assert list(names.values()) == [layer]
    direction = torch.randn_like(case.hidden(watched))
    actual = torch.autograd.grad((case.hidden(watched) * direction).sum(), list(watched.values()))
    expected = torch.autograd.grad(
        (hidden_states(case.whole, case.batch) * direction).sum(),
        [whole[names[short]] for short in watched],
    )
    for ours, theirs in zip(actual, expected, strict=True):
        close(ours, theirs)
        assert theirs.abs().sum() > 0


def moved_by(case: Case, along: dict[str, Tensor], step: float) -> Tensor:
    """Last hidden states of the whole model after a step of the watched tensors."""
    tensors = {name: value + step * along[name] for name, value in case.surrogate.watched().items()}
    return case.hidden(tensors).detach()


def random_direction(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    torch.manual_seed(3)
    return {name: 0.1 * torch.randn_like(value) for name, value in tensors.items()}


@pytest.mark.parametrize("layer", ["last", "penultimate", NAMED, "model.norm.weight"])
@pytest.mark.parametrize("name", MODELS)
def test_a_direction_is_what_finite_differences_say(name: str, layer: str) -> None:
    case = Case(name, layer)
    tensors = case.surrogate.watched()
    along = random_direction(tensors)
    actual = case.surrogate.direction(tensors, along, case.inputs, case.rows, case.counts)
    # Norms and attention compute in float32 whatever they are given, so the step is not small.
    step = 1e-3
    expected = (moved_by(case, along, step) - moved_by(case, along, -step)) / (2 * step)
    assert expected.norm() > 0.5
    assert (actual - expected).norm() < 1e-3 * expected.norm()
    # A Jacobian-vector product is linear.
    twice = {name: 2 * value for name, value in along.items()}
    doubled = case.surrogate.direction(tensors, twice, case.inputs, case.rows, case.counts)
    torch.testing.assert_close(doubled, 2 * actual, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", ["last", "penultimate"])
def test_directions_and_gradients_are_transposes(layer: str) -> None:
    case = Case("proxy", layer)
    tensors = case.surrogate.watched()
    along = random_direction(tensors)
    out = case.hidden(tensors)
    pull = torch.randn_like(out)
    forwards = case.surrogate.direction(tensors, along, case.inputs, case.rows, case.counts)
    backwards = torch.autograd.grad(out, list(tensors.values()), pull)
    pairs = zip(backwards, along.values(), strict=True)
    actual, expected = (forwards * pull).sum(), sum((g * v).sum() for g, v in pairs)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer", ["last", "lm_head.weight"])
def test_logits_move_with_the_watched_tensors(layer: str) -> None:
    case = Case("proxy", layer, torch.float32)
    surrogate = case.surrogate
    tensors = surrogate.watched()
    along = random_direction(tensors)
    moved = surrogate.moved(tensors, along, case.inputs, case.rows, case.counts)
    count = sum(case.counts)
    actual = torch.cat([moved(slice(0, 7)), moved(slice(7, count))])
    step = 1e-2
    if layer == "last":
        ends = [surrogate.logits(moved_by(case, along, sign * step)) for sign in (1, -1)]
    else:
        states = case.hidden(tensors)
        ends = [states @ (surrogate.weight + s * step * along[layer]).T for s in (1, -1)]
    expected = (ends[0] - ends[1]) / (2 * step)
    assert actual.shape == (count, 40)
    torch.testing.assert_close(actual, expected.detach(), rtol=2e-2, atol=2e-2)
    assert expected.abs().max() > 0.5


def test_logits_are_the_models_own_without_the_rows_that_pad_its_head() -> None:
    case = Case("proxy", "last", torch.float32)
    with torch.no_grad():
        whole = case.whole(input_ids=case.batch.input_ids).logits[case.batch.mask]
        actual = case.surrogate.logits(case.hidden({}))
    torch.testing.assert_close(actual, whole[:, :40], rtol=1e-4, atol=1e-4)


def test_the_last_states_are_stored_for_the_head() -> None:
    case = Case("proxy", "lm_head.weight")
    assert case.surrogate.names == []
    watched = case.surrogate.watched()
    assert list(watched) == ["lm_head.weight"]
    assert watched["lm_head.weight"].requires_grad
    assert watched["lm_head.weight"].shape == (40, case.inputs.shape[1])


def test_texts_do_not_see_each_other() -> None:
    case = Case("proxy", "penultimate")
    together = case.hidden({}).split(list(case.counts))
    parts = case.inputs.split(list(case.rows))
    for part, rows, count, expected in zip(parts, case.rows, case.counts, together, strict=True):
        alone = case.surrogate.hidden({}, part, [rows], [count])
        close(alone, expected)


def test_watched_tensors_are_not_the_models_own() -> None:
    case = Case("proxy", "last")
    before = case.hidden({})
    watched = case.surrogate.watched()
    moved = {name: value + 1 for name, value in watched.items()}
    assert not torch.allclose(case.hidden(moved), before)
    assert torch.equal(case.hidden({}), before)
    assert not before.requires_grad


@pytest.mark.parametrize(
    "layer",
    ["first", "model.layers.9.mlp.down_proj.weight", "lm_head.bias", "lm_head", "layers.1",
     "model.embed_tokens.weight"],
)  # fmt: skip
def test_a_layer_that_is_not_there_is_refused(layer: str) -> None:
    model = load("pocket/proxy-a", device="cpu").model
    message = f"no tensor '{layer}' .*give `last`, `penultimate`, `lm_head.weight` or one such as: "
    with pytest.raises(ValueError, match=f"{message}.*model.norm.weight"):
        first_block(model, layer)


def test_one_block_has_none_before_it() -> None:
    model = load("pocket/proxy-a", device="cpu").model
    model.base_model.layers = blocks_of(model)[:1]
    assert first_block(model, "last") == 0
    with pytest.raises(ValueError, match="a surrogate of 1 blocks has no penultimate one"):
        first_block(model, "penultimate")


def test_another_vocabulary_is_refused() -> None:
    teacher = load("pocket/teacher", device="cpu")
    message = r"surrogate pocket/other has another vocabulary \(\d+ tokens\) than the teacher \(129"
    with pytest.raises(ValueError, match=message):
        surrogate_from(load("pocket/other", device="cpu"), teacher, "last", "pocket/other")
    actual = surrogate_from(load("pocket/proxy-b", device="cpu"), teacher, "last", "pocket/proxy-b")
    assert len(actual.weight) == 129


def test_a_trunk_without_a_list_of_blocks_is_refused() -> None:
    config = GPT2Config(
        n_layer=2, n_head=2, n_embd=8, vocab_size=20, bos_token_id=1, eos_token_id=2
    )
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no list `layers` of blocks"):
        first_block(GPT2LMHeadModel(config), "last")


def test_a_tail_that_is_not_the_model_is_refused() -> None:
    """Granite multiplies whatever it is given as embeddings."""
    torch.manual_seed(0)
    config = GraniteConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.5,
        embedding_multiplier=12.0,
    )
    loaded = Loaded(GraniteForCausalLM(config).eval(), load_tokenizer("pocket/teacher"))
    message = "GraniteForCausalLM multiplies whatever enters its trunk"
    with pytest.raises(ValueError, match=message):
        Surrogate(loaded, "last", 40)


def test_a_multiplier_that_is_not_known_is_found_by_its_effect() -> None:
    """Even a factor of 1.002, whose states are within half a percent, is no rounding."""

    class Scaled(LlamaForCausalLM):
        pass

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=1, initializer_range=0.5,
    )  # fmt: skip
    model = Scaled(config).eval()

    def scale(_: object, arguments: tuple, named: dict) -> tuple[tuple, dict]:
        if "inputs_embeds" in named and named["inputs_embeds"] is not None:
            named["inputs_embeds"] = 1.002 * named["inputs_embeds"]
        return arguments, named

    model.model.register_forward_pre_hook(scale, with_kwargs=True)
    loaded = Loaded(model, load_tokenizer("pocket/teacher"))
    with pytest.raises(ValueError, match="give other states than in the whole model"):
        Surrogate(loaded, "penultimate", 40)
