"""Where samples come from: files and folders, or a callable of the user's."""

from __future__ import annotations

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
from onnx_lowrank.errors import InputError
from onnx_lowrank.feeds import Fitter
from onnx_lowrank.shapes import ConcreteShapes, InputSpec

__all__ = ["Source", "load_source", "source_name"]

Source = str | os.PathLike[str] | Iterable[Mapping[str, Any]]
"""A path, ``module:callable``, ``file.py:callable``, an iterable of feeds, or a reader."""


def source_name(source: Source) -> str:
    """How messages and the report call a source."""
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    return f"a {type(source).__name__} of feeds"


def load_source(
    source: Source,
    model: ir.Model,
    specs: Sequence[InputSpec],
    shapes: ConcreteShapes,
    *,
    limit: int,
    seed: int,
) -> Samples:
    """At most ``limit`` samples of a source, checked against the model.

    Raises:
        InputError: the source cannot be read, or does not fit the model's inputs.
    """
    names = [value.name or "" for value in model.graph.outputs]
    if isinstance(source, str | os.PathLike):
        text = os.fspath(source)
        module, colon, name = text.rpartition(":")
        if colon and name.isidentifier() and not Path(text).exists():
            feeds = _called(text, module, name)
        else:
            path = Path(text)
            return load_samples(path, specs, shapes, limit=limit, seed=seed, output_names=names)
    else:
        text = source_name(source)
        feeds = _feeds(source, text)
    fitter = Fitter(specs, shapes, names)
    fitted = [
        fitter.fit(feed, f"{text}: sample {number}", stacked=False)
        for number, feed in enumerate(itertools.islice(feeds, limit))
    ]
    if not fitted:
        raise InputError(f"{text}: expected at least one sample, came none")
    for number, feed in enumerate(fitted):
        fitter.inspect(feed, f"{text}: sample {number}")
    return Samples(text, fitted, (None,) * len(fitted), fitter.notes, len(fitted))


def _called(text: str, module: str, name: str) -> Iterator[Mapping[str, Any]]:
    """The feeds that a callable returns."""
    try:
        if module.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(module).stem, module)
            if spec is None or spec.loader is None or not Path(module).is_file():
                raise InputError(f"{text}: no such file {module}")
            loaded = importlib.util.module_from_spec(spec)
            sys.modules.setdefault(spec.name, loaded)
            spec.loader.exec_module(loaded)
        else:
            loaded = importlib.import_module(module)
        made = getattr(loaded, name)()
    except InputError:
        raise
    except Exception as error:  # the user's code
        raise InputError(f"{text}: {type(error).__name__}: {error}") from error
    return _feeds(made, text)


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
        except Exception as error:  # the user's code
            raise InputError(f"{text}: {type(error).__name__}: {error}") from error
        if not isinstance(feed, Mapping):
            raise InputError(
                f"{text}: expected a mapping from input names to arrays, came {type(feed).__name__}"
            )
        yield {str(name): np.asarray(array) for name, array in feed.items()}
