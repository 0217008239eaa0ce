"""Libraries of custom operators, which every session of a run registers.

They are in force in a block of code, as the spelling of options is (see `onnx_lowrank.errors`): a
session that did not know them could not be opened at all, so none may be left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import onnxruntime as ort

from onnx_lowrank.errors import InputError, named

__all__ = ["known", "libraries", "register"]

_libraries: ContextVar[tuple[Path, ...]] = ContextVar("libraries", default=())


def libraries() -> tuple[Path, ...]:
    """The libraries that are in force here."""
    return _libraries.get()


@contextmanager
def known(paths: Sequence[Path]) -> Iterator[None]:
    """Let sessions know these libraries while the block runs; they are not looked at here.

    Args:
        paths: absolute, for child processes get them too.
    """
    before = _libraries.set(tuple(paths))
    try:
        yield
    finally:
        _libraries.reset(before)


def register(options: ort.SessionOptions) -> None:
    """Let a session that is about to be opened know the libraries that are in force.

    Raises:
        InputError: ONNX Runtime does not take one, with its reason.
    """
    for path in libraries():
        try:
            options.register_custom_ops_library(str(path))
        except Exception as error:  # its exceptions have no common base but this
            reason = " ".join(str(error).rpartition(" : ")[2].split())
            raise InputError(
                f"{named('custom_ops', path)}: expected a library of custom operators for ONNX "
                f"Runtime {ort.__version__}, which says: {reason}"
            ) from error
