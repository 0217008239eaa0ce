"""Where samples come from: files and folders, or a callable of the user's."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import itertools
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from onnx_lowrank.data import Samples, load_samples
from onnx_lowrank.datafiles import Array
from onnx_lowrank.errors import InputError
from onnx_lowrank.feeds import Fitter
from onnx_lowrank.shapes import ConcreteShapes, InputSpec

__all__ = ["Source", "load_source", "same_source", "source_name"]

Source = str | os.PathLike[str] | Iterable[Mapping[str, Any]]
"""A path, ``module:callable``, ``file.py:callable``, an iterable of feeds, or a reader."""


def source_name(source: Source) -> str:
    """How messages and the report call a source."""
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    return f"a {type(source).__name__} of feeds"


def same_source(one: Source | None, other: Source | None) -> bool:
    """Whether both are the same samples: one object, or one place on disk."""
    if isinstance(one, str | os.PathLike) and isinstance(other, str | os.PathLike):
        return os.path.realpath(one) == os.path.realpath(other)
    return one is other


def load_source(
    source: Source,
    model: ir.Model,
    specs: Sequence[InputSpec],
    shapes: ConcreteShapes,
    *,
    limit: int,
    seed: int,
    option: str = "--data",
) -> Samples:
    """At most ``limit`` samples of a source, checked against the model.

    Args:
        source: where they are.
        model: the model.
        specs: its inputs.
        shapes: their sizes.
        limit: how many to take.
        seed: of the choice among more.
        option: which option named the source, for messages.

    Raises:
        InputError: the source cannot be read, or does not fit the model's inputs.
    """
    names = [value.name or "" for value in model.graph.outputs]
    fitter = Fitter(specs, shapes, names)
    if isinstance(source, str | os.PathLike):
        text = os.fspath(source)
        module, colon, name = text.rpartition(":")
        if not (colon and name.isidentifier()) or Path(text).exists():
            return load_samples(
                Path(text),
                specs,
                shapes,
                limit=limit,
                seed=seed,
                output_names=names,
                option=option,
            )
        with _importable(module):
            fitted = _fitted(_called(text, module, name), text, fitter, limit)
    else:
        text = source_name(source)
        fitted = _fitted(_feeds(source, text), text, fitter, limit)
    if not fitted:
        raise InputError(f"{text}: expected at least one sample, came none")
    for number, feed in enumerate(fitted):
        fitter.inspect(feed, f"{text}: sample {number}")
    return Samples(text, fitted, (None,) * len(fitted), fitter.notes, len(fitted))


def _fitted(
    feeds: Iterator[Mapping[str, Any]], text: str, fitter: Fitter, limit: int
) -> list[dict[str, Array]]:
    return [
        fitter.fit(feed, f"{text}: sample {number}", stacked=False)
        for number, feed in enumerate(itertools.islice(feeds, limit))
    ]


@contextlib.contextmanager
def _importable(module: str) -> Iterator[None]:
    """A module of the working folder, and what a file imports from beside it, can be imported."""
    folder = str(Path(module).resolve().parent) if module.endswith(".py") else str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)


def _called(text: str, module: str, name: str) -> Iterator[Mapping[str, Any]]:
    """The feeds that a callable returns."""
    if module.endswith(".py") and not Path(module).is_file():
        raise InputError(f"{text}: no such file {module}")
    try:
        if module.endswith(".py"):
            own = f"_onnx_lowrank_{Path(module).stem}"  # never the name of another module
            spec = importlib.util.spec_from_file_location(own, module)
            assert spec is not None
            assert spec.loader is not None
            loaded = importlib.util.module_from_spec(spec)
            sys.modules[own] = loaded
            spec.loader.exec_module(loaded)
        else:
            loaded = importlib.import_module(module)
        made = getattr(loaded, name)()
    except (Exception, SystemExit) as error:  # the user's code
        raise InputError(_failure(text, error)) from error
    return _feeds(made, text)


def _failure(text: str, error: BaseException) -> str:
    """What went wrong in the user's code, in one line."""
    reason = " ".join(str(error).split())
    return f"{text}: {type(error).__name__}" + (f": {reason}" if reason else "")


def _feeds(made: Any, text: str) -> Iterator[Mapping[str, Any]]:
    """Feeds from an iterable, or from an onnxruntime CalibrationDataReader."""
    items: Any = iter(made.get_next, None) if hasattr(made, "get_next") else made
    try:
        items = iter(items)
    except TypeError as error:
        raise InputError(
            f"{text}: expected an iterable of feeds or a CalibrationDataReader, came "
            f"{type(made).__name__}"
        ) from error
    while True:
        try:
            feed = next(items)
        except StopIteration:
            return
        except (Exception, SystemExit) as error:  # the user's code
            raise InputError(_failure(text, error)) from error
        if not isinstance(feed, Mapping):
            raise InputError(
                f"{text}: expected a mapping from input names to arrays, came {type(feed).__name__}"
            )
        yield {str(name): np.asarray(array) for name, array in feed.items()}
