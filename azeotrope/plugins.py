"""Plug-ins: modules of a package that configurations name, without a registry.

A plug-in called `doge` is the module `doge` of its package. The module has a class `Config`, whose
`name` is a literal, and a function `build(config)`. A registry that is filled in one process would
be empty in another; a module can be imported everywhere.
"""

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from azeotrope.config import ConfigError
from azeotrope.config import build as build_config


@dataclass(frozen=True)
class Plugins:
    """The plug-ins of one package."""

    package: ModuleType
    kind: str
    """What messages call one of them: `defense`, `attack`."""
    shared: frozenset[str] = frozenset({"base"})
    """Modules and packages in it that are no plug-ins."""

    def modules(self) -> list[str]:
        """The modules that are plug-ins, in alphabetical order."""
        # `__path__` is read anew at each call, so a folder that is appended to it counts.
        modules = pkgutil.iter_modules(self.package.__path__)
        return sorted(module.name for module in modules if module.name not in self.shared)

    def names(self) -> list[str]:
        """All names that a configuration may use: the modules and their aliases."""
        return sorted({*self.modules(), *self.aliases()})

    def aliases(self) -> dict[str, str]:
        """The module behind each further name, from the `ALIASES` that a module may have."""
        return {
            alias: name
            for name in self.modules()
            for alias in getattr(self.load(name), "ALIASES", ())
        }

    def load(self, name: str) -> ModuleType:
        """Import the module of this name or alias.

        Raises:
            ConfigError: if there is none.
        """
        module = name if name in self.modules() else self.aliases().get(name)
        if module is None:
            raise ConfigError(f"unknown {self.kind} {name!r}; there are {', '.join(self.names())}")
        return importlib.import_module(f"{self.package.__name__}.{module}")

    def build(self, settings: Mapping[str, Any]) -> Any:
        """Build the plug-in that the settings name.

        Raises:
            ConfigError: if there is no module of that name, or a key or value does not fit.
        """
        name = settings.get("name")
        module = self.load(str(name))
        return module.build(build_config(module.Config, settings, source=f"{self.kind} {name}"))
