"""The examples of CONTRIBUTING.md as files: a path in backticks, then its text in a code block."""

import importlib
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
_EXAMPLE = re.compile(r"^`([\w./]+)`\n\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def examples() -> dict[str, str]:
    """The text of every file that CONTRIBUTING.md shows, by its path."""
    return dict(_EXAMPLE.findall((ROOT / "CONTRIBUTING.md").read_text()))


@contextmanager
def added(package: str, name: str, folder: Path, source: str | None = None) -> Iterator[None]:
    """Write a module into a folder that is a part of a package for a while.

    Args:
        source: the module's text; None takes that of the example in CONTRIBUTING.md.
    """
    path = f"{package.replace('.', '/')}/{name}.py"
    folder.mkdir(parents=True)
    (folder / f"{name}.py").write_text(examples()[path] if source is None else source)
    parent = importlib.import_module(package)
    parent.__path__.append(str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        parent.__path__.remove(str(folder))
        sys.modules.pop(f"{package}.{name}", None)
        vars(parent).pop(name, None)
