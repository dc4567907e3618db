"""Something done when another module is imported, now or later: that other is not imported for it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

Action = Callable[[ModuleType], Any]


def when_imported(name: str, action: Action) -> None:
    """Call ``action`` with the module of this name: at once where it is imported already, else after its import."""
    if name in sys.modules:
        action(sys.modules[name])
    else:
        sys.meta_path.insert(0, Watch(name, action))


class Watch(MetaPathFinder):
    """Waits for one import, lets the other finders find the module, and is gone."""

    def __init__(self, name: str, action: Action) -> None:
        self.name, self.action = name, action

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        specs = (finder.find_spec(fullname, path, target) for finder in sys.meta_path)
        spec = next((each for each in specs if each is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = Told(spec.loader, self.action)
        return spec


class Told(Loader):
    """A loader that tells once its module has run; what stands in sys.modules then counts, as in any import."""

    def __init__(self, loader: Any, action: Action) -> None:
        self.loader, self.action = loader, action

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        created: ModuleType | None = self.loader.create_module(spec)
        return created

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        self.action(sys.modules[module.__name__])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)
