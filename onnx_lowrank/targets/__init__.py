"""Targets: where models can be run.  Every module here that offers one is found by itself.

A module has a function ``create(name: str) -> Target | None``, which answers None where the name
is not its own, and ``offers() -> list[Offer]``.  Its imports are light: what is heavy is imported
when a target is used.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from types import ModuleType

from onnx_lowrank.errors import InputError
from onnx_lowrank.targets.base import Offer, Target

__all__ = ["all_offers", "open_target"]


def _modules() -> Iterator[ModuleType]:
    for found in sorted(pkgutil.iter_modules(__path__), key=lambda module: module.name):
        module = importlib.import_module(f"{__name__}.{found.name}")
        if hasattr(module, "create"):
            yield module


def open_target(name: str) -> Target:
    """The target of a name such as ``cpu``, ``openvino``, ``web`` or ``ssh://user@board``.

    Raises:
        InputError: there is no such target, or it cannot be used here.
    """
    for module in _modules():
        target = module.create(name)
        if target is not None:
            assert isinstance(target, Target)
            return target
    known = ", ".join(offer.name for offer in all_offers())
    raise InputError(f"--target {name}: no such target; expected one of {known}")


def all_offers() -> list[Offer]:
    """Every target, usable here or not."""
    return [offer for module in _modules() for offer in module.offers()]
