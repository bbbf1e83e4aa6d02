"""Attackers who read numbers off knobs and lengths, and what is left for them.

Each test is a program of an attacker. It prints what it recovers from a gateway without the
counter-measure (`before`) and from the real plan (`after`).
"""

import hashlib
from collections.abc import Callable, Sequence

import pytest
import torch

from azeotrope import models
from azeotrope.defenses.base import resolve
from azeotrope.defenses.watermark import detect
from azeotrope.engine.protocol import EngineRequest
from azeotrope.generation import Sampling, choose, generate, uniforms
from azeotrope.tasks import PocketConfig
from azeotrope.tasks import build as build_task
from azeotrope.tokens import encode_prompt
from gateway.coarse import CELL, LENGTH_CELL, coarse_length
from gateway.errors import ApiError
from gateway.http.requests import ChatRequest, CompletionRequest
from gateway.plan import ModelLimits, Plan, plan
from gateway.policy import Tier

PROBABILITIES = torch.tensor([[0.6180339, 0.21, 0.1, 0.0719661]]).log()
KEY = b"the account's secret"


@pytest.fixture(scope="module")
def limits() -> ModelLimits:
    tokenizer = models.load_tokenizer("pocket/teacher")
    return ModelLimits(tokenizer, context=256, vocabulary=len(tokenizer))


def chat(text: str = "how many ?", **more: object) -> ChatRequest:
    return ChatRequest.model_validate(
        {"model": "m", "messages": [{"role": "user", "content": text}], **more}
    )


def planned(limits: ModelLimits, request: ChatRequest | CompletionRequest, **tier: object) -> Plan:
    return plan(
        request, Tier.model_validate(tier), limits, identity="r", seed_key=KEY, watermark_key=None
    )


def drawn(request: EngineRequest) -> int:
    """The token that an engine draws for a request, from known probabilities."""
    return int(
        choose(
            PROBABILITIES,
            torch.tensor([request.temperature], dtype=torch.float64),
            torch.tensor([request.top_p], dtype=torch.float64),
            uniforms(request.seed, 1),
        )
    )


def bisected(first_only: Callable[[float], bool], steps: int = 30) -> float:
    """The smallest nucleus at which another token than the first one is seen."""
    low, high = 0.0, 1.0
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if first_only(middle) else (low, middle)
    return low


def test_the_nucleus_tells_a_probability_to_half_a_cell_and_no_better(limits: ModelLimits) -> None:
    truth = float(PROBABILITIES[0, 0].exp())
    tries = 24

    def exact(top_p: float) -> bool:
        requests = (EngineRequest("r", (1,), 1, 1.0, top_p, seed) for seed in range(tries))
        return all(drawn(request) == 0 for request in requests)

    def served(text: str) -> Callable[[float], bool]:
        def first_only(top_p: float) -> bool:
            asked = (chat(text, top_p=top_p, seed=seed) for seed in range(tries))
            return all(drawn(planned(limits, one).requests[0]) == 0 for one in asked)

        return first_only

    before = abs(bisected(exact) - truth)
    words = ("eggs", "how", "many", "joe")
    after = [abs(bisected(served(f"{word} ?")) - truth) for word in words]
    print(f"error of a probability: before {before:.1e}, after {[f'{x:.3f}' for x in after]}")  # noqa: T201
    assert before < 1e-6
    assert max(after) <= CELL
    # Where the cells begin is a secret, so no one answer is exact.
    assert sum(after) / len(after) > 1e-3


def test_requests_that_differ_in_a_knob_share_no_draw(limits: ModelLimits) -> None:
    same = [planned(limits, chat(seed=7)).requests[0].seed for _ in range(2)]
    assert same[0] == same[1]
    changes = [
        {"temperature": 0.9},
        {"top_p": 0.5},
        {"n": 2},
        {"max_tokens": 9},
        {"seed": 8},
        {"logit_bias": {"5": -100}},
        {"text": "how many eggs ?"},
    ]
    seeds = {
        planned(limits, chat(**{"seed": 7, **change}), bans=True).requests[0].seed
        for change in changes
    }
    assert len(seeds | set(same)) == len(changes) + 1


