"""Sources of samples: files and folders, or a callable of the user's."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from onnx_lowrank.data.declared import InputSpec, output_specs
from onnx_lowrank.data.fitter import Fitter
from onnx_lowrank.data.labels import LABEL_NAMES, all_or_none
from onnx_lowrank.data.loading import load_samples, sample_files, stacked_samples
from onnx_lowrank.data.samples import Samples
from onnx_lowrank.data.shapes import ConcreteShapes
from onnx_lowrank.data.usercode import UserCode, failure
from onnx_lowrank.errors import InputError, named
from onnx_lowrank.numerics.arrays import Array, sequence

__all__ = [
    "SampleSource",
    "code_files",
    "load_source",
    "same_source",
    "source_files",
    "source_name",
]

SampleSource = str | os.PathLike[str] | Mapping[str, Any] | Iterable[Any]
"""A path, ``module:callable``, ``file.py:callable``, arrays, an iterable of feeds, or a reader.

Arrays are a mapping from inputs to arrays; as in an ``.npz``, axis 0 holds the samples.  A feed is
a mapping too, or, as a DataLoader has them, an array for the only input, or a sequence of one array
for each input in the model's order and, if there is one more, the labels.
"""


def source_name(source: SampleSource) -> str:
    """How messages and the report call a source."""
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    what = "arrays" if isinstance(source, Mapping) else "feeds"
    return f"a {type(source).__name__} of {what}"


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
    option: str = "data",
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
        option: which argument named the source, for messages.
        labels: file of the labels of all samples; default: those among the samples.

    Raises:
        InputError: the source cannot be read, or does not fit the model's inputs; or labels are
            given as a file and feeds by a callable, whose number is not known.
    """
    outputs = output_specs(model)
    fitter = Fitter(specs, shapes, [output.name for output in outputs])
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
                outputs=outputs,
                option=option,
                labels=labels,
            )
        _check_no_file(labels, text)
        with code.importable():
            fitted, own = _fitted(_called(code, specs), text, fitter, limit)
    elif isinstance(source, Mapping):
        arrays = _arrays(source, source_name(source))
        return stacked_samples(
            source_name(source), arrays, fitter, shapes, limit=limit, seed=seed, labels=labels
        )
    else:
        text = source_name(source)
        _check_no_file(labels, text)
        fitted, own = _fitted(_feeds(source, text, specs), text, fitter, limit)
    if not fitted:
        raise InputError(f"{text}: expected at least one sample, got none")
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
            f"{named('labels', labels)}: expected samples in files; {text} must yield the labels "
            "of each sample with its inputs, as 'labels'"
        )


def _fitted(
    feeds: Iterator[Mapping[str, Any]], text: str, fitter: Fitter, limit: int
) -> tuple[list[dict[str, Array]], list[Array | None]]:
    """The feeds as the model wants them, and the labels given with each."""
    fitted, labels = [], []
    for number, feed in enumerate(itertools.islice(feeds, limit)):
        fitted.append(fitter.fit(feed, f"{text}: sample {number}", stacked=False))
        labels.append(fitter.labels(feed))
    return fitted, labels


def _called(code: UserCode, specs: Sequence[InputSpec]) -> Iterator[Mapping[str, Any]]:
    """The feeds that a callable returns."""
    make = code.load()
    try:
        made = make()
    except (Exception, SystemExit) as error:  # the user's code
        raise InputError(failure(code.text, error)) from error
    return _feeds(made, code.text, specs)


def _feeds(made: Any, text: str, specs: Sequence[InputSpec]) -> Iterator[Mapping[str, Any]]:
    """Feeds from an iterable, or from an onnxruntime CalibrationDataReader."""
    items: Any = iter(made.get_next, None) if hasattr(made, "get_next") else made
    try:
        items = iter(items)
    except TypeError as error:
        raise InputError(
            f"{text}: expected an iterable of feeds or a CalibrationDataReader, got "
            f"{type(made).__name__}"
        ) from error
    while True:
        try:
            feed = next(items)
        except StopIteration:
            return
        except (Exception, SystemExit) as error:  # the user's code
            raise InputError(failure(text, error)) from error
        yield _arrays(feed if isinstance(feed, Mapping) else _named(feed, text, specs), text)


def _named(feed: Any, text: str, specs: Sequence[InputSpec]) -> Mapping[str, Any]:
    """A feed without names: the only input, or one array for each input and then the labels."""
    if hasattr(feed, "__array__") and len(specs) == 1:
        return {specs[0].name: feed}
    if isinstance(feed, list | tuple) and len(feed) in (len(specs), len(specs) + 1):
        parts = zip([*(spec.name for spec in specs), LABEL_NAMES[0]], feed, strict=False)
        return dict(parts)
    raise InputError(
        f"{text}: expected a mapping from input names to arrays, or a sequence of "
        f"{len(specs)} arrays for {', '.join(spec.name for spec in specs)}, got "
        f"{_shown(feed)}"
    )


def _shown(feed: Any) -> str:
    kind = type(feed).__name__
    return f"a {kind} of {len(feed)}" if isinstance(feed, list | tuple) else kind


def _arrays(feed: Mapping[str, Any], text: str) -> dict[str, Array]:
    """The values as arrays; those of a framework are copied to the CPU where it allows that."""
    arrays = {}
    for name, value in feed.items():
        try:
            array = np.asarray(value)
        except (TypeError, ValueError, RuntimeError) as error:
            several = isinstance(value, list | tuple)
            if not several or not all(hasattr(item, "__array__") for item in value):
                raise InputError(failure(f"{text}: {name!r}", error)) from error
            array = sequence(map(np.asarray, value))  # of different shapes
        if array.dtype == object and not all(isinstance(i, str | np.ndarray) for i in array.flat):
            raise InputError(f"{text}: {name!r}: expected an array, got {type(value).__name__}")
        arrays[str(name)] = array
    return arrays
