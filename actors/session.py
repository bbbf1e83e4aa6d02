"""One Ray instance per run: local unless RAY_ADDRESS is set, on loopback, without a dashboard."""

import logging
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray

from actors.head_watch import HeadWatch, end_process
from actors.resources import Resources
from azeotrope.environment import variable
from azeotrope.tasks import gsm8k

logger = logging.getLogger(__name__)
ATTEMPTS = 3
_QUIET = {
    # Train and Data print progress of their own; the driver shows one bar for all of it.
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    # Placement is checked beforehand, but a worker may have to wait until another stage ends.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "3600",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_DEDUP_LOGS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
_ANNOUNCEMENT = b"Set ray log level from environment variable RAY_BACKEND_LOG_LEVEL"
_WORKER_ENV = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
# A local machine is not preempted, and this watcher would be one more process for each run.
_LOCAL = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}


_watches: list[HeadWatch] = []
"""Of the connection of this process: one, or none."""


class RayStartError(RuntimeError):
    """Ray did not start; the message says what to look at."""


def start(resources: Resources, *, offline: bool) -> None:
    """Connect to the cluster in RAY_ADDRESS, or start a local one; does nothing if connected.

    Args:
        offline: forbid workers to use a model hub.

    Raises:
        RayStartError: after three attempts.
    """
    if ray.is_initialized():
        return
    for key, value in _QUIET.items():
        os.environ.setdefault(key, value)
    variables = _worker_variables(offline)
    address = os.environ.get("RAY_ADDRESS")
    last: Exception | None = None
    for _ in range(ATTEMPTS):
        try:
            with _announcement_hidden():
                _connect(address, resources, variables)
            _tighten_token()
            _silence()
            _watch_head()
            return
        except Exception as error:
            # Ray reports a node that starts too slowly, after 30 s, as a bare Exception.
            last = error
            ray.shutdown()
    target = f"the cluster at {address}" if address else "a local Ray"
    raise RayStartError(
        f"could not reach {target} after {ATTEMPTS} attempts: {last}. Run `azeotrope doctor`; if "
        "the machine is busy try again, and if an old instance hangs stop it by its pid"
    ) from last


def _worker_variables(offline: bool) -> dict[str, str]:
    """Environment variables of the workers: a running cluster does not have this process's own."""
    variables = dict(_WORKER_ENV)
    if not offline:
        del variables["HF_HUB_OFFLINE"]
    data = gsm8k.data_folder()
    if data is not None:
        variables[variable("data")] = str(data.resolve())
    root = str(Path(__file__).resolve().parent.parent)
    paths = (root, os.environ.get("PYTHONPATH"))
    variables["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    return variables


def _connect(address: str | None, resources: Resources, variables: dict[str, str]) -> None:
    if address:
        ray.init(address, runtime_env={"env_vars": variables}, log_to_driver=False)
        return
    # Workers inherit this environment. With a runtime_env Ray would start each of them anew.
    os.environ.update(_LOCAL | variables)
    ray.init(
        # Without an address Ray would join any instance that runs on this machine.
        "local",
        num_cpus=int(resources.num_cpus) if resources.num_cpus else None,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )


def _watch_head() -> None:
    _watches.append(HeadWatch(ray.get_runtime_context().gcs_address, end_process))


def stop() -> None:
    """Disconnect, and end Ray if it is local."""
    while _watches:
        _watches.pop().stop()
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
    """Make the token of a local Ray private: Ray writes it readable for all users."""
    token = Path.home() / ".ray" / "auth_token"
    if token.is_file() and stat.S_IMODE(token.stat().st_mode) & 0o077:
        token.chmod(0o600)


def _silence() -> None:
    for name in ("ray", "ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
