"""The transformers engine: the reference path's tokens and log-probabilities."""

import asyncio
from contextlib import closing

import pytest
import torch
from engine_answers import (
    answers_of,
    chunks_of,
    ids_of,
    reference_answer,
    reference_answers,
    request_for,
)
from transformers import MambaConfig, MambaForCausalLM

from azeotrope import models, tasks
from azeotrope.engine.protocol import EngineRequest
from azeotrope.engine.transformers import TransformersEngine
from azeotrope.generation import Sampling
from azeotrope.tokens import encode_prompt


def test_streams_write_the_reference_tokens_whatever_stands_beside_them(teacher, prompts) -> None:
    warm = {"temperature": 1.3, "top_p": 0.95}
    requests = [
        request_for(prompt, 25, seed=index, **(warm if index % 2 else {}))
        for index, prompt in enumerate(prompts[:6])
    ]
    with closing(TransformersEngine(teacher, rows=3)) as engine:
        together = [ids_of(answer) for answer in answers_of(engine, requests)]
        alone = [ids_of(answers_of(engine, [request])[0]) for request in requests[:4]]
    assert together[:4] == alone
    greedy = Sampling(temperature=0.0, max_new_tokens=25)
    sampled = Sampling(**warm, max_new_tokens=25)
    assert together[::2] == reference_answers(teacher, prompts[0:6:2], greedy)
    assert together[1::2] == reference_answers(teacher, prompts[1:6:2], sampled, seeds=[1, 3, 5])


def test_seeds_decide_what_is_sampled(teacher, prompts) -> None:
    requests = [request_for(prompts[0], temperature=2.0, seed=seed) for seed in (1, 1, 2)]
    with closing(TransformersEngine(teacher)) as engine:
        first, again, other = answers_of(engine, requests)
    assert ids_of(first) == ids_of(again) != ids_of(other)


def test_log_probabilities_are_those_of_the_defended_forward_pass(
    teacher, prompts, raise_defense
) -> None:
    config = {"name": "raise", "strength": 1.5}
    defense = raise_defense(config)
    requests = [
        request_for(prompts[0], 12, logprobs=4),
        request_for(prompts[1], 12),
        request_for(prompts[2], 12, logprobs=0, temperature=1.2, seed=3),
    ]
    for configs in ([], [config]):
        with closing(TransformersEngine(teacher, decoding=configs)) as engine:
            answers = answers_of(engine, requests)
        assert all(token.logprob is None and not token.top for token in answers[1][0])
        for answer, request in zip(answers, requests, strict=True):
            written = [token.id for token in answer[0]]
            if request.logprobs is None:
                continue
            for step, token in enumerate(answer[0]):
                whole = torch.tensor([[*request.prompt, *written[:step]]])
                with torch.inference_mode():
                    logits = teacher.model(whole, use_cache=False).logits[:, -1]
                if configs:
                    logits = defense.adjust_logits(logits, [written[:step]])
                logs = logits.log_softmax(-1)[0]
                assert token.logprob == pytest.approx(logs[token.id].item(), abs=1e-4)
                values, best = logs.topk(request.logprobs)
                assert [id for id, _ in token.top] == best.tolist()
                assert [value for _, value in token.top] == pytest.approx(values.tolist(), abs=1e-4)
        assert answers[0][0][0].top[0][0] == answers[0][0][0].id


def test_strength_and_key_of_a_request_choose_its_defense(teacher, prompts, raise_defense) -> None:
    config = {"name": "raise", "strength": 1.5, "key": "z"}
    variants = [(None, None), (0.0, None), (3.0, None), (None, "q"), (3.0, "q"), (3.0, None)]
    requests = [
        request_for(prompts[index], 20, strength=strength, watermark_key=key)
        for index, (strength, key) in enumerate(variants)
    ]
    with closing(TransformersEngine(teacher, decoding=[config])) as engine:
        together = [ids_of(answer) for answer in answers_of(engine, requests)]
    for index, (strength, key) in enumerate(variants):
        changed = {**config, "strength": 1.5 if strength is None else strength, "key": key or "z"}
        expected = reference_answer(teacher, prompts[index], 20, hooks=[raise_defense(changed)])
        assert together[index] == expected
    assert together[1] == reference_answer(teacher, prompts[1], 20)


