"""Batched sampling with a key-value cache: the reference path every engine is compared with.

Each row has random numbers of its own, drawn from its seed, so what a row samples does not
depend on the rows beside it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from azeotrope.config import Config

AdjustLogits = Callable[[Tensor, list[list[int]]], Tensor]
"""(logits of shape [rows, vocab], the completion so far of each row) -> logits, same shape.

Rows that are finished are left out. A row's completion is one list from the first step to the last,
so that whoever keeps something for each row can tell which ones are still there.
"""


class Sampling(Config):
    """How completions are drawn."""

    temperature: float = Field(default=1.0, ge=0.0, description="0 takes the most likely token")
    top_p: float = Field(default=1.0, gt=0.0, le=1.0, description="nucleus: least mass kept")
    max_new_tokens: int = Field(default=96, ge=1)

    @property
    def label(self) -> str:
        """The name result tables use: `greedy` or `sampled@T`."""
        return "greedy" if self.temperature == 0 else f"sampled@{self.temperature:g}"


@dataclass(frozen=True)
class Completion:
    """Token ids written after one prompt, the end-of-sequence token included if it came."""

    ids: tuple[int, ...]
    finished: bool


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    eos_id: int,
    pad_id: int,
    seeds: Sequence[int] | None = None,
    adjust_logits: AdjustLogits | None = None,
) -> list[Completion]:
    """Complete every prompt, all rows in one batch; finished rows leave the batch.

    Args:
        seeds: one integer a row; needed when temperature > 0.
        adjust_logits: a decoding defense, applied before temperature.

    Returns:
        One completion a prompt, in order.

    Raises:
        ValueError: if a prompt is empty, if seeds are missing, or if prompt and completion
            together do not fit the model's context.
    """
    _check(model, prompts, sampling, seeds)
    rows = len(prompts)
    if rows == 0:
        return []
    written: list[list[int]] = [[] for _ in range(rows)]
    finished = [False] * rows
    draws = _uniforms(seeds or (), rows, sampling)
    temperatures = torch.full((rows,), sampling.temperature, dtype=torch.float64)
    top_p = torch.full((rows,), sampling.top_p, dtype=torch.float64)
    input_ids, attention = pad_left(prompts, pad_id, model.device)
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    active = list(range(rows))
    cache = DynamicCache(config=model.config)
    for step in range(sampling.max_new_tokens):
        output = model(
            input_ids=input_ids,
            attention_mask=attention,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits = output.logits[:, -1].float()
        if adjust_logits is not None:
            logits = adjust_logits(logits, [written[row] for row in active])
        tokens = choose(logits, temperatures[active], top_p[active], draws[active, step]).tolist()
        keep: list[int] = []
        for index, (row, token) in enumerate(zip(active, tokens, strict=True)):
            written[row].append(token)
            finished[row] = token == eos_id
            if not finished[row]:
                keep.append(index)
        if not keep:
            break
        if len(keep) < len(active):
            kept = torch.tensor(keep, device=model.device)
            cache.batch_select_indices(kept)
            attention, positions = attention[kept], positions[kept]
            active = [active[index] for index in keep]
        input_ids = torch.tensor([[written[row][-1]] for row in active], device=model.device)
        attention = torch.cat([attention, attention.new_ones(len(active), 1)], dim=1)
        positions = positions[:, -1:] + 1
    return [Completion(tuple(ids), done) for ids, done in zip(written, finished, strict=True)]


def _check(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    seeds: Sequence[int] | None,
) -> None:
    if sampling.temperature > 0 and (seeds is None or len(seeds) != len(prompts)):
        given = "none" if seeds is None else str(len(seeds))
        raise ValueError(f"sampling needs one seed a prompt, got {given} for {len(prompts)}")
    longest = max((len(prompt) for prompt in prompts), default=1)
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("a prompt has no tokens; every prompt needs at least one")
    context = context_of(model)
    if longest + sampling.max_new_tokens > context:
        raise ValueError(
            f"a prompt of {longest} tokens and max_new_tokens={sampling.max_new_tokens} exceed "
            f"the model's context of {context}; lower max_new_tokens or shorten the prompt"
        )


def context_of(model: PreTrainedModel) -> int:
    """The greatest number of positions that the model was made for."""
    return int(getattr(model.config, "max_position_embeddings", 1 << 30))


def uniforms(seed: int, count: int) -> Float[Tensor, " steps"]:
    """The random numbers of one row, one for each token that it may write."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, dtype=torch.float64, generator=generator)


def _uniforms(seeds: Sequence[int], rows: int, sampling: Sampling) -> Float[Tensor, "rows steps"]:
    if sampling.temperature == 0:
        return torch.zeros(rows, sampling.max_new_tokens, dtype=torch.float64)
    return torch.stack([uniforms(seed, sampling.max_new_tokens) for seed in seeds])


def pad_left(
    prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> tuple[Int[Tensor, "rows width"], Int[Tensor, "rows width"]]:
    """Token ids with the padding in front, and 1 where they are none of it."""
    width = max(len(prompt) for prompt in prompts)
    input_ids = torch.full((len(prompts), width), pad_id, dtype=torch.long)
    attention = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = torch.tensor(list(prompt))
        attention[row, width - len(prompt) :] = 1
    return input_ids.to(device), attention.to(device)


def choose(
    logits: Float[Tensor, "rows vocab"],
    temperatures: Float[Tensor, " rows"],
    top_p: Float[Tensor, " rows"],
    draws: Float[Tensor, " rows"],
) -> Int[Tensor, " rows"]:
    """The next token of each row, which depends on that row's numbers alone.

    Args:
        temperatures: 0 takes the most likely token.
        top_p: nucleus, the least mass kept; 1 keeps everything.
        draws: uniform in [0, 1), in float64; not looked at where the temperature is 0.
    """
    likeliest = logits.argmax(-1)
    is_drawn = temperatures > 0
    if not is_drawn.any():
        return likeliest
    device = logits.device
    # Rows that are not drawn divide by 1, and what they draw is thrown away.
    divisors = temperatures.where(is_drawn, 1.0).to(device).unsqueeze(-1)
    probabilities = torch.softmax(logits.double() / divisors, dim=-1)
    cut = ((top_p < 1.0) & is_drawn).nonzero().squeeze(-1)
    if len(cut):
        at = cut.to(device)
        probabilities[at] = _nucleus(probabilities[at], top_p[cut].to(device))
    cumulative = probabilities.cumsum(-1)
    goals = (draws.to(device) * cumulative[:, -1]).unsqueeze(-1)
    drawn = torch.searchsorted(cumulative, goals, right=True).squeeze(-1)
    return torch.where(is_drawn.to(device), drawn.clamp(max=logits.shape[-1] - 1), likeliest)


def _nucleus(
    probabilities: Float[Tensor, "rows vocab"], top_p: Float[Tensor, " rows"]
) -> Float[Tensor, "rows vocab"]:
    ordered, order = probabilities.sort(dim=-1, descending=True)
    # A token stays if the mass before it is below top_p, so the first one always stays.
    outside = ordered.cumsum(-1) - ordered >= top_p.unsqueeze(-1)
    return torch.zeros_like(probabilities).scatter(-1, order, ordered.masked_fill(outside, 0.0))
