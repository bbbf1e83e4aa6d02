"""A run that loses Ray's head says so within seconds and ends."""

import subprocess
import sys
import time
from pathlib import Path

import psutil

SCRIPT = """
import time
from actors import session
from actors.resources import Resources
session.start(Resources(), offline=True)
print("started", flush=True)
time.sleep(120)
"""


def test_a_lost_head_is_reported_in_one_line(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    try:
        assert process.stdout is not None
        while process.stdout.readline().strip() != "started":
            assert process.poll() is None
        children = psutil.Process(process.pid).children(recursive=True)
        for child in children:
            if child.name().startswith("gcs_server"):
                child.kill()
        began = time.monotonic()
        _, errors = process.communicate(timeout=55)
        assert process.returncode == 1
        assert "the head of the Ray cluster at" in errors
        assert "run the same command again" in errors
        assert "Traceback" not in errors
        assert time.monotonic() - began < 55
    finally:
        process.kill()
        for child in children:
            if child.is_running():
                child.kill()
