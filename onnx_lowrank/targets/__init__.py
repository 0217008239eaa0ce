"""Targets: where models can be run.  Every module here that offers one is registered automatically.

A module has ``KINDS``, the kinds of names that are its own (see `kind_of`), and functions
``create(name: str) -> Target`` and ``offers() -> list[Offer]``.  A name of no such kind is one of
an execution provider of this machine (`local`).  The kind decides before anything is loaded, and
the imports of a module are light: what is heavy is imported when a target is used.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from types import ModuleType

from onnx_lowrank.errors import InputError, named
from onnx_lowrank.targets import local
from onnx_lowrank.targets.address import kind_of
from onnx_lowrank.targets.base import Offer, Target

__all__ = ["all_offers", "open_target"]


def _modules() -> Iterator[ModuleType]:
    for found in sorted(pkgutil.iter_modules(__path__), key=lambda module: module.name):
        module = importlib.import_module(f"{__name__}.{found.name}")
        if hasattr(module, "KINDS"):
            yield module


def open_target(name: str) -> Target:
    """The target of a name such as ``cpu``, ``openvino``, ``web`` or ``ssh://user@board``.

    Raises:
        InputError: there is no such target, or it cannot be used here.
    """
    kind = kind_of(name)
    for module in _modules():
        if kind in module.KINDS:
            target = module.create(name)
            assert isinstance(target, Target)
            return target
    local_target = local.create(name)
    if local_target is None:
        known = ", ".join(offer.name for offer in all_offers())
        raise InputError(f"{named('targets', name)}: no such target; expected one of {known}")
    return local_target


def all_offers() -> list[Offer]:
    """Every target, usable here or not."""
    return [offer for module in (local, *_modules()) for offer in module.offers()]
