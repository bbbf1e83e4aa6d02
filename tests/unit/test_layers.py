"""The layer rule, read from the source: workflows -> actors, tune_spaces -> azeotrope."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("azeotrope", "gateway", "actors", "experiment", "workflows", "tune_spaces")
FORBIDDEN = {
    "azeotrope": {"ray", "vllm", "gateway", "actors", "experiment", "workflows", "tune_spaces"},
    "gateway": {"ray", "vllm", "actors", "experiment", "workflows", "tune_spaces"},
    "actors": {"experiment", "workflows"},
    "experiment": {"workflows"},
    # Data only: a space can be read and checked where neither Ray nor torch is installed.
    "tune_spaces": {"ray", "torch", "vllm", "actors", "experiment", "workflows"},
}
VAGUE = {"utils", "util", "helpers", "common", "misc"}


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Top-level names of everything imported, inside functions too, with the line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.partition(".")[0], node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield (node.module or "").partition(".")[0], node.lineno
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant):
                yield str(first.value).partition(".")[0], node.lineno


@pytest.mark.parametrize("package", sorted(FORBIDDEN))
def test_a_layer_imports_nothing_above_it(package: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in modules(package)
        for name, line in imported(ast.parse(path.read_text()))
        if name in FORBIDDEN[package]
    ]
    assert not found


def test_the_check_sees_every_way_to_import() -> None:
    source = (
        "import ray.data\n"
        "def f():\n    from vllm import LLM\n"
        "importlib.import_module('actors.teacher')\n"
        "from . import ray\n"
    )
    found = dict(imported(ast.parse(source)))
    assert found == {"ray": 1, "vllm": 3, "actors": 4}


def test_no_module_has_a_vague_name() -> None:
    paths = [path for package in PACKAGES for path in (ROOT / package).rglob("*")]
    assert paths
    assert not [path for path in paths if path.stem in VAGUE]


def test_the_library_has_real_annotations() -> None:
    # Strings in place of annotations would switch the checks of array shapes off.
    lazy = "from __future__ import annotations"
    assert not [path for path in modules("azeotrope") if lazy in path.read_text()]


@pytest.mark.skipif(
    not (ROOT / "workflows" / "cli.py").is_file(), reason="there is no command line yet"
)
def test_the_command_line_starts_without_torch() -> None:
    program = "import sys, workflows.cli; print(sorted({'torch', 'ray'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
