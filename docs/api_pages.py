"""A hook for MkDocs: one API page per module of the library, made from its docstrings."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PACKAGE = "azeotrope"


def modules() -> Iterator[tuple[str, str]]:
    """The name of every public module of the library, and the address of its page."""
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        if not path.name.startswith("_"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            yield name, f"api/{path.relative_to(ROOT / PACKAGE).with_suffix('.md').as_posix()}"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Append the API section to the navigation, grouped by package."""
    groups: dict[str, list[Any]] = {}
    for name, page in modules():
        _, *packages, module = name.split(".")
        groups.setdefault(".".join(packages), []).append({module: page})
    top = groups.pop("", [])
    assert config.nav is not None
    config.nav.append({"API": [*top, *({name: pages} for name, pages in groups.items())]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages; each is one mkdocstrings block."""
    for name, page in modules():
        files.append(File.generated(config, page, content=f"# `{name}`\n\n::: {name}\n"))
    return files
