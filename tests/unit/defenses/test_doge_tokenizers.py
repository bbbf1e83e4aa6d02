"""DOGe with a proxy whose tokenizer numbers the tokens differently."""

import json
import random

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from azeotrope import models
from azeotrope.defenses.doge import Config, Doge
from azeotrope.heads import features
from azeotrope.heads.export import head_from, proxy_head_from
from azeotrope.logits.vocabulary import share
from azeotrope.tokens import Boundary, encode


def permuted(tokenizer: PreTrainedTokenizerFast, order: list[int]) -> PreTrainedTokenizerFast:
    """The same tokenizer with id `order[i]` where `i` was."""
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    data["model"]["vocab"] = {t: order[i] for t, i in data["model"]["vocab"].items()}
    for added in data["added_tokens"]:
        added["id"] = order[added["id"]]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(data)),
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
    )


def test_a_proxy_with_permuted_ids_gives_the_same_loss(word: PreTrainedTokenizerFast) -> None:
    teacher, proxy = models.load("pocket/teacher"), models.load("pocket/proxy-a")
    copy = models.load("pocket/proxy-a")
    order = list(range(len(word)))
    random.Random(0).shuffle(order)
    mixed = models.Loaded(copy.model, permuted(proxy.tokenizer, order))
    with torch.no_grad():
        for layer in (mixed.model.get_input_embeddings(), models.head_of(mixed.model)):
            layer.weight[torch.tensor(order)] = layer.weight.clone()
    texts = ["<think> 12 + 3 = 15. </think> #### 15", "<think> 4 - 1 = 3. </think> #### 3"]
    examples = [
        encode(
            word, [{"role": "user", "content": "joe has 12 eggs."}], text,
            boundary=Boundary(), max_length=64, id=text,
        )
        for text in texts
    ]  # fmt: skip

    def total(which: models.Loaded) -> tuple[float, Tensor]:
        shared = share(teacher.tokenizer, which.tokenizer)
        ours = features.compute(teacher.model, examples)
        theirs = features.compute(which.model, examples, to_model=shared.to_proxy)
        batch = features.join(features.pair_up(ours, [theirs]))
        head = head_from(teacher)
        actual = Doge(Config(strength=0.5)).loss(
            head, (proxy_head_from(which, teacher, "proxy"),), batch
        )
        return actual.total.item(), head.weight.grad

    assert share(teacher.tokenizer, proxy.tokenizer).is_identity
    assert not share(teacher.tokenizer, mixed.tokenizer).is_identity
    plain, mixed_up = total(proxy), total(mixed)
    assert mixed_up[0] == pytest.approx(plain[0], rel=1e-6)
    torch.testing.assert_close(mixed_up[1], plain[1], rtol=1e-5, atol=1e-5)
