"""Loads the glue to a library right behind the library, whoever imports it and when: `import rebnn_hf` stays light."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from packaging.version import Version

logger = logging.getLogger(__name__)


def after_import(library: str, glue: str, oldest: str | None = None) -> None:
    """Import the module `glue` as soon as `library` is imported, which may be now or never.

    Args:
        library: name of a top-level module.
        glue: full name of the module.
        oldest: version of the library that the glue needs; one before it stays as it is, and a warning says so. None
            where nobody may go on without the glue.
    """
    watch = _Watch(library, glue, oldest)
    if library in sys.modules:
        watch.load_glue(sys.modules[library])
        return
    if watch not in sys.meta_path:
        sys.meta_path.insert(0, watch)


@dataclass(frozen=True)
class _Watch(MetaPathFinder):
    """Finds the library as all other finders would, and lets its loader import the glue last.

    It stays in place when it has found the library: many only look whether there is one, and import it later.
    """

    library: str
    glue: str
    oldest: str | None

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
            self.load_glue(module)

        return run

    def load_glue(self, library: ModuleType) -> None:
        """Import the glue if the library is new enough."""
        if self.oldest is not None and Version(library.__version__) < Version(self.oldest):
            logger.warning(f"{self.glue} needs {self.library} {self.oldest}, and this is {library.__version__}.")
            return
        importlib.import_module(self.glue)
