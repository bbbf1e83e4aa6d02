"""Random models of five tokens whose texts can all be enumerated, for tests of MiniLLM."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from azeotrope.attacks import base as attacks
from azeotrope.attacks.logits.teacher import TeacherHead
from azeotrope.attacks.minillm import MiniLlm
from azeotrope.models import Loaded, head_of
from azeotrope.tokens import Example

EOS, VOCAB = 2, 5


def small(seed: int, vocab: int = VOCAB, context: int = 16) -> Loaded:
    """A random model of five tokens, with two rows that pad its head."""
    words = WordLevel({f"w{i}": i for i in range(vocab)}, unk_token="w0")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), eos_token=f"w{EOS}", pad_token="w0"
    )
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocab + 2,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=context,
        initializer_range=0.6,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    return Loaded(Qwen2ForCausalLM(config).eval(), tokenizer)


def teacher_head(teacher: Loaded) -> TeacherHead:
    head = head_of(teacher.model)
    return TeacherHead(teacher.tokenizer, head.weight, head.bias, [], model=teacher.model)


def minillm(teacher: Loaded, student: Loaded, **settings: Any) -> MiniLlm:
    attack = attacks.resolve({"name": "minillm", **settings})
    assert isinstance(attack, MiniLlm)
    attack.attach(teacher_head(teacher), student)
    return attack


def example(prompt: Sequence[int], completion: Sequence[int], id: str = "x") -> Example:
    flags = (False,) * len(completion)
    return Example(id, tuple(prompt), tuple(completion), flags, flags)


def log_softmax(loaded: Loaded, item: Example, rows: int, temperature: float = 1.0) -> Tensor:
    """The whole model's log-probabilities at each token of a completion."""
    ids = torch.tensor([item.prompt + item.completion])
    logits = loaded.model(input_ids=ids).logits[0, len(item.prompt) - 1 : -1, :rows]
    return (logits / temperature).log_softmax(-1)


def gradients(loaded: Loaded, value: Tensor) -> Tensor:
    found = torch.autograd.grad(value, list(loaded.model.parameters()))
    return torch.cat([part.flatten() for part in found])


def every_text(length: int) -> Iterator[tuple[int, ...]]:
    """All completions of at most this length, each ended by the end-of-sequence token or cut."""
    for token in range(VOCAB):
        if token == EOS or length == 1:
            yield (token,)
        else:
            yield from ((token, *rest) for rest in every_text(length - 1))
