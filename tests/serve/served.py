"""`azeotrope serve` in its own process, for tests that need the whole endpoint."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import httpx
import psutil

from gateway.accounts.ledger import Usage
from gateway.accounts.sqlite_keys import KEYS_FILE, SqliteKeyStore
from gateway.accounts.sqlite_ledger import LEDGER_FILE, SqliteLedger

READY_S, STOP_S, POLL_S = 300.0, 60.0, 0.1


class Key(NamedTuple):
    """The token of a key, and the name of the key in ledgers."""

    id: str
    token: str


@dataclass(frozen=True)
class Served:
    """A running endpoint. Its URL does not include `/v1`."""

    url: str
    home: Path
    process: subprocess.Popen[bytes]
    log: Path

    def key(self, tier: str = "trusted") -> Key:
        """A new key."""
        record, token = SqliteKeyStore(self.home / KEYS_FILE).create("test", tier=tier)
        return Key(record.id, token)

    def usage(self, key: Key | None = None) -> list[Usage]:
        """The current rows of the ledger, to which other processes write."""
        return SqliteLedger(self.home / LEDGER_FILE).usage(key.id if key else None)

    def settled(self, key: Key, within_s: float) -> Usage:
        """The usage of a key once no request is open. The readiness check settles old leases."""
        until = time.monotonic() + within_s
        while True:
            with contextlib.suppress(httpx.TransportError):
                httpx.get(f"{self.url}/readyz", timeout=5, trust_env=False)
            rows = self.usage(key)
            if rows and not any(row.open_requests for row in rows):
                assert len(rows) == 1, "the test ran over midnight of UTC"
                return rows[0]
            assert time.monotonic() < until, f"still open after {within_s} s: {rows}"
            time.sleep(POLL_S)

    def replicas(self, deployment: str) -> list[psutil.Process]:
        """The processes of this endpoint's own Ray instance."""
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                # During its start a replica has another title and does not answer.
                if " ".join(child.cmdline()).startswith(
                    f"ray::ServeReplica:azeotrope:{deployment}"
                ):
                    found.append(child)
        return found

    def wait_for(self, deployment: str, count: int, within_s: float = 60.0) -> None:
        """Wait until this number of replicas runs and the endpoint is ready."""
        until = time.monotonic() + within_s
        while True:
            with contextlib.suppress(httpx.TransportError):
                ready = (
                    httpx.get(f"{self.url}/readyz", timeout=5, trust_env=False).status_code == 200
                )
                if ready and len(self.replicas(deployment)) >= count:
                    return
            assert time.monotonic() < until, f"no {count} replicas of {deployment}"
            time.sleep(POLL_S)

    def stop(self, within_s: float = STOP_S) -> int:
        """Terminate it like a service manager, and return the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(within_s)


@contextlib.contextmanager
def served(folder: Path, *overrides: str, python: str = sys.executable) -> Iterator[Served]:
    """Serve `pocket/teacher` until the block ends.

    Args:
        folder: gets the store and the log; a `policy.yaml` in it is taken as the policy.
        overrides: `name=value`, after the source; one without `=` replaces the source.
    """
    source = next((item for item in overrides if "=" not in item), "pocket/teacher")
    port = free_port()
    command = [python, "-m", "workflows", "serve", source, f"port={port}"]
    command += [item for item in overrides if "=" in item]
    policy = folder / "policy.yaml"
    if policy.is_file():
        command += ["--policy", str(policy)]
    log = folder / "serve.log"
    home = folder / "home"
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "AZEOTROPE_HOME": str(home), "COLUMNS": "200"},
            cwd=Path(__file__).parents[2],
        )
    endpoint = Served(f"http://127.0.0.1:{port}", home, process, log)
    try:
        _wait(endpoint)
        yield endpoint
    finally:
        _end(endpoint)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait(endpoint: Served) -> None:
    """Wait for its own message; `/readyz` answers as soon as the first of several replicas runs."""
    until = time.monotonic() + READY_S
    while "is served at" not in endpoint.log.read_text():
        assert endpoint.process.poll() is None, endpoint.log.read_text()
        assert time.monotonic() < until, endpoint.log.read_text()
        time.sleep(POLL_S)
    assert httpx.get(f"{endpoint.url}/readyz", timeout=10, trust_env=False).status_code == 200


def _end(endpoint: Served) -> None:
    try:
        children = psutil.Process(endpoint.process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return
    try:
        endpoint.stop()
    except subprocess.TimeoutExpired:
        endpoint.process.kill()
        endpoint.process.wait()
    for child in psutil.wait_procs(children, timeout=5)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
