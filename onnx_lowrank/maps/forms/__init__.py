"""The forms: every way in which a constant linear map can stand in a graph, a module each."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable

from onnx_lowrank.errors import UsageError, named
from onnx_lowrank.maps.forms.base import Form, Refusal, Site

__all__ = ["Form", "Refusal", "Site", "all_forms", "chosen_forms"]


def all_forms() -> tuple[Form, ...]:
    """One of each form, in the order of their modules' names."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    found = sorted(_concrete(), key=lambda form: (form.__module__, form.name))
    return tuple(form() for form in found)


def chosen_forms(ops: Iterable[str] | None) -> tuple[Form, ...]:
    """The forms of these names; the plain linear maps where none are given (None).

    Raises:
        UsageError: an entry is neither "all", "default" nor the ``ops`` of a form.
    """
    forms = all_forms()
    known = {form.ops for form in forms}
    wanted: set[str] = set()
    for name in ("default",) if ops is None else ops:
        if name == "all":
            wanted |= {form.ops for form in forms if form.pairs}
        elif name == "default":
            wanted |= {form.ops for form in forms if form.default}
        elif name in known:
            wanted.add(name)
        else:
            choices = ", ".join(sorted(known))
            raise UsageError(
                f"{named('ops')}: expected all, default or some of {choices}; got {name!r}"
            )
    return tuple(form for form in forms if form.ops in wanted)


def _concrete() -> list[type[Form]]:
    waiting, found = list(Form.__subclasses__()), []
    for sub in waiting:
        waiting.extend(sub.__subclasses__())
        # A class without targets is only a common base.
        if hasattr(sub, "targets") and sub.__module__.startswith(__name__):
            found.append(sub)
    return found