def test_clients_that_ask_for_nothing_get_the_whole_distribution(limits: ModelLimits) -> None:
    assert planned(limits, chat()).requests[0].top_p == 1.0
    assert planned(limits, chat(top_p=1)).requests[0].top_p == 1.0


def test_lengths_confirm_no_guess_of_hidden_words(limits: ModelLimits) -> None:
    """Greedy decoding after a right guess of k words is exactly k tokens shorter."""
    hidden = 57
    chance = [hashlib.sha256(bytes([guess])).digest()[0] % 80 + 20 for guess in range(64)]

    def shown(guess: int, *, right: bool) -> tuple[int, int]:
        """What the client is told after a guess of one word: exact tokens, and served ones."""
        request = chat(f"how many ? w{guess}", max_tokens=200)
        tokens = hidden - 1 if right else chance[guess]
        served = planned(limits, request, reasoning="cut", max_tokens=256)
        return tokens, coarse_length(tokens, served.usage_shift)

    exact = [shown(guess, right=guess == 9)[0] == hidden - 1 for guess in range(64)]
    cells = [shown(guess, right=guess == 9)[1] for guess in range(64)]
    before = [guess for guess, fits in enumerate(exact) if fits]
    after = [guess for guess, cell in enumerate(cells) if cell in (cells[9], LENGTH_CELL * 2)]
    print(f"guesses that fit the length: before {len(before)}, after {len(after)} of 64")  # noqa: T201
    assert 9 in before
    assert len(before) <= 4
    assert len(after) >= 16


def test_limits_and_bans_do_not_measure_hidden_lengths_either(limits: ModelLimits) -> None:
    ends = sorted(
        {
            planned(limits, chat(max_tokens=tokens), reasoning="cut").requests[0].max_tokens
            for tokens in range(1, 161)
        }
    )
    assert len(ends) <= 160 // LENGTH_CELL + 2
    shown = planned(limits, chat(max_tokens=57)).requests[0].max_tokens
    assert shown == 57
    end = str(limits.tokenizer.eos_token_id)
    for hidden in ("cut", "summary"):
        with pytest.raises(ApiError, match="ends a completion"):
            planned(limits, chat(logit_bias={end: -100}), reasoning=hidden, bans=True)
        planned(limits, chat(logit_bias={"7": -100}), reasoning=hidden, bans=True)
    planned(limits, chat(logit_bias={end: -100}), bans=True)


@pytest.mark.parametrize("step", [1, 2, 4, 8])
def test_text_that_is_fetched_in_pieces_carries_the_mark(step: int) -> None:
    """The client sends back what it has as the next prompt."""
    loaded, task = models.load("pocket/teacher"), build_task(PocketConfig())
    mark = {"name": "watermark", "strength": 6.0, "key": "secret", "context": 2}
    problems = task.problems("validation", 24)
    prompts = [
        list(encode_prompt(loaded.tokenizer, task.messages(problem.question)))
        for problem in problems
    ]

    def fetched(hooks: Sequence[object]) -> list[list[int]]:
        texts: list[list[int]] = [[] for _ in prompts]
        for piece in range(32 // step):
            written = generate(
                loaded.model,
                [prompt + text for prompt, text in zip(prompts, texts, strict=True)],
                Sampling(temperature=1.0, max_new_tokens=step),
                end_ids=(),
                pad_id=0,
                seeds=[1000 * piece + row for row in range(len(prompts))],
                hooks=hooks,  # type: ignore[arg-type]
            )
            for text, part in zip(texts, written, strict=True):
                text.extend(part.ids)
        return texts

    found = detect(fetched([resolve(mark)]), key="secret", context=2)
    innocent = detect(fetched([]), key="secret", context=2)
    print(f"{step} tokens a request: z {found.z:.1f}, innocent {innocent.z:.1f}")  # noqa: T201
    assert found.p_value < 1e-6
    assert innocent.p_value > 1e-3
