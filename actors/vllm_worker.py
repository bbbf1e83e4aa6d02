"""vLLM's workers with two changes: what log-probabilities are of, and when the process ends.

vLLM returns log-probabilities either from before every processor, which are the undefended
model's, or from after temperature and nucleus. The latter amplify: at temperature 0.01 they lie a
hundred times further apart, so that rounding them hides nothing. Both samplers get a `sample` that
returns what lies between.

vLLM's process would outlive a parent that was killed, and keep the memory.
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


class DefendedV1Sampler(V1Sampler):
    """Of the first model runner: it samples from logits that all processors have seen."""

    def sample(self, logits: Tensor, sampling_metadata: Any, *args: Any, **kwargs: Any) -> Any:
        wanted = sampling_metadata.max_num_logprobs is not None
        # First, for the temperature is applied in place.
        defended = self.compute_logprobs(logits) if wanted else None
        sampled, _ = super().sample(logits, sampling_metadata, *args, **kwargs)
        return sampled, defended


def show_defended(runner: Any, uses_v2: bool) -> None:
    """Replace a model runner's sampler.

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
        """Of the second model runner: processors and temperature are one function there, so the
        processor, which is the last one, keeps what it has seen."""

        def sample(self, *args: Any, **kwargs: Any) -> Any:
            processor = self.logits_processors[-1]
            processor.defended = None
            sampled, processed = super().sample(*args, **kwargs)
            defended, processor.defended = processor.defended, None
            return sampled, processed if defended is None else defended

    _expect(runner.sampler, V2Sampler)
    _expect(runner.sampler.logits_processors[-1], V2Processor)
    # It is made from a dozen of the runner's own settings, and only a method is another.
    runner.sampler.__class__ = DefendedV2Sampler


def _expect(found: Any, kind: type) -> None:
    if type(found) is not kind:
        raise TypeError(
            f"this vLLM uses {type(found).__name__} in place of {kind.__name__}, whose "
            "log-probabilities could be undefended; take a version that was tried"
        )


def end_with_parent() -> None:
    """End this process soon after its parent is gone."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_S)
        # Nobody is left to answer to, and other threads may wait for the parent for ever.
        os._exit(1)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()


class DefendedWorker(_Worker):
    def load_model(self, *args: Any, **kwargs: Any) -> None:
        end_with_parent()
        super().load_model(*args, **kwargs)
        show_defended(self.model_runner, self.use_v2_model_runner)
