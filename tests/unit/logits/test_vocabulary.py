"""Vocabularies meet by string: an id of one tokenizer says nothing about the other's."""

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from azeotrope.logits.vocabulary import share
from azeotrope.models import load_tokenizer


@pytest.fixture
def pieces() -> PreTrainedTokenizerFast:
    """As shipped: building it anew takes seconds."""
    return load_tokenizer("pocket/other")


@pytest.fixture(params=["pocket/teacher", "pocket/other"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return load_tokenizer(request.param)


def words(*tokens: str, **special: str) -> PreTrainedTokenizerFast:
    vocabulary = WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=tokens[0])
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(vocabulary), **special)


def test_shared_ids_are_the_same_strings(
    word: PreTrainedTokenizerFast, pieces: PreTrainedTokenizerFast
) -> None:
    shared = share(word, pieces)
    ours = word.convert_ids_to_tokens(shared.teacher_ids.tolist())
    theirs = pieces.convert_ids_to_tokens(shared.proxy_ids.tolist())
    assert ours == theirs
    assert set(ours) == set(word.get_vocab()) & set(pieces.get_vocab())
    assert 64 < len(ours) < len(word)
    assert not shared.is_identity
    assert torch.equal(shared.to_proxy[shared.teacher_ids], shared.proxy_ids)
    alone = [index for token, index in word.get_vocab().items() if token not in ours]
    assert set(shared.to_proxy[alone].tolist()) == {pieces.unk_token_id}


def test_a_tokenizer_shares_everything_with_itself(tokenizer: PreTrainedTokenizerFast) -> None:
    shared = share(tokenizer, tokenizer)
    assert shared.is_identity
    everything = torch.arange(len(tokenizer))
    for ids in (shared.teacher_ids, shared.proxy_ids, shared.to_proxy):
        assert torch.equal(ids, everything)


def test_the_same_words_in_another_order_are_no_identity() -> None:
    shared = share(words("a", "b", "c"), words("c", "a", "b"))
    assert shared.to_proxy.tolist() == [1, 2, 0]
    assert not shared.is_identity


def test_a_proxy_that_knows_more_is_an_identity_for_what_the_teacher_knows() -> None:
    shared = share(words("a", "b"), words("a", "b", "c", "d"))
    assert shared.to_proxy.tolist() == [0, 1]
    assert shared.is_identity


def test_special_tokens_match_by_role() -> None:
    ours = words("u", "a", "<end>", eos_token="<end>", unk_token="u")
    theirs = words("v", "</s>", "a", eos_token="</s>", unk_token="v")
    assert share(ours, theirs).to_proxy.tolist() == [0, 2, 1]


def test_a_proxy_that_could_not_read_is_refused_with_numbers(
    word: PreTrainedTokenizerFast,
) -> None:
    stranger = words(*(f"w{i}" for i in range(20)))
    with pytest.raises(ValueError, match=f"stranger shares 0 of the teacher's {len(word)}") as e:
        share(word, stranger, proxy_name="stranger")
    assert "at least 50% of them" in str(e.value)
    assert "\n" not in str(e.value)
    ours = words("a", "b", "c", "d")
    assert share(ours, words("a", "b", "x")).to_proxy.tolist()[:2] == [0, 1]
    with pytest.raises(ValueError, match="proxy shares 1 of the teacher's 4 tokens"):
        share(ours, words("a", "x", "y"))
