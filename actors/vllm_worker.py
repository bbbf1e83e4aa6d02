"""vLLM's workers with three changes.

- Log-probabilities are those of the defended distribution. vLLM returns them either from before all
  processors, which are the undefended model's, or from after temperature and nucleus. The latter
  amplify differences: at temperature 0.01 they are a hundred times as large, so that rounding them
  hides nothing. Both samplers get a `sample` that returns the distribution in between.
- The second model runner reports freed slots to the processor of the defenses.
- The process ends with its parent. Otherwise it would outlive a parent that was killed and keep the
  memory.
"""

import os
import threading
import time
from typing import Any

from torch import Tensor
from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]
from vllm.v1.sample.sampler import Sampler as V1Sampler  # pyright: ignore[reportMissingImports]

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import (  # pyright: ignore[reportMissingImports]
        CPUWorker as _Worker,
    )
else:
    from vllm.v1.worker.gpu_worker import Worker as _Worker  # pyright: ignore[reportMissingImports]

POLL_S = 1.0
"""Time between two looks at the parent process."""


class DefendedV1Sampler(V1Sampler):
    """For the first model runner, which samples from logits that all processors have seen."""

    def sample(self, logits: Tensor, sampling_metadata: Any, *args: Any, **kwargs: Any) -> Any:
        needs_logprobs = sampling_metadata.max_num_logprobs is not None
        # Before sampling, because the temperature is applied in place.
        defended = self.compute_logprobs(logits) if needs_logprobs else None
        sampled, _ = super().sample(logits, sampling_metadata, *args, **kwargs)
        return sampled, defended


def show_defended(runner: Any, uses_v2: bool) -> None:
    """Replace a model runner's sampler, and let the second runner report freed slots.

    Raises:
        TypeError: if the sampler is not the one this was written for; vLLM then does not start.
    """
    if not uses_v2:
        _expect(runner.sampler, V1Sampler)
        runner.sampler = DefendedV1Sampler(
            runner.sampler.logprobs_mode, runner.sampler.use_fp64_gumbel
        )
        return
    # Its kernels need a GPU.
    from vllm.v1.worker.gpu.sample.sampler import (  # pyright: ignore[reportMissingImports]
        Sampler as V2Sampler,
    )

    from actors.vllm_logits import V2Processor

    class DefendedV2Sampler(V2Sampler):
        """For the second model runner, where one function applies processors and temperature.
        The processor of the defenses, which is the last one, keeps the logits that it returned."""

        def sample(self, *args: Any, **kwargs: Any) -> Any:
            processor = self.logits_processors[-1]
            processor.defended = None
            sampled, processed = super().sample(*args, **kwargs)
            defended, processor.defended = processor.defended, None
            return sampled, processed if defended is None else defended

    _expect(runner.sampler, V2Sampler)
    _expect(runner.sampler.logits_processors[-1], V2Processor)
    # A sampler is made from a dozen of the runner's settings; changing its class keeps them all.
    runner.sampler.__class__ = DefendedV2Sampler
    report_freed_slots(runner.req_states, runner.sampler.logits_processors[-1])


def report_freed_slots(states: Any, processor: Any) -> None:
    """Tell a processor about every request that leaves its slot, for whatever reason."""
    remove = states.remove_request

    def remove_and_report(request_id: str) -> int | None:
        slot = remove(request_id)
        if slot is not None:
            processor.remove_request(slot)
        return slot

    states.remove_request = remove_and_report


def _expect(part: Any, kind: type) -> None:
    if type(part) is not kind:
        raise TypeError(
            f"this vLLM uses {type(part).__name__} in place of {kind.__name__}, whose "
            "log-probabilities could be undefended; install the vLLM version that azeotrope was "
            "tested with"
        )


def end_with_parent() -> None:
    """End this process soon after its parent is gone."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_S)
        # Not `sys.exit`: other threads may wait for the parent for ever.
        os._exit(1)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()


class DefendedWorker(_Worker):
    """The worker that vLLM is told to use."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        end_with_parent()
        super().load_model(*args, **kwargs)
        show_defended(self.model_runner, self.use_v2_model_runner)
