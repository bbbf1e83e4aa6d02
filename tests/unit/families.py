"""Tiny random checkpoints of many model families, with the pocket tokenizer's vocabulary."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

VOCAB = 129
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SCALES = {"embedding_multiplier": 4.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("Llama", {}),
    "Qwen2": ("Qwen2", {}),
    "Qwen3": ("Qwen3", {"head_dim": 8}),
    "Mistral": ("Mistral", {"sliding_window": None}),
    "Mistral, sliding window": ("Mistral", {"sliding_window": 16}),
    "Gemma": ("Gemma", {"head_dim": 8}),
    "Gemma 2": ("Gemma2", {"head_dim": 8, "sliding_window": 16}),
    "Gemma 2, no cap": (
        "Gemma2",
        {"head_dim": 8, "sliding_window": 16, "final_logit_softcapping": None},
    ),
    "Gemma 3": ("Gemma3", {"head_dim": 8, "sliding_window": 16}),
    "OLMo": ("Olmo", {}),
    "OLMo 2": ("Olmo2", {}),
    "OLMo 3": ("Olmo3", {"sliding_window": 16}),
    "Phi-3": ("Phi3", {}),
    "GPT-NeoX": ("GPTNeoX", {}),
    "StableLM": ("StableLm", {}),
    "Granite": ("Granite", {**SCALES, "logits_scaling": 8.0}),
    "Cohere": ("Cohere", {"logit_scale": 0.0625}),
    "Cohere 2": ("Cohere2", {"logit_scale": 0.25, "sliding_window": 16}),
    "SmolLM3": ("SmolLM3", {}),
    "Starcoder 2": ("Starcoder2", {}),
    "Mixtral": ("Mixtral", EXPERTS),
    "Qwen3-MoE": (
        "Qwen3Moe",
        {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    ),
    "GPT-OSS": ("GptOss", {**EXPERTS, "head_dim": 8, "sliding_window": 16}),
    "NanoChat": ("NanoChat", {}),
    "RecurrentGemma": ("RecurrentGemma", {"lru_width": 32, "attention_window_size": 16}),
    "RWKV": ("Rwkv", {"attention_hidden_size": 32}),
    "Mamba": ("Mamba", {"state_size": 4, "expand": 2, "conv_kernel": 4}),
    "Falcon-H1": (
        "FalconH1",
        {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "lm_head_multiplier": 0.5},
    ),
}
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    # It multiplies where Granite divides, by a setting of the same name.
    "serves other logits": ("HyperCLOVAX", {"logits_scaling": 8.0}),
    "no trunk apart from its head": (
        "Llama4",
        {"num_local_experts": 4, "attention_chunk_size": 16, "intermediate_size_mlp": 48},
    ),
}
"""Models that are refused in every use, by what the refusal says."""


def build(family: str) -> PreTrainedModel:
    """A random model of a family or a refusal, without dropout; the same weights at every call."""
    name, changes = {**FAMILIES, **REFUSED}[family]
    config_class = getattr(transformers, f"{name}TextConfig", None) or getattr(
        transformers, f"{name}Config"
    )
    model_class: Callable[..., PreTrainedModel] = getattr(transformers, f"{name}ForCausalLM")
    torch.manual_seed(0)
    settings = {**SMALL, **changes}
    if name in {"Mamba"}:
        settings = {k: v for k, v in settings.items() if "heads" not in k}
    model = model_class(config_class(**settings))
    with torch.no_grad():
        for weight in model.parameters():
            # Larger than at initialisation, so that distributions are far from uniform.
            if weight.ndim > 1:
                weight.mul_(6)
    return model.eval()
