"""Decoding defenses inside vLLM, for both generations of its logits processors.

vLLM has two model runners, and each refuses the other one's processors: `V1Processor` is for the
first (CPUs, and GPUs without Triton), `V2Processor` for the second (GPUs). Only vLLM's finished
configuration says which one runs; `processor_for` reads it there.

The configured defenses come in vLLM's `additional_config`. Settings of a single request come in its
`extra_args`, which only the engine adapter writes. Both processors act before temperature and
nucleus and after all other processors, so banned tokens stay banned.
"""

from collections.abc import Sequence
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

from azeotrope.decoding import DecodingRow, DecodingSession
from azeotrope.engine.variants import DefenseVariants

CONFIGURED = "azeotrope_decoding"
"""In `additional_config`: plain configurations of decoding defenses, in the order they act."""
STRENGTH, KEY, BANNED = "azeotrope_strength", "azeotrope_watermark_key", "azeotrope_banned"
"""In `extra_args`: settings of a single request."""


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
    """Refuse parameters that would show the undefended model, or that the adapter did not write.

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


class _RowMaker:
    """Makes rows out of vLLM's requests."""

    def __init__(self, config: Any) -> None:
        self._variants = DefenseVariants(config.additional_config.get(CONFIGURED, ()))

    def row(self, params: Any, prompt: Sequence[int], written: list[int]) -> DecodingRow | None:
        """The row of a request; None if nothing changes its logits."""
        extra = params.extra_args or {}
        defenses = self._variants.cached(extra.get(STRENGTH), extra.get(KEY))
        banned = tuple(extra.get(BANNED, ()))
        if not defenses and not banned:
            return None
        temperature = float(params.temperature)
        return DecodingRow(tuple(prompt), defenses, banned, written, temperature)


class V1Processor(v1.LogitsProcessor):
    """For the first model runner, which reports where each request's row is and shares its tokens.

    Rows whose prompt is still being read in parts are adjusted too; vLLM drops the result.
    """

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        check_params(sampling_params)

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._maker, self._session = _RowMaker(vllm_config), DecodingSession()
        self._rows: dict[int, DecodingRow] = {}

    def is_argmax_invariant(self) -> bool:
        # Otherwise greedy rows would be written undefended.
        return False

    def update_state(self, batch_update: Any) -> None:
        """Follow the rows of the batch.

        A request that is not scheduled in a step leaves the batch, and comes back later as a new
        row with the same completion. A new row may take the index of one that left, which is then
        not among the removed ones; so the rows before and after are compared.
        """
        before = set(self._rows.values())
        process_dict_updates(
            self._rows,
            batch_update,
            # No prompt: vLLM was given embeddings in place of token ids, which we never send.
            lambda params, prompt, written: self._maker.row(params, prompt or (), written),
        )
        after = set(self._rows.values())
        self._session.drop(before - after)
        self._session.add(row for row in self._rows.values() if row not in before)

    def apply(self, logits: Tensor) -> Tensor:
        return self._session.adjust(logits, self._rows)


class V2Processor(v2.LogitsProcessor):
    """For the second model runner, whose requests have fixed slots and a new order in every step.

    This runner keeps tokens on the device. The tokens that were written since the last step are
    fetched in one copy. A preempted request comes back as a new one with a longer beginning.
    """

    defended: Tensor | None = None
    """The logits as this processor left them, if a row of the step reports log-probabilities; the
    worker's sampler takes them from here."""

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        check_params(sampling_params)

    def __init__(self, vllm_config: Any, req_states: Any) -> None:
        self._maker, self._session = _RowMaker(vllm_config), DecodingSession()
        self._states = req_states
        self._rows: dict[int, DecodingRow] = {}
        self._fresh: dict[int, DecodingRow] = {}
        """Rows by slot whose prompt vLLM has not written to the device yet."""
        self._reporting: set[int] = set()

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        # vLLM itself does not report freed slots to processors; the worker makes it do so. A row
        # must not inherit the tokens of the one before it if that report is ever missing.
        self.remove_request(req_idx)
        row = self._maker.row(sampling_params, (), [])
        if row is not None:
            self._fresh[req_idx] = row
        if sampling_params.logprobs is not None:
            self._reporting.add(req_idx)
        return row is not None or sampling_params.logprobs is not None

    def remove_request(self, req_idx: int) -> None:
        """Forget the request of a slot: it finished, or was cancelled or preempted."""
        self._fresh.pop(req_idx, None)
        self._reporting.discard(req_idx)
        if (row := self._rows.pop(req_idx, None)) is not None:
            self._session.drop([row])

    def apply(self, logits: Tensor, ctx: Any) -> Tensor:
        self._open_fresh()
        # Without speculation there is one row of logits for each request, in the same order.
        slots = ctx.idx_mapping_np.tolist()
        self._catch_up(slots, ctx.seq_lens_upper_bound_np.tolist())
        rows = {index: self._rows[slot] for index, slot in enumerate(slots) if slot in self._rows}
        logits = self._session.adjust(logits, rows)
        self.defended = logits.clone() if self._reporting.intersection(slots) else None
        return logits

    def _open_fresh(self) -> None:
        for slot, row in self._fresh.items():
            if row.hooks:
                length = int(self._states.prompt_len.np[slot])
                row.prompt = tuple(self._states.all_token_ids.gpu[slot, :length].tolist())
        self._rows.update(self._fresh)
        self._session.add(self._fresh.values())
        self._fresh.clear()

    def _catch_up(self, slots: Sequence[int], lengths: Sequence[int]) -> None:
        """Append to each completion the tokens that only the device has.

        Args:
            lengths: tokens of each slot's request that this step has read or reads.
        """
        missing: list[tuple[int, int]] = []
        for slot, length in zip(slots, lengths, strict=True):
            row = self._rows.get(slot)
            if row is not None and row.hooks:
                # Empty while the prompt is still being read in parts.
                positions = range(len(row.prompt) + len(row.written), length)
                missing += [(slot, position) for position in positions]
        if not missing:
            return
        on_device = self._states.all_token_ids.gpu
        owners, columns = torch.tensor(missing, device=on_device.device).unbind(1)
        tokens = on_device[owners, columns].tolist()
        for (slot, _), token in zip(missing, tokens, strict=True):
            self._rows[slot].written.append(token)
