"""Where samples come from: files and folders, or a callable of the user's."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from onnx_lowrank.data.fitter import Fitter
from onnx_lowrank.data.labels import all_or_none
from onnx_lowrank.data.samples import Samples, load_samples, sample_files
from onnx_lowrank.data.shapes import ConcreteShapes, InputSpec
from onnx_lowrank.data.usercode import UserCode, failure
from onnx_lowrank.errors import InputError
from onnx_lowrank.numerics.arrays import Array

__all__ = [
    "SampleSource",
    "code_files",
    "load_source",
    "same_source",
    "source_files",
    "source_name",
]

SampleSource = str | os.PathLike[str] | Iterable[Mapping[str, Any]]
"""A path, ``module:callable``, ``file.py:callable``, an iterable of feeds, or a reader."""


def source_name(source: SampleSource) -> str:
    """How messages and the report call a source."""
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    return f"a {type(source).__name__} of feeds"


def source_files(source: SampleSource) -> tuple[Path, ...]:
    """The files that a source, or a function in a file, is read from; none that is not on disk."""
    if not isinstance(source, str | os.PathLike):
        return ()
    text = os.fspath(source)
    return sample_files(Path(text)) if UserCode.parse(text) is None else code_files(text)


def code_files(named: object) -> tuple[Path, ...]:
    """The file of ``file.py:callable``; of anything else none."""
    code = UserCode.parse(named) if isinstance(named, str) else None
    return () if code is None or not code.module.endswith(".py") else (Path(code.module),)


def same_source(one: SampleSource | None, other: SampleSource | None) -> bool:
    """Whether both are the same samples: one object, or one place on disk."""
    if isinstance(one, str | os.PathLike) and isinstance(other, str | os.PathLike):
        return os.path.realpath(one) == os.path.realpath(other)
    return one is other


def load_source(
    source: SampleSource,
    model: ir.Model,
    specs: Sequence[InputSpec],
    shapes: ConcreteShapes,
    *,
    limit: int,
    seed: int,
    option: str = "--data",
    labels: Path | None = None,
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
        labels: file of the labels of all samples; default: those among the samples.

    Raises:
        InputError: the source cannot be read, or does not fit the model's inputs; or labels in a
            file are to go with feeds that come from a callable, of which nobody knows the number.
    """
    names = [value.name or "" for value in model.graph.outputs]
    fitter = Fitter(specs, shapes, names)
    if isinstance(source, str | os.PathLike):
        text = os.fspath(source)
        code = UserCode.parse(text)
        if code is None:
            return load_samples(
                Path(text),
                specs,
                shapes,
                limit=limit,
                seed=seed,
                output_names=names,
                option=option,
                labels=labels,
            )
        _check_no_file(labels, text)
        with code.importable():
            fitted, own = _fitted(_called(code), text, fitter, limit)
    else:
        text = source_name(source)
        _check_no_file(labels, text)
        fitted, own = _fitted(_feeds(source, text), text, fitter, limit)
    if not fitted:
        raise InputError(f"{text}: expected at least one sample, came none")
    for number, feed in enumerate(fitted):
        fitter.inspect(feed, f"{text}: sample {number}")
    named = all_or_none(own, lambda number: f"{text}: sample {number}")
    return Samples(
        text,
        fitted,
        (None,) * len(fitted),
        fitter.notes,
        len(fitted),
        None if named is None else tuple(named),
    )


def _check_no_file(labels: Path | None, text: str) -> None:
    if labels is not None:
        raise InputError(
            f"--labels {labels}: goes with samples in files; {text} has to yield each sample's "
            "labels with its inputs, as 'labels'"
        )


def _fitted(
    feeds: Iterator[Mapping[str, Any]], text: str, fitter: Fitter, limit: int
) -> tuple[list[dict[str, Array]], list[Array | None]]:
    """The feeds as the model wants them, and the labels that came with each."""
    fitted, labels = [], []
    for number, feed in enumerate(itertools.islice(feeds, limit)):
        fitted.append(fitter.fit(feed, f"{text}: sample {number}", stacked=False))
        labels.append(fitter.labels(feed))
    return fitted, labels


def _called(code: UserCode) -> Iterator[Mapping[str, Any]]:
    """The feeds that a callable returns."""
    make = code.load()
    try:
        made = make()
    except (Exception, SystemExit) as error:  # the user's code
        raise InputError(failure(code.text, error)) from error
    return _feeds(made, code.text)


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
            raise InputError(failure(text, error)) from error
        if not isinstance(feed, Mapping):
            raise InputError(
                f"{text}: expected a mapping from input names to arrays, came {type(feed).__name__}"
            )
        yield {str(name): np.asarray(array) for name, array in feed.items()}
