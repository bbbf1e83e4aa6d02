"""An attacker who recovers the output head from log-probabilities under a bias."""

from collections.abc import Callable, Mapping, Sequence

import httpx
import pytest
from fastapi import FastAPI
from witness import (
    CHAT,
    TEXT,
    Guarded,
    body,
    choices,
)

from azeotrope import models
from azeotrope.logits.oracle import ModelOracle, RefusedError, TopLogprobs
from azeotrope.logits.recovery import random_prompts, sample_tokens
from azeotrope.logits.subspace import recover_subspace
from azeotrope.models import Loaded
from gateway.http.app import create_app


class GatewayOracle:
    """The oracle of the attack `logits.subspace`, which sends its queries over HTTP."""

    def __init__(self, url: str, token: str, loaded: Loaded, path: str) -> None:
        self.client = httpx.Client(headers={"authorization": f"Bearer {token}"}, trust_env=False)
        self.url, self.loaded, self.path = url, loaded, path
        self.answered = 0

    def query(self, prompt_ids: Sequence[int], logit_bias: Mapping[int, float]) -> TopLogprobs:
        tokenizer = self.loaded.tokenizer
        fields = {"logprobs": True, "top_logprobs": 5} if self.path == CHAT else {"logprobs": 5}
        bias = {str(id): value for id, value in logit_bias.items()}
        more = {"logit_bias": bias, "max_tokens": 1, **fields}
        text = str(tokenizer.decode(list(prompt_ids)))
        answer = self.client.post(self.url + self.path, json=body(self.path, text, **more))
        if answer.status_code != 200:
            raise RefusedError(answer.json()["error"]["message"])
        self.answered += 1
        (choice,) = choices(answer).values()
        ids = {str(tokenizer.decode([id])): id for id in range(len(tokenizer))}
        return [(ids[name], value) for name, value in (choice.top or [{}])[0].items()]


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_an_attacker_recovers_no_subspace_from_the_gateway(
    path: str,
    guarded: Callable[..., Guarded],
    live_server: Callable[[FastAPI], str],
    teacher: Loaded,
) -> None:
    made = guarded()
    vocabulary = int(teacher.model.config.vocab_size)
    prompts = random_prompts(vocabulary, 20, length=6)
    url = live_server(create_app(made.gateway))
    for tier, answered, reason in (
        ("trusted", 1, "logit_bias is not accepted together with logprobs"),
        ("standard", 0, "this key gets no log-probabilities"),
    ):
        oracle = GatewayOracle(url, made.keys[tier], teacher, path)
        result = recover_subspace(oracle, prompts, sample_tokens(vocabulary))
        assert result.hidden_size is None
        assert (result.prompts, oracle.answered) == (0, answered)
        assert reason in (result.refused or "")


def test_the_same_attacker_recovers_it_from_an_open_api() -> None:
    small = models.load("pocket/small", device="cpu").model
    vocabulary, hidden = int(small.config.vocab_size), int(small.config.hidden_size)
    result = recover_subspace(
        ModelOracle(small),
        random_prompts(vocabulary, hidden + 8, length=6),
        sample_tokens(vocabulary),
    )
    assert (result.hidden_size, result.saturated, result.refused) == (hidden, False, None)