def test_banned_tokens_are_not_written(teacher, prompts) -> None:
    with closing(TransformersEngine(teacher)) as engine:
        [plain] = answers_of(engine, [request_for(prompts[0])])
        used = tuple({token.id for token in plain[0]})
        [answer] = answers_of(engine, [request_for(prompts[0], banned=used, logprobs=3)])
    assert answer[0]
    for token in answer[0]:
        assert token.id not in used
        assert token.logprob is not None
        assert {id for id, _ in token.top}.isdisjoint(used)
        assert token.top[0] == (token.id, token.logprob)


def test_the_context_ends_a_row(teacher, prompts) -> None:
    long = tuple(prompts[0][i % len(prompts[0])] for i in range(250))
    with closing(TransformersEngine(teacher)) as engine:
        [answer, last] = answers_of(
            engine,
            [
                request_for(long, 10_000, banned=(2,)),
                request_for((*long, *long[:5]), 50, banned=(2,)),
            ],
        )
    assert (len(answer[0]), answer[1]) == (6, "length")
    assert (len(last[0]), last[1]) == (1, "length")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": ()}, "the prompt has no tokens"),
        ({"prompt": (1,) * 256}, "a prompt of 256 tokens leaves no room in the model's context"),
        ({"prompt": (1, 129)}, "prompt holds token id 129; ids go from 0 to 128"),
        ({"prompt": (1, -1)}, "prompt holds token id -1"),
        ({"banned": (500,)}, "banned holds token id 500"),
        ({"banned": tuple(range(129))}, "all 129 tokens are banned"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"temperature": -0.5}, "temperature must be 0 or greater, got -0.5"),
        ({"temperature": float("nan")}, "temperature must be 0 or greater, got nan"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"logprobs": 130}, "logprobs must be from 0 to 129, got 130"),
        ({"seed": 2**64}, "seed must fit 64 bits"),
    ],
)
def test_requests_that_do_not_fit_are_refused_before_the_queue(teacher, change, message) -> None:
    request = EngineRequest(**{"id": "r", "prompt": (5,), "max_tokens": 3, **change})
    with closing(TransformersEngine(teacher)) as engine:
        with pytest.raises(ValueError, match=message):
            asyncio.run(chunks_of(engine, request))
        assert answers_of(engine, [request_for((5,), 1)])[0][1] in ("stop", "length")


def test_what_the_engine_cannot_serve_is_refused_when_it_is_made(teacher) -> None:
    config = MambaConfig(vocab_size=17, hidden_size=16, state_size=4, num_hidden_layers=1)
    stateful = models.Loaded(MambaForCausalLM(config), teacher.tokenizer)
    with pytest.raises(ValueError, match="MambaForCausalLM keeps LinearAttentionLayer"):
        TransformersEngine(stateful)
    with pytest.raises(ValueError, match="rows and queue must be at least 1, got rows=0"):
        TransformersEngine(teacher, rows=0)
    with pytest.raises(ValueError, match="'answers_only' is of stage 'text'"):
        TransformersEngine(teacher, decoding=[{"name": "answers_only"}])


def test_other_architectures_write_the_reference_tokens() -> None:
    """OLMo 2, with another tokenizer."""
    other = models.load("pocket/other")
    task = tasks.build(tasks.PocketConfig())
    prompts = [
        encode_prompt(other.tokenizer, task.messages(problem.question))
        for problem in task.problems("test", 4)
    ]
    with closing(TransformersEngine(other, rows=2)) as engine:
        answers = answers_of(engine, [request_for(prompt, 30) for prompt in prompts])
    greedy = Sampling(temperature=0.0, max_new_tokens=30)
    assert [ids_of(answer) for answer in answers] == reference_answers(other, prompts, greedy)
