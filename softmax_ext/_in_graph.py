"""Functions that Dynamo has in a graph as they are, without looking into them.

``torch.compiler.allow_in_graph`` imports Dynamo, which takes longer than torch itself: they are
made known to it once something else has imported it, as all that traces does first.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any, TypeVar

import torch

_Function = TypeVar("_Function", bound=Callable[..., Any])
_DYNAMO = "torch._dynamo"
_functions: list[Callable[..., Any]] = []


class _AfterDynamo(Loader):
    """The loader of Dynamo, and then what it is to know."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # As if it had been found without this.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        module.allow_in_graph(_functions)


class _Finder(MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == _DYNAMO else None
        if spec is not None and spec.loader is not None:
            spec.loader = _AfterDynamo(spec.loader)
        return spec


def in_graph(function: _Function) -> _Function:
    """The function itself."""
    if _DYNAMO in sys.modules:
        torch.compiler.allow_in_graph(function)  # type: ignore[no-untyped-call]
        return function
    if not _functions:
        sys.meta_path.insert(0, _Finder())
    _functions.append(function)
    return function
