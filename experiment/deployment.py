"""What is served: the settings of an endpoint, and its application on Ray Serve.

What is served is a run's point or a checkpoint; one whose export was not checked is refused.
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
from gateway.policy import Policy

APP = "azeotrope"
DRAIN_S = 10.0
"""After the longest answer that is allowed: then what still runs is cut off."""
DRAIN_POLL_S = 0.5
REPLICA_ENV = {
    "HF_HUB_OFFLINE": "1",
    # One event loop in place of three: none of ours is ever blocked, and a token that is handed
    # from thread to thread costs as much again.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
}
LOGGING = {"enable_access_log": False}
"""Of Serve: the gateway's audit log says who asked, and two lines a request would cost time."""


class Replicas(Config):
    """How many copies run; Serve moves between the two as requests come and go."""

    least: int = Field(default=1, ge=1)
    most: int | None = Field(default=None, ge=1, description="null runs `least` of them, always")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.most is not None and self.most < self.least:
            raise ValueError(f"most ({self.most}) is less than least ({self.least})")
        return self


class ServeConfig(Config):
    """Everything about one endpoint."""

    source: str = Field(description="the folder of a run or of a checkpoint, or pocket/NAME")
    defense: str | None = Field(default=None, description="which point, where a run has several")
    name: str | None = Field(
        default=None, description="of the model, for clients; null takes the source's last part"
    )
    engine: Kind = "auto"
    decoding: tuple[dict[str, Any], ...] | None = Field(
        default=None, description="decoding-stage defenses; null takes the point's"
    )
    undefended: str | None = Field(
        default=None,
        description="`teacher` (the point's) or a checkpoint that keys with a distillation licence "
        "may ask; null serves no undefended model at all",
    )
    demo: bool = Field(
        default=False, description="let the page show the undefended teacher; loopback only"
    )
    report: bool = Field(
        default=False,
        description="link the run's report on the page for everybody; it quotes undefended traces, "
        "so that without this only a demonstration shows it",
    )
    rows: int = Field(default=32, ge=1, description="completions an engine computes side by side")
    context: int | None = Field(default=None, ge=2, description="null takes the model's")
    engines: Replicas = Field(default_factory=Replicas)
    gateways: Replicas = Field(default_factory=lambda: Replicas(least=1, most=2))
    gpus: float = Field(default=0.0, ge=0, description="of each engine")
    cpus: float = Field(default=0.5, gt=0, description="of each engine; Ray's book-keeping only")
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    store: str | None = Field(default=None, description="folder of keys, quotas and logs")
    redis: str | None = Field(
        default=None,
        description="address of a Redis for keys and quotas, where there are several nodes",
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
        return (Path(self.store) if self.store else default_store()).expanduser().resolve()

    @property
    def stores(self) -> StoreLocation:
        return StoreLocation(self.folder, self.redis)

    @property
    def called(self) -> str:
        """The model's name, for clients."""
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
    """The same, where the stores are not: on a machine that only writes the file.

    Raises:
        ConfigError: if the point cannot be served.
    """
    point = find_point(args.source, args.defense)
    decoding = point.decoding if args.decoding is None else args.decoding
    _check_defenses(decoding)
    clean = _undefended(args, point)
    settings = EngineSettings(
        checkpoint=point.checkpoint,
        kind=engines.chosen(args.engine),
        decoding=decoding,
        rows=args.rows,
        # Twice a full batch may wait: longer queues only make clients time out.
        queue=2 * args.rows,
        context=args.context,
    )
    served = engines.deployment(settings, "Defended", _engine_options(args))
    licensed = None
    if clean is not None:
        other = settings.model_copy(update={"checkpoint": clean, "decoding": ()})
        licensed = engines.deployment(other, "Undefended", _engine_options(args))
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
        # A full batch and its queue; what is above that is refused and not kept waiting.
        "max_ongoing_requests": 3 * args.rows,
        # For each gateway, while replicas are being replaced.
        "max_queued_requests": args.rows,
        "autoscaling_config": {
            "min_replicas": args.engines.least,
            "initial_replicas": args.engines.least,
            "max_replicas": args.engines.most or args.engines.least,
            # Another copy before the batch is full: a new one needs a while to load.
            "target_ongoing_requests": max(1.0, 0.75 * args.rows),
            "upscale_delay_s": 10.0,
            # Loading weights is dear, and traffic comes in waves of minutes.
            "downscale_delay_s": 300.0,
        },
        # A step of a large batch can hold an engine for seconds; it is not dead then.
        "health_check_period_s": 5.0,
        "health_check_timeout_s": 60.0,
        # Every answer that was begun may be finished.
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
        # Above the gateway's own limit, whose refusals are in the shape that clients understand.
        "max_ongoing_requests": in_flight + 64,
        "max_queued_requests": 64,
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
        # Mostly waiting: it reads, counts and writes.
        "ray_actor_options": {
            "num_cpus": 0.1,
            "runtime_env": {"env_vars": REPLICA_ENV | environment(metrics_folder(args))},
        },
    }


def _undefended(args: ServeConfig, point: Point) -> str | None:
    wanted = args.undefended or ("teacher" if args.demo else None)
    if wanted is None:
        return None
    if wanted == "teacher":
        if point.teacher is None:
            raise ConfigError(
                f"{args.source} does not say which undefended teacher it came from; "
                "name a checkpoint with undefended=PATH"
            )
        wanted = point.teacher
    try:
        return models.resolve(wanted)
    except FileNotFoundError as error:
        raise ConfigError(f"undefended: {error}") from None


def _check_defenses(decoding: tuple[dict[str, Any], ...]) -> None:
    """A secret that is printed in the documentation protects nothing."""
    for part in decoding:
        defense = defenses.resolve(dict(part))
        if defense.uses_public_key:
            raise ConfigError(
                f"defense {part['name']} has the key that everybody knows; "
                "give it one of your own (key=...)"
            )


def _is_pocket(checkpoint: str) -> bool:
    return Path(checkpoint).parent == models.POCKET


def _open_stores(args: ServeConfig) -> None:
    """Have the stores, so that replicas find them: they refuse to start without."""
    open_keys(args.stores)


def metrics_folder(config: ServeConfig) -> Path:
    """What the processes of one endpoint count into; another endpoint has another port."""
    return config.folder / METRICS / str(config.port)


def deploy_file(config: ServeConfig) -> dict[str, Any]:
    """What `serve deploy` reads. Ray's own `serve build` would bind to every address.

    The policy is there twice. A change in the arguments makes every replica anew; one in
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
