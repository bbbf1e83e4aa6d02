"""A wide random model, and APIs that hide, refuse or run out, for tests of logit recovery."""

from collections.abc import Mapping, Sequence

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from azeotrope.logits.oracle import ModelOracle, RefusedError, TopLogprobs

VOCAB, HIDDEN = 600, 48


def llama() -> LlamaForCausalLM:
    torch.manual_seed(11)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=32,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


class Hiding(ModelOracle):
    """An API that takes a bias, and shows log-probabilities without it."""

    def query(self, prompt_ids: Sequence[int], logit_bias: Mapping[int, float]) -> TopLogprobs:
        return super().query(prompt_ids, {})


class Metered(ModelOracle):
    """An API that stops answering after a number of queries."""

    def __init__(self, model: PreTrainedModel, allowance: int) -> None:
        super().__init__(model)
        self.allowance = allowance

    def query(self, prompt_ids: Sequence[int], logit_bias: Mapping[int, float]) -> TopLogprobs:
        if self.allowance == 0:
            raise RefusedError("quota exceeded")
        self.allowance -= 1
        return super().query(prompt_ids, logit_bias)


def true_logits(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.tensor(prompts)).logits[:, -1].double()
