"""The settings of an endpoint, and its application on Ray Serve.

An endpoint serves a run's point or a checkpoint. A checkpoint whose export was not checked is
refused.
"""

from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator
from ray import serve
from ray.serve.config import BackpressureConfig

from actors import engine as engines
from actors.engine import EngineSettings, Kind
from actors.gateway import METRICS, GatewayReplica, GatewaySettings, environment
from azeotrope import models
from azeotrope.config import Config, ConfigError
from azeotrope.defenses import base as defenses
from azeotrope.tasks import PocketConfig
from experiment.points import Point, find_point
from gateway.accounts.stores import StoreLocation, default_store, open_keys
from gateway.loopback import is_loopback
from gateway.plan import MOST_COMPLETIONS
from gateway.policy import Policy

APP = "azeotrope"
DRAIN_S = 10.0
"""Seconds that a stopping replica has beyond the longest permitted answer."""
DRAIN_POLL_S = 0.5
SPARE_REQUESTS = 64
"""Requests that Serve admits beyond the gateway's own limit, so that the gateway refuses them: its
refusals have the shape that clients understand."""
REPLICA_ENV = {
    "HF_HUB_OFFLINE": "1",
    # One event loop instead of three: our code never blocks it, and handing every token from thread
    # to thread doubles the cost of serving it.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
}
LOGGING = {"enable_access_log": False}
"""Serve's logging. The gateway's audit log records requests; two more lines per request would cost
time."""


class Replicas(Config):
    """How many copies run; Serve scales between the two numbers with the load."""

    least: int = Field(default=1, ge=1)
    most: int | None = Field(default=None, ge=1, description="null always runs `least` copies")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.most is not None and self.most < self.least:
            raise ValueError(f"most ({self.most}) is less than least ({self.least})")
        return self


class ServeConfig(Config):
    """Everything about one endpoint."""

    source: str = Field(description="folder of a run or of a checkpoint, or pocket/NAME")
    defense: str | None = Field(default=None, description="name of the point, if a run has several")
    name: str | None = Field(
        default=None,
        description="the model's name for clients; null takes the last part of the source",
    )
    engine: Kind = "auto"
    decoding: tuple[dict[str, Any], ...] | None = Field(
        default=None, description="decoding-stage defenses; null takes the point's"
    )
    undefended: str | None = Field(
        default=None,
        description="`teacher` (the point's) or a checkpoint for keys with a distillation licence; "
        "null serves no undefended model",
    )
    demo: bool = Field(
        default=False, description="show the undefended teacher on the page; loopback only"
    )
    report: bool = Field(
        default=False,
        description="link the run's report on the page for all visitors; it quotes undefended "
        "traces, so that without this setting only a demonstration links it",
    )
    rows: int = Field(
        default=32, ge=1, description="completions that an engine computes in one batch"
    )
    context: int | None = Field(
        default=None,
        ge=2,
        description="tokens of prompt and completion; null takes the model's limit",
    )
    engines: Replicas = Field(default_factory=Replicas)
    gateways: Replicas = Field(default_factory=lambda: Replicas(least=1, most=2))
    gpus: float = Field(default=0.0, ge=0, description="GPUs per engine")
    cpus: float = Field(
        default=0.5, gt=0, description="CPUs per engine; only for Ray's book-keeping"
    )
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    store: str | None = Field(default=None, description="folder of keys, quotas and logs")
    redis: str | None = Field(
        default=None,
        description="URL of a Redis for keys and quotas, needed on several nodes",
    )
    policy: Policy = Field(default_factory=Policy)

    @model_validator(mode="after")
    def _guarded(self) -> Self:
        if self.demo and not is_loopback(self.host):
            raise ValueError(
                f"demo shows the undefended teacher without a key, so host must be a loopback "
                f"address, got {self.host}"
            )
        for part in self.decoding or ():
            if defenses.resolve(dict(part)).stage != "decoding":
                raise ValueError(f"{part['name']} is no defense of stage decoding")
        return self

    @property
    def folder(self) -> Path:
        """The folder of keys, quotas and logs."""
        return (Path(self.store) if self.store else default_store()).expanduser().resolve()

    @property
    def stores(self) -> StoreLocation:
        return StoreLocation(self.folder, self.redis)

    @property
    def called(self) -> str:
        """The model's name for clients."""
        return self.name or Path(self.source).name or "azeotrope"


def build(args: ServeConfig) -> serve.Application:
    """The Serve application of a configuration: what `serve run` and `serve deploy` call.

    Raises:
        ConfigError: if the point cannot be served.
        StoreError: if the stores cannot be opened.
    """
    app = application(args)
    _open_stores(args)
    return app


def application(args: ServeConfig) -> serve.Application:
    """The application without opening the stores, for a machine that only writes the file.

    Raises:
        ConfigError: if the point cannot be served.
    """
    point = find_point(args.source, args.defense)
    decoding = point.decoding if args.decoding is None else args.decoding
    _check_defenses(decoding)
    clean = _undefended(args, point)
    _check_context(args.context, point.checkpoint)
    settings = EngineSettings(
        checkpoint=point.checkpoint,
        kind=engines.chosen(args.engine),
        decoding=decoding,
        rows=args.rows,
        # Two full batches may wait. In a longer queue, clients would time out.
        queue=2 * args.rows,
        context=args.context,
    )
    served = engines.deployment(settings, "Defended", _engine_options(args))
    licensed = None
    if clean is not None:
        undefended = settings.model_copy(update={"checkpoint": clean, "decoding": ()})
        licensed = engines.deployment(undefended, "Undefended", _engine_options(args))
    gateway = GatewaySettings(
        name=args.called,
        tokenizer=point.checkpoint,
        context=args.context,
        boundary=point.boundary,
        rewriting=point.rewriting,
        policy=args.policy,
        store=str(args.folder),
        redis=args.redis,
        demo=args.demo,
        task=point.task or (PocketConfig() if _is_pocket(point.checkpoint) else None),
        report=point.report if args.demo or args.report else None,
    )
    return (
        serve.deployment(GatewayReplica)
        .options(name="Gateway", **_gateway_options(args))  # type: ignore[attr-defined]
        .bind(gateway.dump(), served, licensed)
    )


