"""One Ray instance a run: local unless an address is given, on loopback, no dashboard."""

import logging
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray

from actors.resources import Resources
from azeotrope.environment import variable
from azeotrope.tasks import gsm8k

logger = logging.getLogger(__name__)
ATTEMPTS = 3
_QUIET = {
    # Train and Data write their own progress; the driver shows one bar for all of them.
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    # Placement is checked beforehand; a worker may still wait for another stage to end.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "3600",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_DEDUP_LOGS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
_ANNOUNCEMENT = b"Set ray log level from environment variable RAY_BACKEND_LOG_LEVEL"
_WORKER_ENV = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
# A machine of one's own is never taken away, and each of Train's companions is one more process.
_LOCAL = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}


class RayStartError(RuntimeError):
    """Ray did not start; the message says what to look at."""


def start(resources: Resources, *, offline: bool) -> None:
    """Connect to the cluster in RAY_ADDRESS, or start a local one; does nothing if connected.

    Args:
        offline: forbid workers to reach a model hub.

    Raises:
        RayStartError: after three attempts.
    """
    if ray.is_initialized():
        return
    for key, value in _QUIET.items():
        os.environ.setdefault(key, value)
    env = dict(_WORKER_ENV) if offline else {k: v for k, v in _WORKER_ENV.items() if k[:2] != "HF"}
    root = str(Path(__file__).resolve().parent.parent)
    # A cluster that runs already has the environment it was started in, not this one.
    data = gsm8k.data_folder()
    env |= {variable("data"): str(data.resolve())} if data is not None else {}
    env["PYTHONPATH"] = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p)
    address = os.environ.get("RAY_ADDRESS")
    last: Exception | None = None
    for _ in range(ATTEMPTS):
        try:
            with _announcement_hidden():
                if address:
                    ray.init(address, runtime_env={"env_vars": env}, log_to_driver=False)
                else:
                    # Children inherit the environment; a runtime_env would start every one anew.
                    os.environ.update(_LOCAL | env)
                    ray.init(
                        num_cpus=int(resources.num_cpus) if resources.num_cpus else None,
                        include_dashboard=False,
                        log_to_driver=False,
                        logging_level=logging.ERROR,
                    )
            _tighten_token()
            _silence()
            return
        except (OSError, RuntimeError, ValueError, ConnectionError) as error:
            last = error
            ray.shutdown()
    where = f"the cluster at {address}" if address else "a local Ray"
    raise RayStartError(
        f"could not reach {where} after {ATTEMPTS} attempts: {last}. Run `azeotrope doctor`; if "
        "the machine is busy try again, and if an old instance hangs stop it by its pid"
    ) from last


def stop() -> None:
    if ray.is_initialized():
        ray.shutdown()


@contextmanager
def _announcement_hidden() -> Iterator[None]:
    """Drop the line in which Ray's core announces the log level that `_QUIET` sets.

    The core writes it to file descriptor 2 before its logging is configured, so no logger and no
    variable can silence it. Everything else is passed on afterwards.
    """
    with tempfile.TemporaryFile() as captured:
        terminal = os.dup(2)
        os.dup2(captured.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(terminal, 2)
            captured.seek(0)
            for line in captured:
                if _ANNOUNCEMENT not in line:
                    os.write(2, line)
            os.close(terminal)


def _tighten_token() -> None:
    """A local Ray writes its token readable by everyone; nobody else needs it."""
    token = Path.home() / ".ray" / "auth_token"
    if token.is_file() and stat.S_IMODE(token.stat().st_mode) & 0o077:
        token.chmod(0o600)


def _silence() -> None:
    for name in ("ray", "ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
