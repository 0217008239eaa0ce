"""Callables of the user's, named ``module:callable`` or ``file.py:callable``."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnx_lowrank.errors import InputError
from onnx_lowrank.files import exists, is_file

__all__ = ["UserCode", "failure"]


@dataclass(frozen=True)
class UserCode:
    """Where a callable is.

    Attributes:
        text: as the user wrote it.
        module: a module's name, or the path of a file that ends in ``.py``.
        name: the callable's name there.
    """

    text: str
    module: str
    name: str

    @classmethod
    def parse(cls, text: str) -> UserCode | None:
        """The place that a text names; None if it is something else, such as a path."""
        module, colon, name = text.rpartition(":")
        if not (colon and module and name.isidentifier()) or exists(Path(text)):
            return None
        return cls(text, module, name)

    @contextlib.contextmanager
    def importable(self) -> Iterator[None]:
        """A module of the working folder, and what a file imports from beside it, can be found."""
        file = self.module.endswith(".py")
        folder = str(Path(self.module).resolve().parent if file else Path.cwd())
        sys.path.insert(0, folder)
        try:
            yield
        finally:
            with contextlib.suppress(ValueError):
                sys.path.remove(folder)

    def load(self) -> Any:
        """The callable; best inside `importable`.

        Raises:
            InputError: there is no such file or name, or its module fails.
        """
        if self.module.endswith(".py") and not is_file(Path(self.module)):
            raise InputError(f"{self.text}: no such file {self.module}")
        try:
            if self.module.endswith(".py"):
                own = f"_onnx_lowrank_{Path(self.module).stem}"  # never the name of another module
                spec = importlib.util.spec_from_file_location(own, self.module)
                assert spec is not None
                assert spec.loader is not None
                loaded = importlib.util.module_from_spec(spec)
                sys.modules[own] = loaded
                spec.loader.exec_module(loaded)
            else:
                loaded = importlib.import_module(self.module)
            return getattr(loaded, self.name)
        except (Exception, SystemExit) as error:  # the user's code
            raise InputError(failure(self.text, error)) from error


def failure(text: str, error: BaseException) -> str:
    """What went wrong in the user's code, in one line."""
    reason = " ".join(str(error).split())
    return f"{text}: {type(error).__name__}" + (f": {reason}" if reason else "")
