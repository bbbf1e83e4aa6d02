"""Serve a defended teacher: start Ray and Serve, report the address, and stop gracefully.

    azeotrope keys create alice
    azeotrope serve runs/pocket_demo
    azeotrope serve pocket/teacher port=8001 engine=transformers

    serve run workflows.serve:build source=runs/pocket_demo
    azeotrope serve runs/pocket_demo --write serve.yaml
    serve deploy serve.yaml

The settings of an endpoint and its application are in `experiment/deployment.py`.
"""

import contextlib
import logging
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
import ray
import yaml
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import HTTPOptions
from ray.serve.exceptions import RayServeException
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from actors import session
from actors.resources import Resources
from azeotrope.config import ConfigError
from azeotrope.config import build as build_config
from azeotrope.config import load as load_config
from experiment.deployment import (
    APP,
    DRAIN_S,
    LOGGING,
    ServeConfig,
    application,
    build,
    deploy_file,
    metrics_folder,
)
from experiment.points import Point, find_point
from gateway.accounts.key_records import KeyRecord
from gateway.accounts.stores import open_keys
from gateway.loopback import is_loopback
from gateway.policy import Policy

READY_TIMEOUT_S = 300.0
POLL_S = 0.2


def main(
    source: str,
    overrides: list[str],
    policy: str | None = None,
    write: str | None = None,
    redis: str | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM.

    Args:
        policy: a YAML file of rules.
        write: write this file for `serve deploy` instead of serving.
        redis: the address of a Redis with keys and quotas; an override takes precedence.

    Raises:
        ConfigError: if the settings do not fit, or the endpoint cannot be started.
        StoreError: if the stores cannot be opened.
    """
    console = Console()
    data: dict[str, Any] = {"source": source}
    if policy is not None:
        data["policy"] = load_config(Policy, Path(policy)).dump()
    if redis is not None:
        data["redis"] = redis
    config = build_config(ServeConfig, data, overrides)
    if write is not None:
        # The same checks as below, but without the stores: those are on the machine that serves.
        application(config)
        _write(config, Path(write), console)
        return
    app = build(config)
    check_network(config)
    # Files of earlier processes would be added to the metrics of this one.
    shutil.rmtree(metrics_folder(config), ignore_errors=True)
    started = time.perf_counter()
    with _step(console, "starting Ray"):
        session.start(Resources(), offline=True)
    try:
        _check_dashboard()
        with _step(console, "starting Serve"):
            _start_serve(config)
        with _step(console, "loading the model"):
            _deploy(app)
            _wait_until_ready(config)
        stopped = _interrupts()
        point = find_point(config.source, config.defense)
        _announce(console, config, point, time.perf_counter() - started)
        stopped.wait()
        console.print("stopping: answers that have begun are finished first")
    finally:
        _drain(config.policy.timeout_s + DRAIN_S)
        session.stop()


def _write(config: ServeConfig, path: Path, console: Console) -> None:
    # The file may be deployed from another working directory and by another user, so paths are
    # absolute.
    paths = {"store": str(config.folder)}
    if Path(config.source).exists():
        paths["source"] = str(Path(config.source).resolve())
    file = deploy_file(config.model_copy(update=paths))
    path.write_text(yaml.safe_dump(file, sort_keys=False))
    console.print(f"wrote {path}; start it with: serve deploy {path}", soft_wrap=True)


def check_network(config: ServeConfig) -> None:
    """Check that the endpoint can listen on its address, and on this address only.

    Raises:
        ConfigError: if the port is taken, if the address does not belong to this machine, or if
            Serve's HAProxy mode would ignore a loopback `host`.
    """
    if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1" and is_loopback(config.host):
        raise ConfigError(
            "RAY_SERVE_ENABLE_HA_PROXY=1 binds to every address whatever `host` says; unset it, "
            "or set host to a public address"
        )
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((config.host, config.port))
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {config.host}:{config.port}: {error.strerror}; "
                "take another with port=NUMBER"
            ) from None


def _check_dashboard() -> None:
    context = ray.init(ignore_reinit_error=True, logging_level=logging.ERROR)
    check_dashboard(context.address_info.get("webui_url") or "")


def check_dashboard(url: str) -> None:
    """Refuse an open dashboard of Ray.

    Everyone who reaches it can run code on this machine, and so read the undefended teacher.

    Raises:
        ConfigError: if the dashboard listens on a public address and requires no token.
    """
    host = url.rpartition(":")[0].strip("[]")
    if host and not is_loopback(host) and os.environ.get("RAY_AUTH_MODE") != "token":
        raise ConfigError(
            f"Ray's dashboard listens on {host} without a token; set RAY_AUTH_MODE=token on every "
            "node, or start the head with --dashboard-host=127.0.0.1"
        )


@contextlib.contextmanager
def _step(console: Console, name: str) -> Iterator[None]:
    """Show a step with its time while it runs, and leave one line with the time it took."""
    started = time.perf_counter()
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        progress.add_task(name, total=None)
        yield
    console.print(f"{name}: {time.perf_counter() - started:.1f} s")


def _start_serve(config: ServeConfig) -> None:
    # Serve's own messages would repeat the steps that are on the console already.
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    serve.start(
        http_options=HTTPOptions(host=config.host, port=config.port),
        logging_config=LOGGING,
    )


def _deploy(app: serve.Application) -> None:
    try:
        serve.run(app, name=APP, route_prefix="/")
    except RuntimeError as error:
        # Serve's exception is general. The replica's own error is the last line in its status.
        status = serve.status().applications.get(APP)
        deployments = status.deployments.values() if status else ()
        messages = [text for deployment in deployments if (text := deployment.message.strip())]
        reason = messages[0].splitlines()[-1] if messages else str(error)
        raise ConfigError(f"the application does not start: {reason}") from error


def _wait_until_ready(config: ServeConfig) -> None:
    # An address that means "all interfaces" cannot be connected to on every system.
    host = config.host if config.host not in {"0.0.0.0", "::"} else "127.0.0.1"
    address = f"[{host}]" if ":" in host else host
    url = f"http://{address}:{config.port}/readyz"
    until = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < until:
        try:
            # A proxy of the environment would not reach this machine's loopback interface.
            if httpx.get(url, timeout=5, trust_env=False).is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(POLL_S)
    raise ConfigError(
        f"the endpoint was not ready after {READY_TIMEOUT_S:.0f} s; see the logs under "
        "/tmp/ray/session_latest/logs/serve"
    )


def _interrupts() -> threading.Event:
    """An event that the first SIGINT or SIGTERM sets; a second SIGINT ends the process at once.

    This must be called after the start: Ray replaces earlier handlers by its own. During the start
    Ray's handlers are right, because they give up.
    """
    stopped = threading.Event()

    def stop(_: int, __: FrameType | None) -> None:
        stopped.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    return stopped


def _announce(console: Console, config: ServeConfig, point: Point, seconds: float) -> None:
    url = f"http://{config.host}:{config.port}"
    defense = "an undefended checkpoint" if point.defense == "none" else point.defense
    console.print(
        f"[bold]{config.called}[/bold] ({defense}) is served at {url}/v1 after {seconds:.0f} s",
        soft_wrap=True,
    )
    keys = open_keys(config.stores, must_exist=True).list()
    if not keys:
        # The address is not repeated, because it may contain a password.
        option = " --redis URL" if config.redis else ""
        console.print(
            "there is no key yet; create one in another terminal: "
            f"azeotrope keys create NAME{option}",
            soft_wrap=True,
        )
    for key in unserved(keys, config.policy):
        console.print(
            f"key {key.id} is refused: the policy has no tier {key.tier!r}",
            style="yellow",
            markup=False,
            soft_wrap=True,
        )
    if config.demo:
        console.print(f"[bold red]DEMO: {url}/ shows the undefended teacher[/bold red]")
    if not is_loopback(config.host):
        console.print(
            "this address is public: put a proxy with TLS in front of it, see docs/serving.md"
        )


def unserved(keys: Sequence[KeyRecord], policy: Policy) -> list[KeyRecord]:
    """Active keys whose tier is not in the policy; gateways refuse them."""
    now = time.time()
    return [key for key in keys if key.is_active(now) and key.tier not in policy.tiers]


def _drain(within_s: float) -> None:
    """Accept no more requests and let replicas finish the answers that have begun.

    Serve's own shutdown would cut these off, because it ends its proxies first.
    """
    with contextlib.suppress(RayServeException, RayError):
        serve.delete(APP, _blocking=False)
        until = time.monotonic() + within_s
        while APP in serve.status().applications and time.monotonic() < until:
            time.sleep(POLL_S)
        # A local Ray ends together with Serve. In a cluster Serve is ended here, unless other
        # applications still use it.
        if os.environ.get("RAY_ADDRESS") and not serve.status().applications:
            serve.shutdown()
