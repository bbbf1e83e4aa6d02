"""Decoding defenses inside vLLM, for both generations of its logits processors.

vLLM has two model runners, and each refuses the other's processors: `V1Processor` is for the first
(CPUs, and GPUs without Triton), `V2Processor` for the second (GPUs). Which one runs is only known
from vLLM's finished configuration; `processor_for` looks there.

What is configured comes in vLLM's `additional_config`, what belongs to one request in its
`extra_args`, which the engine adapter alone writes. Both processors act before temperature and
nucleus, and last of all processors, so whatever is banned stays banned.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.v1.sample import logits_processor as v1  # pyright: ignore[reportMissingImports]
from vllm.v1.sample.logits_processor.builtin import (  # pyright: ignore[reportMissingImports]
    process_dict_updates,
)
from vllm.v1.worker.gpu.sample import (  # pyright: ignore[reportMissingImports]
    logits_processor as v2,
)

from azeotrope.defenses.base import Defense
from azeotrope.engine.variants import DefenseVariants

CONFIGURED = "azeotrope_decoding"
"""In `additional_config`: plain configurations of decoding defenses, in the order they act."""
STRENGTH, KEY, BANNED = "azeotrope_strength", "azeotrope_watermark_key", "azeotrope_banned"
"""In `extra_args`: what a request has of its own."""


@dataclass(frozen=True)
class Row:
    """What happens to one completion's logits."""

    defenses: tuple[Defense, ...]
    banned: tuple[int, ...]
    written: list[int]
    """The completion so far; the same list from the first step to the last."""


def processor_for(config: Any) -> str:
    """The processor that vLLM's model runner will take, as vLLM names classes.

    Args:
        config: a finished `VllmConfig`.

    Raises:
        ValueError: if vLLM would draft several tokens at once, whose prefixes are not known yet.
    """
    if config.speculative_config is not None:
        raise ValueError(
            "decoding defenses need one token at a time; serve without speculative decoding"
        )
    kind = V2Processor if config.use_v2_model_runner else V1Processor
    return f"{kind.__module__}:{kind.__qualname__}"


def check_params(params: Any) -> None:
    """Refuse what would show the undefended model, or comes from elsewhere than the adapter.

    Raises:
        ValueError: which vLLM turns into a refusal of this one request.
    """
    for name in ("prompt_logprobs", "prompt_logprob_token_ids", "logprob_token_ids"):
        if getattr(params, name, None) is not None:
            raise ValueError(f"{name} is not served: it is not of the defended distribution")
    unknown = set(params.extra_args or ()) - {STRENGTH, KEY, BANNED}
    if unknown:
        raise ValueError(
            f"unknown extra_args {', '.join(sorted(unknown))}; the engine adapter alone sets them"
        )


def _variants(config: Any) -> DefenseVariants:
    return DefenseVariants(config.additional_config.get(CONFIGURED, ()))


def _row(variants: DefenseVariants, params: Any, written: list[int]) -> Row | None:
    """None where nothing is done to the logits."""
    asked = params.extra_args or {}
    defenses = variants.kept(asked.get(STRENGTH), asked.get(KEY))
    banned = tuple(asked.get(BANNED, ()))
    return Row(defenses, banned, written) if defenses or banned else None


def defend(logits: Tensor, rows: Mapping[int, Row]) -> Tensor:
    """Change the rows of [rows, vocab] logits in place; those not in `rows` stay as they are."""
    groups: dict[tuple[Defense, ...], list[int]] = {}
    for index, row in rows.items():
        if row.defenses:
            groups.setdefault(row.defenses, []).append(index)
    for defenses, indices in groups.items():
        at = torch.tensor(indices, device=logits.device)
        adjusted = logits[at]
        for defense in defenses:
            adjusted = defense.adjust_logits(adjusted, [rows[index].written for index in indices])
        logits[at] = adjusted
    for index, row in rows.items():
        if row.banned:
            logits[index, torch.tensor(row.banned, device=logits.device)] = -torch.inf
    return logits


class V1Processor(v1.LogitsProcessor):
    """For the first model runner, which tells where each request's row is and shares its tokens.

    Rows whose prompt is still being read in parts are adjusted too; vLLM drops what comes of it.
    """

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        check_params(sampling_params)

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._variants = _variants(vllm_config)
        self._rows: dict[int, Row] = {}

    def is_argmax_invariant(self) -> bool:
        # Otherwise greedy rows would be written undefended.
        return False

    def update_state(self, batch_update: Any) -> None:
        process_dict_updates(
            self._rows,
            batch_update,
            lambda params, _, written: _row(self._variants, params, written),
        )

    def apply(self, logits: Tensor) -> Tensor:
        return defend(logits, self._rows)


class V2Processor(v2.LogitsProcessor):
    """For the second model runner, whose rows change places in every step and have fixed slots.

    Tokens are kept on the device there; what was written since the last step is fetched in one
    piece. A request that was preempted comes back as a new one with a longer beginning.
    """

    defended: Tensor | None = None
    """The logits as this processor left them, if a row of the step shows log-probabilities; the
    worker's sampler takes them from here."""

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        check_params(sampling_params)

    def __init__(self, vllm_config: Any, req_states: Any) -> None:
        self._variants = _variants(vllm_config)
        self._states = req_states
        self._rows: dict[int, Row] = {}
        self._showing: set[int] = set()

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        # Slots are used again, and nobody says when one is left.
        self._rows.pop(req_idx, None)
        self._showing.discard(req_idx)
        row = _row(self._variants, sampling_params, [])
        if row is not None:
            self._rows[req_idx] = row
        if sampling_params.logprobs is not None:
            self._showing.add(req_idx)
        return row is not None or sampling_params.logprobs is not None

    def apply(self, logits: Tensor, ctx: Any) -> Tensor:
        # Without speculation there is one row of logits for each request, in the same order.
        slots = ctx.idx_mapping_np.tolist()
        rows = {at: self._rows[slot] for at, slot in enumerate(slots) if slot in self._rows}
        self._catch_up(rows, slots, ctx.seq_lens_upper_bound_np.tolist())
        defend(logits, rows)
        self.defended = logits.clone() if self._showing.intersection(slots) else None
        return logits

    def _catch_up(
        self, rows: Mapping[int, Row], slots: Sequence[int], lengths: Sequence[int]
    ) -> None:
        """Append to each completion what the device has and the list has not."""
        behind = [
            (at, slots[at], place)
            for at, row in rows.items()
            if row.defenses
            # Nothing while the prompt is still being read in parts.
            for place in range(
                int(self._states.prompt_len.np[slots[at]]) + len(row.written), lengths[at]
            )
        ]
        if not behind:
            return
        device = self._states.all_token_ids.gpu.device
        _, owners, places = torch.tensor(behind, device=device).unbind(1)
        tokens = self._states.all_token_ids.gpu[owners, places].tolist()
        for (at, _, _), token in zip(behind, tokens, strict=True):
            rows[at].written.append(token)
