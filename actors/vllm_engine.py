"""The engine protocol around vLLM's asynchronous engine, which computes in a process of its own.

vLLM gets token ids and gives token ids: its tokenizer, its HTTP server and its request fields are
not used, so nothing of a client's request reaches it but what the gateway decided.
"""

import math
import os
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

import psutil
import torch
from transformers import AutoConfig

from azeotrope import models
from azeotrope.endings import end_ids
from azeotrope.engine.protocol import (
    Chunk,
    Engine,
    EngineBusyError,
    EngineError,
    EngineRequest,
    Token,
    check_request,
)
from azeotrope.engine.variants import DefenseVariants
from gateway.policy import MOST_LOGPROBS

BLOCK = 128
"""Tokens of a piece of vLLM's cache on CPUs; each row's last piece is partly empty."""
_QUIET = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
_CPU = {
    "HF_HUB_OFFLINE": "1",
    # Otherwise the first request with log-probabilities compiles C++ for half a minute, and ends
    # the engine where there is no compiler.
    "TORCHDYNAMO_DISABLE": "1",
    # The engine's process does the work itself, and has no second one under it.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # OMP_NUM_THREADS decides, as for everything else; bound engines would share the same cores.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


class VllmEngine(Engine):
    """Continuous batching by vLLM, with decoding defenses as its logits processors.

    The same request with the same seed writes the same tokens, but sampled ones are not those of
    the transformers engine: random numbers are drawn in another way. Greedy ones are, up to
    rounding where two tokens are equally likely.

    Prompts of different watermark keys share no cache, so that no client can time whether another
    customer's prompt began like his own; a request without a key shares with none.
    """

    def __init__(
        self,
        checkpoint: str,
        *,
        decoding: Sequence[dict[str, Any]] = (),
        rows: int = 32,
        context: int | None = None,
        queue: int = 256,
    ) -> None:
        """
        Args:
            checkpoint: a folder, hub name or pocket/NAME.
            decoding: plain configurations of decoding-stage defenses, in the order they act.
            rows: completions that are written at once.
            context: tokens of prompt and completion together; None takes the model's.
            queue: requests that wait for a place; more are refused.

        Raises:
            ValueError: if rows or queue are below 1, or the context is longer than the model's.
            ConfigError: if a defense is not of stage `decoding` or does not fit.
            EngineError: if vLLM does not start.
        """
        if rows < 1 or queue < 1:
            raise ValueError(f"rows and queue must be at least 1, got rows={rows}, queue={queue}")
        place = models.resolve(checkpoint)
        self._variants = DefenseVariants(decoding)
        config = AutoConfig.from_pretrained(place).get_text_config()
        longest = int(config.max_position_embeddings)
        self._context = longest if context is None else context
        if not 2 <= self._context <= longest:
            raise ValueError(f"context must be from 2 to the model's {longest}, got {context}")
        self._vocabulary = int(config.vocab_size)
        self._ends = sorted(end_ids(models.load_tokenizer(checkpoint)))
        self._most, self._open = rows + queue, 0
        settings = {
            "model": place,
            "max_num_seqs": rows,
            "max_model_len": self._context,
            **_machine(config, rows, self._context),
        }
        self._engine: Any = _start(settings, decoding)

    @property
    def healthy(self) -> bool:
        """Whether requests are served; an engine that failed does not come back."""
        return self._engine is not None and not self._engine.errored

    def close(self) -> None:
        """End vLLM's process; requests that still wait get an `EngineError`."""
        if self._engine is not None:
            self._engine.shutdown()
            self._engine = None

    async def generate(self, request: EngineRequest) -> AsyncGenerator[Chunk]:
        """What the row wrote since the consumer last looked, in one chunk each time.

        Tokens of probability 0 are not among the likeliest ones shown.

        Raises:
            ValueError: before anything is queued, if the request does not fit the model.
            EngineBusyError: before the first chunk, if the queue is full.
            EngineError: if the engine failed or was closed.
        """
        from vllm.exceptions import VLLMClientError  # pyright: ignore[reportMissingImports]
        from vllm.inputs import tokens_input  # pyright: ignore[reportMissingImports]

        check_request(request, context=self._context, vocabulary=self._vocabulary)
        # Built here too, for a strength that a defense refuses would end vLLM's process.
        await self._variants.of(request.strength, request.watermark_key)
        if not self.healthy:
            raise EngineError("the engine has failed or was closed; send the request to another")
        if self._open >= self._most:
            raise EngineBusyError(
                f"{self._open} requests are under way, which is all that the engine takes; "
                "try again later"
            )
        self._open += 1
        try:
            prompt = tokens_input(
                list(request.prompt), cache_salt=request.watermark_key or request.id
            )
            stream = self._engine.generate(prompt, self._params(request), request.id)
            async with aclosing(stream):
                async for output in stream:
                    if (chunk := self._chunk(output.outputs[0], request)) is not None:
                        yield chunk
        except VLLMClientError as error:
            raise ValueError(str(error)) from error
        except EngineError:
            raise
        except Exception as error:
            raise EngineError(f"vLLM failed: {type(error).__name__}: {error}") from error
        finally:
            self._open -= 1

    def _params(self, request: EngineRequest) -> Any:
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports]
        from vllm.sampling_params import (  # pyright: ignore[reportMissingImports]
            RequestOutputKind,
        )

        from actors.vllm_logits import BANNED, KEY, STRENGTH

        own = {STRENGTH: request.strength, KEY: request.watermark_key, BANNED: request.banned}
        return SamplingParams(
            temperature=request.temperature,
            top_p=request.top_p,
            # vLLM takes -1 as none.
            seed=request.seed if request.seed >= 0 else request.seed + 2**63,
            max_tokens=min(request.max_tokens, self._context - len(request.prompt)),
            logprobs=request.logprobs,
            stop_token_ids=self._ends,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args={name: value for name, value in own.items() if value not in (None, ())},
        )

    def _chunk(self, output: Any, request: EngineRequest) -> Chunk | None:
        finish = output.finish_reason
        if finish not in (None, "stop", "length"):
            raise EngineError(f"vLLM ended the request with {finish!r}; it may be sent again")
        shown = output.logprobs or [None] * len(output.token_ids)
        tokens = tuple(
            _token(token, numbers, request.logprobs)
            for token, numbers in zip(output.token_ids, shown, strict=True)
            if token not in self._ends
        )
        return Chunk(tokens, finish) if tokens or finish else None


