"""The command line: an expected error is one line and exit code 2, a bug keeps its trace."""

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from azeotrope import __version__
from workflows import cli

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["pipeline", "demo"], "no configuration 'demo'"),
        (["pipeline", "BROKEN"], "is not valid YAML"),
        (["pipeline", "pocket_demo", "teacher=pocket/techer"], "no pocket model 'pocket/techer'"),
        (["pipeline", "pocket_demo", "name=Two Words"], "Two Words"),
    ],
)
def test_the_command_line_says_it_in_one_line(
    arguments: list[str],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("name: [1\nother: {\n")
    given = [str(broken) if argument == "BROKEN" else argument for argument in arguments]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["azeotrope", *given])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert expected in lines[0]


def test_a_fault_of_ours_keeps_its_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(cli, "app", fails)
    with pytest.raises(ZeroDivisionError, match="ours"):
        cli.main()


@pytest.fixture(scope="module")
def finished_process(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    # Most of the time is imports of a fresh interpreter, which is not what is limited here.
    folder = tmp_path_factory.mktemp("empty")
    return subprocess.run(
        [sys.executable, "-m", "workflows", "pipeline", "pocket_demo", "sampling.temprature=1",
         f"runs={folder}", f"cache={folder / 'cache'}"],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_a_process_ends_with_code_2_and_one_line(
    finished_process: subprocess.CompletedProcess[str],
) -> None:
    assert finished_process.returncode == 2, finished_process.stderr
    lines = finished_process.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert "unknown key 'sampling.temprature'; allowed: max_new_tokens" in lines[0]
    assert "Traceback" not in finished_process.stdout + finished_process.stderr


def test_the_version_is_printed() -> None:
    result = CliRunner().invoke(cli.app, ["--version"], catch_exceptions=False)
    assert (result.exit_code, result.output.strip()) == (0, __version__)


def test_the_old_name_of_attribute_still_works_and_is_not_listed() -> None:
    def shown(*arguments: str) -> list[str]:
        result = CliRunner().invoke(cli.app, [*arguments, "--help"], catch_exceptions=False)
        return result.output.split()

    old, new = shown("trace"), shown("attribute")
    assert [word for word in old if word != "trace"] == [w for w in new if w != "attribute"]
    listed = shown()
    assert "attribute" in listed
    assert "trace" not in listed
