"""Limits on the size of things, and one name for one thing, read from the source."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PRODUCT = (
    *("azeotrope", "gateway", "actors", "experiment", "workflows", "tune_spaces"),
    "benchmarks",
)
FILE_LINES, FUNCTION_LINES, PARAMETERS = 400, 60, 8

# Each with the reason why it may be larger.
LONG_FUNCTIONS: dict[str, str] = {}
MANY_PARAMETERS: dict[str, str] = {
    "workflows/cli.py:attribute": "typer reads one parameter per option of the command",
}
# A method's module says what it is, so every one of them names its settings the same.
SHARED_CLASSES = {"Config"}
VAGUE = {"found", "given", "other", "shown", "place"}
VAGUE_SHARE = 0.004

Function = ast.FunctionDef | ast.AsyncFunctionDef


def sources(*packages: str) -> Iterator[tuple[str, str]]:
    for package in packages:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), path.read_text()


def functions() -> Iterator[tuple[str, Function, bool]]:
    """Every function with its address, and whether its first parameter is `self` or `cls`."""
    for path, source in sources(*PRODUCT):
        tree = ast.parse(source)
        methods = {
            id(item)
            for node in ast.walk(tree)
            if isinstance(node, ast.ClassDef)
            for item in node.body
        }
        for node in ast.walk(tree):
            if isinstance(node, Function):
                static = any(ast.unparse(item) == "staticmethod" for item in node.decorator_list)
                yield f"{path}:{node.name}", node, id(node) in methods and not static


def test_no_file_is_long() -> None:
    long = {
        path: lines
        for path, source in sources(*PRODUCT, "tests")
        if (lines := len(source.splitlines())) > FILE_LINES
    }
    assert not long


def test_no_function_is_long() -> None:
    long = {
        name: lines
        for name, node, _ in functions()
        if (lines := (node.end_lineno or node.lineno) - node.lineno + 1) > FUNCTION_LINES
    }
    assert not long.keys() - LONG_FUNCTIONS.keys(), long
    assert not LONG_FUNCTIONS.keys() - long.keys(), "an exception that is no longer needed"


def test_no_function_takes_many_parameters() -> None:
    many = {}
    for name, node, is_method in functions():
        given = node.args
        count = len(given.posonlyargs) + len(given.args) + len(given.kwonlyargs) - is_method
        if count > PARAMETERS:
            many[name] = count
    assert not many.keys() - MANY_PARAMETERS.keys(), many
    assert not MANY_PARAMETERS.keys() - many.keys(), "an exception that is no longer needed"


def test_no_two_classes_share_a_name() -> None:
    homes: dict[str, list[str]] = defaultdict(list)
    for path, source in sources(*PRODUCT):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef):
                homes[node.name].append(path)
    shared = {
        name: paths
        for name, paths in homes.items()
        if len(paths) > 1 and name not in SHARED_CLASSES
    }
    assert not shared


def bindings(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg


def test_names_say_what_they_hold() -> None:
    names = [name for _, source in sources(*PRODUCT) for name in bindings(ast.parse(source))]
    vague = [name for name in names if name in VAGUE]
    assert len(vague) <= VAGUE_SHARE * len(names), f"{len(vague)} of {len(names)}"
