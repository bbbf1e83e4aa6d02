"""Ask another engine for the log-probabilities of an exported checkpoint, where one is installed.

The export itself compares with transformers. vLLM takes over the process that it runs in, so it
gets one of its own.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from azeotrope.heads.export import ExportError
from azeotrope.models import Loaded

TOLERANCE = 1e-3
"""Nats, in float32: kernels add up in another order."""
_ANSWER = "log-probabilities: "
"""Begins the line that is not something the engine prints."""
_CPU = {"TORCHDYNAMO_DISABLE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def compare(loaded: Loaded, checkpoint: Path, prompts: list[list[int]]) -> float | None:
    """The largest difference between vLLM and transformers; None where vLLM is not installed.

    Compared are the log-probabilities of every token of the prompts but the first.

    Args:
        loaded: the model as it was exported.

    Raises:
        ExportError: if vLLM does not load the checkpoint, or disagrees.
    """
    if importlib.util.find_spec("vllm") is None or not prompts:
        return None
    given = torch.tensor(_ask_vllm(checkpoint, prompts))
    difference = float((given - _own(loaded, prompts)).abs().max())
    allowed = TOLERANCE if loaded.model.dtype == torch.float32 else 0.25
    if not difference <= allowed:
        raise ExportError(
            f"vLLM gives log-probabilities {difference:.2g} nats away from transformers' for "
            f"{checkpoint}; at most {allowed:g} is allowed"
        )
    return difference


@torch.inference_mode()
def _own(loaded: Loaded, prompts: list[list[int]]) -> torch.Tensor:
    found = []
    for ids in prompts:
        tokens = torch.tensor([ids], device=loaded.device)
        log_p = loaded.model(input_ids=tokens, use_cache=False).logits[0].float().log_softmax(-1)
        found.append(log_p[:-1].gather(-1, tokens[0, 1:, None])[:, 0].cpu())
    return torch.cat(found)


def _ask_vllm(checkpoint: Path, prompts: list[list[int]]) -> list[float]:
    cpu = not torch.cuda.is_available()
    result = subprocess.run(
        [sys.executable, "-m", "actors.engine_check", str(checkpoint)],
        input=json.dumps(prompts),
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **(_CPU if cpu else {})},
        cwd=Path(__file__).parents[1],
    )
    if result.returncode:
        last = result.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        raise ExportError(f"vLLM does not serve {checkpoint}: {last[0]}")
    lines = [line for line in result.stdout.splitlines() if line.startswith(_ANSWER)]
    return json.loads(lines[-1].removeprefix(_ANSWER))


def _serve(checkpoint: str, prompts: list[list[int]]) -> list[float]:
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]

    settings = {} if torch.cuda.is_available() else {"dtype": "float32", "enforce_eager": True}
    length = 8 * -(-(max(map(len, prompts)) + 1) // 8)
    engine = LLM(
        model=checkpoint,
        max_model_len=length,
        gpu_memory_utilization=0.3,
        kv_cache_memory_bytes=256 << 20,
        **settings,  # type: ignore[arg-type]
    )
    asked = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts], asked)
    return [
        float(shown[token].logprob)
        for output in outputs
        for token, shown in zip(
            output.prompt_token_ids[1:],  # type: ignore[index]
            output.prompt_logprobs[1:],  # type: ignore[index]
            strict=True,
        )
    ]


if __name__ == "__main__":
    answer = json.dumps(_serve(sys.argv[1], json.loads(sys.stdin.read())))
    sys.stdout.write(f"\n{_ANSWER}{answer}\n")
