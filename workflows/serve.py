"""Serve a defended teacher: start Ray and Serve, say what is served, and end without a cut.

    azeotrope keys create alice
    azeotrope serve runs/pocket_demo
    azeotrope serve pocket/teacher port=8001 engine=transformers

    serve run workflows.serve:build source=runs/pocket_demo
    azeotrope serve runs/pocket_demo --write serve.yaml
    serve deploy serve.yaml

What is served, and how, is in `experiment/deployment.py`.
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
    """Serve until somebody interrupts it.

    Args:
        policy: a YAML file of rules.
        write: a file to write for `serve deploy`, in place of serving.
        redis: where keys and quotas are, unless an override says otherwise.
    """
    console = Console()
    data: dict[str, Any] = {"source": source}
    if policy is not None:
        data["policy"] = load_config(Policy, Path(policy)).dump()
    if redis is not None:
        data["redis"] = redis
    config = build_config(ServeConfig, data, overrides)
    if write is not None:
        # Checked like the other, but the stores are those of the machine that will serve.
        application(config)
        _write(config, Path(write), console)
        return
    app = build(config)
    check_network(config)
    # Numbers of processes that are gone would be counted again.
    shutil.rmtree(metrics_folder(config), ignore_errors=True)
    started = time.perf_counter()
    with _step(console, "starting Ray"):
        session.start(Resources(), offline=True)
    try:
        _check_dashboard()
        with _step(console, "starting Serve"):
            _start_serve(config)
        with _step(console, "loading the model"):
            _run(app)
            _wait_until_ready(config)
        stopped = _interrupts()
        point = find_point(config.source, config.defense)
        _announce(console, config, point, time.perf_counter() - started)
        stopped.wait()
        console.print("stopping: answers that were begun are finished")
    finally:
        _drain(config.policy.timeout_s + DRAIN_S)
        session.stop()


@contextlib.contextmanager
def _step(console: Console, what: str) -> Iterator[None]:
    """Show what is being waited for and how long already; leave a line that says how long."""
    started = time.perf_counter()
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        progress.add_task(what, total=None)
        yield
    console.print(f"{what}: {time.perf_counter() - started:.1f} s")


def _interrupts() -> threading.Event:
    """Set by the first SIGINT or SIGTERM; a second SIGINT cuts off what is not finished.

    Only for the time after the start: Ray puts handlers of its own in the place of earlier ones,
    and until then those do what is wanted, which is to give up.
    """
    stopped = threading.Event()

    def stop(_: int, __: FrameType | None) -> None:
        stopped.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    return stopped


def _start_serve(config: ServeConfig) -> None:
    # It would say once more, in its own way, what is on the console already.
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    serve.start(
        http_options=HTTPOptions(host=config.host, port=config.port),
        logging_config=LOGGING,
    )


def _run(app: serve.Application) -> None:
    try:
        serve.run(app, name=APP, route_prefix="/")
    except RuntimeError as error:
        # Serve keeps the replica's own error in its status.
        known = serve.status().applications.get(APP)
        deployments = known.deployments.values() if known else ()
        said = [item.message.strip() for item in deployments if item.message.strip()]
        last = said[0].splitlines()[-1] if said else str(error)
        raise ConfigError(f"the application does not start: {last}") from error


def _wait_until_ready(config: ServeConfig) -> None:
    host = config.host if config.host not in {"0.0.0.0", "::"} else "127.0.0.1"
    address = f"[{host}]" if ":" in host else host
    url = f"http://{address}:{config.port}/readyz"
    until = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < until:
        try:
            if httpx.get(url, timeout=5, trust_env=False).is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(POLL_S)
    raise ConfigError(
        f"the endpoint was not ready after {READY_TIMEOUT_S:.0f} s; see the logs under "
        "/tmp/ray/session_latest/logs/serve"
    )


def _announce(console: Console, config: ServeConfig, point: Point, seconds: float) -> None:
    url = f"http://{config.host}:{config.port}"
    what = "an undefended checkpoint" if point.defense == "none" else point.defense
    console.print(
        f"[bold]{config.called}[/bold] ({what}) is served at {url}/v1 after {seconds:.0f} s",
        soft_wrap=True,
    )
    keys = open_keys(config.stores, must_exist=True).list()
    if not keys:
        # Without the address itself: there may be a password in it.
        where = " --redis URL" if config.redis else ""
        console.print(
            f"there is no key yet; in another terminal: azeotrope keys create NAME{where}"
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
        console.print("bound to a public address: put TLS in front of it, see docs/serving.md")


def unserved(keys: Sequence[KeyRecord], policy: Policy) -> list[KeyRecord]:
    """Active keys of a tier that the policy does not have: gateways refuse them."""
    now = time.time()
    return [key for key in keys if key.is_active(now) and key.tier not in policy.tiers]


def _drain(within_s: float) -> None:
    """Take no more requests and let replicas finish what was begun.

    Serve's own shutdown would cut that off, for it ends its proxies first.
    """
    with contextlib.suppress(RayServeException, RayError):
        serve.delete(APP, _blocking=False)
        until = time.monotonic() + within_s
        while APP in serve.status().applications and time.monotonic() < until:
            time.sleep(POLL_S)
        # A Ray of one's own takes Serve with it; in a cluster others may serve too.
        if os.environ.get("RAY_ADDRESS") and not serve.status().applications:
            serve.shutdown()


def check_network(config: ServeConfig) -> None:
    """Whether the port can be had, on the address that is meant and no other.

    Raises:
        ConfigError: if not.
    """
    if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1" and is_loopback(config.host):
        raise ConfigError(
            "RAY_SERVE_ENABLE_HA_PROXY=1 binds to every address whatever `host` says; unset it, "
            "or set host to what you mean"
        )
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.host, config.port))
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {config.host}:{config.port}: {error.strerror}; "
                "take another with port=NUMBER"
            ) from None


def _check_dashboard() -> None:
    context = ray.init(ignore_reinit_error=True, logging_level=logging.ERROR)
    check_dashboard(context.address_info.get("webui_url") or "")


def check_dashboard(url: str) -> None:
    """Whoever reaches an open dashboard runs any code here, the undefended teacher included.

    Raises:
        ConfigError: if it listens publicly and asks for no token.
    """
    host = url.rpartition(":")[0].strip("[]")
    if host and not is_loopback(host) and os.environ.get("RAY_AUTH_MODE") != "token":
        raise ConfigError(
            f"Ray's dashboard listens on {host} without a token; set RAY_AUTH_MODE=token on every "
            "node, or start the head with --dashboard-host=127.0.0.1"
        )


def _write(config: ServeConfig, path: Path, console: Console) -> None:
    # Whoever deploys it has another working directory, and perhaps another home.
    places = {"store": str(config.folder)}
    if Path(config.source).exists():
        places["source"] = str(Path(config.source).resolve())
    file = deploy_file(config.model_copy(update=places))
    path.write_text(yaml.safe_dump(file, sort_keys=False))
    console.print(f"wrote {path}; start it with: serve deploy {path}", soft_wrap=True)
