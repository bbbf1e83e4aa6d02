"""Plug-ins are found by being in a package, and misspelt names are answered with the right ones."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from azeotrope.config import ConfigError
from azeotrope.plugins import Plugins

PLUGIN = """
from azeotrope import config

class Config(config.Config):
    name: str
    loudness: int = 1

def build(config):
    return (config.name, config.loudness)
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    folder = tmp_path / "plugin_test_package"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "loud.py").write_text(PLUGIN)
    (folder / "quiet").mkdir()
    (folder / "quiet" / "__init__.py").write_text(PLUGIN)
    (folder / "base.py").write_text("shared = True")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield importlib.import_module(folder.name)
    for name in [name for name in sys.modules if name.startswith(folder.name)]:
        del sys.modules[name]


def test_modules_and_packages_are_plugins(package: ModuleType) -> None:
    plugins = Plugins(package, "sound")
    assert plugins.names() == ["loud", "quiet"]
    assert plugins.build({"name": "loud", "loudness": 3}) == ("loud", 3)
    assert plugins.build({"name": "quiet"}) == ("quiet", 1)


def test_a_module_in_an_added_folder_is_a_plugin(package: ModuleType, tmp_path: Path) -> None:
    plugins = Plugins(package, "sound")
    newcomer = tmp_path / "elsewhere"
    newcomer.mkdir()
    (newcomer / "shrill.py").write_text(PLUGIN)
    package.__path__.append(str(newcomer))
    assert plugins.names() == ["loud", "quiet", "shrill"]
    assert plugins.build({"name": "shrill"}) == ("shrill", 1)


@pytest.mark.parametrize("name", ["laud", "base", "os", "quiet.inner", ""])
def test_an_unknown_name_lists_the_plugins(package: ModuleType, name: str) -> None:
    plugins = Plugins(package, "sound")
    with pytest.raises(ConfigError) as error:
        plugins.build({"name": name})
    assert str(error.value) == f"unknown sound {name!r}; there are loud, quiet"


def test_settings_that_do_not_fit_are_refused(package: ModuleType) -> None:
    plugins = Plugins(package, "sound")
    with pytest.raises(ConfigError, match="sound loud: unknown key 'laudness'; allowed: loudness"):
        plugins.build({"name": "loud", "laudness": 3})