def _token(token: int, numbers: dict[int, Any] | None, most: int | None) -> Token:
    if numbers is None:
        return Token(token)
    logprobs = {id: float(number.logprob) for id, number in numbers.items()}
    if any(math.isnan(value) for value in logprobs.values()):
        raise EngineError(
            "a token has no distribution: its logits hold NaN; look at the model and its defenses"
        )
    finite = [(id, value) for id, value in logprobs.items() if value > -math.inf]
    likeliest = sorted(finite, key=lambda pair: -pair[1])[: most or 0]
    return Token(token, logprobs[token], tuple(likeliest))


def _machine(config: Any, rows: int, context: int) -> dict[str, Any]:
    """What depends on the machine; a GPU keeps vLLM's own choices."""
    if torch.cuda.is_available():
        return {"dtype": "auto"}
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    of_token = 2 * config.num_hidden_layers * heads * size * torch.float32.itemsize
    # A spare piece for each row, and one that vLLM keeps for itself.
    of_row = of_token * BLOCK * (-(-context // BLOCK) + 1)
    fair = psutil.virtual_memory().available // 4
    return {
        "dtype": "float32",
        "enforce_eager": True,
        "gpu_memory_utilization": 0.3,
        # Rows that find no room are put back and continue later.
        "kv_cache_memory_bytes": max(min(rows * of_row, fair), of_row) + of_token * BLOCK,
    }


def _start(settings: dict[str, Any], decoding: Sequence[dict[str, Any]]) -> Any:
    """vLLM's engine; it reads its environment when it is imported and when its process starts."""
    defaults = _QUIET if torch.cuda.is_available() else _QUIET | _CPU
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    from vllm.engine.arg_utils import AsyncEngineArgs  # pyright: ignore[reportMissingImports]
    from vllm.v1.engine.async_llm import AsyncLLM  # pyright: ignore[reportMissingImports]

    from actors.vllm_logits import CONFIGURED, processor_for

    try:
        config = AsyncEngineArgs(
            skip_tokenizer_init=True,
            # No defaults of sampling out of the checkpoint: the gateway has decided them.
            generation_config="vllm",
            logprobs_mode="processed_logprobs",
            max_logprobs=MOST_LOGPROBS,
            worker_cls="actors.vllm_worker.DefendedWorker",
            additional_config={CONFIGURED: [dict(one) for one in decoding]},
            **settings,
        ).create_engine_config()
        # Only now is it known which model runner will be taken.
        config.model_config.logits_processors = [processor_for(config)]
        return AsyncLLM.from_vllm_config(config, disable_log_stats=True)
    except Exception as error:
        raise EngineError(
            f"vLLM does not start with {settings['model']}: {type(error).__name__}: {error}"
        ) from error
