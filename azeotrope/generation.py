"""Batched sampling with a key-value cache: the reference that every engine is compared with.

Each row has random numbers of its own, drawn from its seed, so what a row samples does not
depend on the rows beside it.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from azeotrope.config import Config
from azeotrope.decoding import DecodingHooks, DecodingRow, DecodingSession
from azeotrope.row_cache import PaddedRows, check_leaving, next_logits


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
    """Token ids written after one prompt, with the token that ended it if the row wrote one."""

    ids: tuple[int, ...]
    finished: bool


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    end_ids: Collection[int],
    pad_id: int,
    seeds: Sequence[int] | None = None,
    hooks: Sequence[DecodingHooks] = (),
) -> list[Completion]:
    """Complete every prompt, all rows in one batch; finished rows leave the batch.

    Args:
        end_ids: tokens that end a row; see `endings.end_ids`.
        seeds: one integer per row; needed when temperature > 0.
        hooks: decoding defenses for example; they change the logits before the temperature does.

    Returns:
        One completion per prompt, in order.

    Raises:
        ValueError: if a prompt is empty, if seeds are missing, if the model keeps states that
            cannot leave a batch, if prompt and completion together
            do not fit the model's context, or if logits are not finite numbers.
    """
    _check(model, prompts, sampling, seeds)
    if len(prompts) == 0:
        return []
    rows = [
        DecodingRow(tuple(prompt), tuple(hooks), temperature=sampling.temperature)
        for prompt in prompts
    ]
    session = DecodingSession()
    session.add(rows)
    try:
        _write(model, rows, session, sampling, _Draws(seeds, len(rows), sampling), end_ids, pad_id)
    finally:
        session.close()
    return [Completion(tuple(row.written), row.written[-1] in end_ids) for row in rows]


class _Draws:
    """What `choose` needs of each row: temperatures, nuclei and a random number per token."""

    def __init__(self, seeds: Sequence[int] | None, rows: int, sampling: Sampling) -> None:
        self._temperatures = torch.full((rows,), sampling.temperature, dtype=torch.float64)
        self._top_p = torch.full((rows,), sampling.top_p, dtype=torch.float64)
        if sampling.temperature == 0:
            self._uniforms = torch.zeros(rows, sampling.max_new_tokens, dtype=torch.float64)
        else:
            drawn = [uniforms(seed, sampling.max_new_tokens) for seed in seeds or ()]
            self._uniforms = torch.stack(drawn)

    def choose(
        self, logits: Float[Tensor, "rows vocab"], rows: Sequence[int], step: int
    ) -> list[int]:
        """The token that each of these rows writes in this step."""
        index = list(rows)
        draws = self._uniforms[index, step]
        return choose(logits, self._temperatures[index], self._top_p[index], draws).tolist()


def _write(
    model: PreTrainedModel,
    rows: Sequence[DecodingRow],
    session: DecodingSession,
    sampling: Sampling,
    draws: _Draws,
    end_ids: Collection[int],
    pad_id: int,
) -> None:
    """Fill the rows until each has written an end token or all that it may."""
    batch = PaddedRows(model, [row.prompt for row in rows], pad_id)
    active = list(range(len(rows)))
    for step in range(sampling.max_new_tokens):
        logits = next_logits(model, batch.inputs())
        logits = session.adjust(logits, {place: rows[row] for place, row in enumerate(active)})
        # The greatest is NaN if any is; `argmax` would silently write the token of the first NaN.
        if not logits.max(-1).values.isfinite().all():
            raise ValueError(
                f"token {step} of a row has no distribution: its logits hold NaN or infinity, or "
                "leave no token; look at the model's weights and its decoding defenses"
            )
        tokens = draws.choose(logits, active, step)
        for row, token in zip(active, tokens, strict=True):
            rows[row].written.append(token)
        kept = [place for place, token in enumerate(tokens) if token not in end_ids]
        session.drop(rows[row] for row in active if rows[row].written[-1] in end_ids)
        if not kept:
            return
        if len(kept) < len(active):
            batch.keep(kept)
            active = [active[place] for place in kept]
        batch.append([rows[row].written[-1] for row in active])


def _check(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    seeds: Sequence[int] | None,
) -> None:
    if sampling.temperature > 0 and (seeds is None or len(seeds) != len(prompts)):
        count = "none" if seeds is None else str(len(seeds))
        raise ValueError(f"sampling needs one seed per prompt, got {count} for {len(prompts)}")
    check_leaving(model)
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
    """The greatest number of positions that the model was made for.

    A model whose configuration gives none has no limit, which a large number stands for.
    """
    return int(getattr(model.config, "max_position_embeddings", 1 << 30))


def uniforms(seed: int, count: int) -> Float[Tensor, " steps"]:
    """The random numbers of one row in [0, 1), one for each token that it may write."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, dtype=torch.float64, generator=generator)


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
        draws: uniform in [0, 1), in float64; ignored where the temperature is 0.
    """
    likeliest = logits.argmax(-1)
    is_drawn = temperatures > 0
    if not is_drawn.any():
        return likeliest
    device = logits.device
    # Greedy rows divide by 1 instead of 0; the token that they draw is not used.
    divisors = temperatures.where(is_drawn, 1.0).to(device).unsqueeze(-1)
    probabilities = torch.softmax(logits.double() / divisors, dim=-1)
    truncated = ((top_p < 1.0) & is_drawn).nonzero().squeeze(-1)
    if len(truncated):
        at = truncated.to(device)
        probabilities[at] = _nucleus(probabilities[at], top_p[truncated].to(device))
    # Inverse of the cumulative distribution. A nucleus is not renormalised: the draw is scaled to
    # its mass instead. `right=True` passes over tokens of probability 0.
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
