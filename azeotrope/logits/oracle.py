"""An API that shows the likeliest next tokens under a logit bias, as an attacker may query it."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers import PreTrainedModel

CACHED_PROMPTS = 64
"""Prompts whose logits `ModelOracle` keeps: an attack sends the same prompt many times."""

TopLogprobs = Sequence[tuple[int, float]]
"""Token ids with their log-probabilities in nats, likeliest first."""


class RefusedError(PermissionError):
    """The API refuses a request, or ignores a part of it."""


@runtime_checkable
class Oracle(Protocol):
    """The likeliest next tokens after a prompt, under a logit bias."""

    def query(self, prompt_ids: Sequence[int], logit_bias: Mapping[int, float]) -> TopLogprobs:
        """Log-probabilities of the shown tokens, after the bias if the API applies it first.

        Raises:
            RefusedError: if the API does not allow the request.
        """
        ...


class ModelOracle:
    """An API in front of a model of this process, to measure what its rules give away.

    The bias is added in float64, so only the model limits the precision of the answers.

    Args:
        top_k: log-probabilities shown per query.
        decimals: digits after the point to which they are rounded; None leaves them exact.
        allow_bias: whether a logit bias may be combined with log-probabilities.

    Raises:
        ValueError: if `top_k` is not between 1 and the vocabulary, or `decimals` is negative.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        top_k: int = 5,
        decimals: int | None = None,
        allow_bias: bool = True,
    ) -> None:
        self.vocab = int(model.config.get_text_config().vocab_size)
        if not 1 <= top_k <= self.vocab:
            raise ValueError(
                f"top_k must be between 1 and the vocabulary {self.vocab}, got {top_k}"
            )
        if decimals is not None and decimals < 0:
            raise ValueError(f"decimals must be 0 or more, or None for exact, got {decimals}")
        self.model, self.top_k, self.decimals = model, top_k, decimals
        self.allow_bias = allow_bias
        self._logits = lru_cache(maxsize=CACHED_PROMPTS)(self._compute)

    @torch.inference_mode()
    def _compute(self, prompt: tuple[int, ...]) -> Tensor:
        ids = torch.tensor([prompt], device=self.model.device)
        output = self.model(input_ids=ids, use_cache=False, logits_to_keep=1)
        return output.logits[0, -1].double().cpu()

    def query(self, prompt_ids: Sequence[int], logit_bias: Mapping[int, float]) -> TopLogprobs:
        """See `Oracle.query`.

        Raises:
            RefusedError: if a bias is given and not allowed.
            ValueError: if the prompt is empty, or an id is not in the vocabulary.
        """
        if not prompt_ids:
            raise ValueError("the prompt is empty; give at least one token id")
        unknown = [token for token in (*prompt_ids, *logit_bias) if not 0 <= token < self.vocab]
        if unknown:
            raise ValueError(f"token id {unknown[0]} is not in the vocabulary of {self.vocab}")
        if logit_bias and not self.allow_bias:
            raise RefusedError("logit_bias cannot be combined with logprobs")
        logits = self._logits(tuple(prompt_ids))
        if logit_bias:
            logits = logits.clone()
            logits[list(logit_bias)] += torch.tensor(list(logit_bias.values()), dtype=logits.dtype)
        likeliest, tokens = logits.topk(self.top_k)
        log_p = likeliest - logits.logsumexp(0)
        if self.decimals is not None:
            log_p = log_p.round(decimals=self.decimals)
        return list(zip(tokens.tolist(), log_p.tolist(), strict=True))
