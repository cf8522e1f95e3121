"""Loads the glue to a library right behind the library, whoever imports it and when: `import rebnn_hf` stays light."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def after_import(library: str, glue: str) -> None:
    """Import the module `glue` as soon as `library` is imported, which may be now or never."""
    if library in sys.modules:
        importlib.import_module(glue)
        return
    watch = _Watch(library, glue)
    if watch not in sys.meta_path:
        sys.meta_path.insert(0, watch)


@dataclass(frozen=True)
class _Watch(MetaPathFinder):
    """Finds the library as all other finders would, and lets its loader import the glue last.

    It stays in place when it has found the library: many only look whether there is one, and import it later.
    """

    library: str
    glue: str

    def find_spec(self, name: str, path=None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.library:
            return None
        others = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        specs = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = self._with_glue(spec.loader.exec_module)
        return spec

    def _with_glue(self, exec_module: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
        def run(module: ModuleType) -> None:
            exec_module(module)
            importlib.import_module(self.glue)

        return run
