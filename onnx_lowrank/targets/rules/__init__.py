"""Static support: which nodes each execution provider would take, judged without running them."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator

from onnx_lowrank.targets.rules.base import Graph, Rules

__all__ = ["Graph", "Rules", "all_rules"]


def all_rules() -> tuple[Rules, ...]:
    """The rules of every provider, in the order of their names."""
    return tuple(sorted((kind() for kind in _kinds()), key=lambda rules: rules.name))


def _kinds() -> Iterator[type[Rules]]:
    for found in sorted(pkgutil.iter_modules(__path__), key=lambda module: module.name):
        module = importlib.import_module(f"{__name__}.{found.name}")
        for _, kind in inspect.getmembers(module, inspect.isclass):
            if (
                issubclass(kind, Rules)
                and kind.__module__ == module.__name__
                and not inspect.isabstract(kind)
            ):
                yield kind