def _engine_options(args: ServeConfig) -> dict[str, Any]:
    return {
        # A full batch and its queue; further requests are refused at once.
        "max_ongoing_requests": 3 * args.rows,
        # Per gateway, while replicas are being replaced.
        # All completions of a request are sent at once, before any is assigned to a replica.
        "max_queued_requests": max(args.rows, 2 * MOST_COMPLETIONS),
        "autoscaling_config": {
            "min_replicas": args.engines.least,
            "initial_replicas": args.engines.least,
            "max_replicas": args.engines.most or args.engines.least,
            # Scaling starts before the batch is full, because a new copy takes a while to load.
            "target_ongoing_requests": max(1.0, 0.75 * args.rows),
            "upscale_delay_s": 10.0,
            # Loading weights is expensive, and traffic comes in waves of minutes.
            "downscale_delay_s": 300.0,
        },
        # A step of a large batch can block a healthy engine for seconds.
        "health_check_period_s": 5.0,
        "health_check_timeout_s": 60.0,
        # Started answers may finish.
        "graceful_shutdown_timeout_s": args.policy.timeout_s + DRAIN_S,
        "graceful_shutdown_wait_loop_s": DRAIN_POLL_S,
        "logging_config": LOGGING,
        "ray_actor_options": {
            "num_cpus": args.cpus,
            "num_gpus": args.gpus,
            "runtime_env": {"env_vars": REPLICA_ENV},
        },
    }


def _gateway_options(args: ServeConfig) -> dict[str, Any]:
    in_flight = args.policy.in_flight
    return {
        "max_ongoing_requests": in_flight + SPARE_REQUESTS,
        "max_queued_requests": SPARE_REQUESTS,
        "backpressure_config": BackpressureConfig(status_code=503, retry_after_s=1.0),
        "autoscaling_config": {
            "min_replicas": args.gateways.least,
            "initial_replicas": args.gateways.least,
            "max_replicas": args.gateways.most or args.gateways.least,
            "target_ongoing_requests": max(1.0, in_flight / 2),
            "upscale_delay_s": 5.0,
            "downscale_delay_s": 120.0,
        },
        "health_check_period_s": 5.0,
        "health_check_timeout_s": 30.0,
        "graceful_shutdown_timeout_s": args.policy.timeout_s + DRAIN_S,
        "graceful_shutdown_wait_loop_s": DRAIN_POLL_S,
        "logging_config": LOGGING,
        "user_config": args.policy.dump(),
        # A gateway waits most of its time.
        "ray_actor_options": {
            "num_cpus": 0.1,
            "runtime_env": {"env_vars": REPLICA_ENV | environment(metrics_folder(args))},
        },
    }


def _undefended(args: ServeConfig, point: Point) -> str | None:
    """The undefended checkpoint to serve beside the defended one."""
    checkpoint = args.undefended or ("teacher" if args.demo else None)
    if checkpoint is None:
        return None
    if checkpoint == "teacher":
        if point.teacher is None:
            raise ConfigError(
                f"{args.source} does not say which undefended teacher it came from; "
                "name a checkpoint with undefended=PATH"
            )
        checkpoint = point.teacher
    try:
        return models.resolve(checkpoint)
    except FileNotFoundError as error:
        raise ConfigError(f"undefended: {error}") from None


def _check_context(context: int | None, checkpoint: str) -> None:
    longest = models.context_length(checkpoint)
    if context is not None and context > longest:
        raise ConfigError(
            f"context {context} is longer than that of {checkpoint}, {longest} tokens; lower it, "
            "or leave it out to take the model's"
        )


def _check_defenses(decoding: tuple[dict[str, Any], ...]) -> None:
    """Refuse a secret that is printed in the documentation, because it protects nothing."""
    for part in decoding:
        defense = defenses.resolve(dict(part))
        if defense.uses_public_key:
            raise ConfigError(
                f"defense {part['name']} has the public key of the documentation; "
                "give it a key of your own (key=...)"
            )


def _is_pocket(checkpoint: str) -> bool:
    return Path(checkpoint).parent == models.POCKET


def _open_stores(args: ServeConfig) -> None:
    """Create the stores if they do not exist, because replicas refuse to start without them."""
    open_keys(args.stores)


def metrics_folder(config: ServeConfig) -> Path:
    """The folder in which the processes of one endpoint count; endpoints differ by port."""
    return config.folder / METRICS / str(config.port)


def deploy_file(config: ServeConfig) -> dict[str, Any]:
    """The file that `serve deploy` reads. Ray's own `serve build` would bind to every address.

    The policy occurs twice. A change in the arguments restarts every replica; a change in
    `user_config` reaches the gateways while they run.
    """
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": config.host, "port": config.port},
        "logging_config": LOGGING,
        "applications": [
            {
                "name": APP,
                "route_prefix": "/",
                "import_path": "workflows.serve:build",
                "args": config.dump(),
                "deployments": [{"name": "Gateway", "user_config": config.policy.dump()}],
            }
        ],
    }
