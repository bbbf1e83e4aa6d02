"""The layer rule, read from the source.

    workflows -> experiment -> actors -> gateway -> azeotrope        tune_spaces -> nothing

Inside `azeotrope/` imports point downwards through bands, and nowhere do two files import each
other, directly or through others.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAYERS = ("azeotrope", "gateway", "actors", "experiment", "workflows")
PACKAGES = (*LAYERS, "tune_spaces")
ABOVE = {name: {*LAYERS[at + 1 :], "tune_spaces"} for at, name in enumerate(LAYERS)}
FORBIDDEN = {
    "azeotrope": {"ray", "vllm", "fastapi", "starlette", "uvicorn", "httpx", *ABOVE["azeotrope"]},
    "gateway": {"ray", "vllm", *ABOVE["gateway"]},
    "actors": ABOVE["actors"],
    "experiment": {"workflows"},
    # Data only: a space can be read and checked where neither Ray nor torch is installed.
    "tune_spaces": {"ray", "torch", "vllm", *LAYERS},
}
# From the bottom. Modules that no band names are at the bottom: configuration, tokens, models,
# training, generation.
BANDS: tuple[set[str], ...] = (
    set(),
    {"logits"},
    {"heads"},
    {"proxies"},
    {"defenses", "attacks", "tasks", "pocket"},
    {"engine", "evidence", "report"},
)
VAGUE = {"utils", "util", "helpers", "common", "misc"}


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """The dotted name of everything imported, inside functions too, with the line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant):
                yield str(first.value), node.lineno


def file_of(name: str) -> Path | None:
    """The file of our own that an imported name is in: `a.b.c` is `a/b/c.py`, or in `a/b.py`."""
    parts = name.split(".")
    for length in (len(parts), len(parts) - 1):
        path = ROOT.joinpath(*parts[:length])
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if length and file.is_file():
                return file
    return None


def arrows(package: str) -> Iterator[tuple[Path, Path, int]]:
    for path in modules(package):
        for name, line in imported(ast.parse(path.read_text())):
            target = file_of(name) if name.partition(".")[0] in PACKAGES else None
            if target is not None and target != path:
                yield path, target, line


def band(path: Path) -> int:
    first = path.relative_to(ROOT / "azeotrope").parts[0].removesuffix(".py")
    return next((at for at, names in enumerate(BANDS) if first in names), 0)


@pytest.mark.parametrize("package", sorted(FORBIDDEN))
def test_a_layer_imports_nothing_above_it(package: str) -> None:
    upward = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in modules(package)
        for name, line in imported(ast.parse(path.read_text()))
        if name.partition(".")[0] in FORBIDDEN[package]
    ]
    assert not upward


def test_the_library_imports_downwards() -> None:
    upward = [
        f"{path.relative_to(ROOT)}:{line} imports {target.relative_to(ROOT)}"
        for path, target, line in arrows("azeotrope")
        if band(target) > band(path)
    ]
    assert not upward


def test_no_two_files_import_each_other() -> None:
    graph: dict[Path, set[Path]] = {}
    for package in PACKAGES:
        for path, target, _ in arrows(package):
            graph.setdefault(path, set()).add(target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        circle = " -> ".join(str(path.relative_to(ROOT)) for path in error.args[1])
        pytest.fail(f"a circle of imports: {circle}")


def test_every_folder_of_the_library_has_a_band() -> None:
    folders = {path.parent.name for path in (ROOT / "azeotrope").glob("*/__init__.py")}
    assert folders <= set().union(*BANDS)


def test_the_check_sees_every_way_to_import() -> None:
    source = (
        "import ray.data\n"
        "def f():\n    from vllm import LLM\n"
        "importlib.import_module('actors.teacher')\n"
        "from . import ray\n"
    )
    seen = dict(imported(ast.parse(source)))
    assert seen == {"ray.data": 1, "vllm.LLM": 3, "actors.teacher": 4}


def test_the_check_finds_the_file_of_a_name() -> None:
    assert file_of("azeotrope.heads.chunked.logits") == ROOT / "azeotrope/heads/chunked.py"
    assert file_of("azeotrope.heads.chunked") == ROOT / "azeotrope/heads/chunked.py"
    assert file_of("azeotrope.heads") == ROOT / "azeotrope/heads/__init__.py"


def test_no_module_has_a_vague_name() -> None:
    paths = [path for package in PACKAGES for path in (ROOT / package).rglob("*")]
    assert paths
    assert not [path for path in paths if path.stem in VAGUE]


def test_the_library_has_real_annotations() -> None:
    # Strings in place of annotations would switch the checks of array shapes off.
    lazy = "from __future__ import annotations"
    assert not [path for path in modules("azeotrope") if lazy in path.read_text()]


def test_the_command_line_starts_without_torch() -> None:
    program = "import sys, workflows.cli; print(sorted({'torch', 'ray'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
