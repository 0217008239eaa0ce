"""Samples of files: read and checked where they are chosen, and read again when they are asked for.

``.npz``                     one array an input; axis 0 holds the samples, cut to the batch
folder of ``.npz``           each file is one complete feed
``.npy``                     for a model with one input; as an ``.npz`` with that one array
folder ``test_data_set_*``   ``input_N.pb``, and ``output_N.pb`` where present

Labels come from a file of their own, or from an array of an ``.npz`` (see
`onnx_lowrank.data.labels`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from onnx_lowrank.data.declared import InputSpec
from onnx_lowrank.data.fitter import Fitter
from onnx_lowrank.data.labels import all_or_none, cut, read_labels
from onnx_lowrank.data.sample_files import (
    numbered,
    read_npy,
    read_npz,
    read_value,
)
from onnx_lowrank.data.samples import Expected, Lazy, Samples
from onnx_lowrank.data.shapes import ConcreteShapes
from onnx_lowrank.errors import InputError, named
from onnx_lowrank.files import exists
from onnx_lowrank.numerics.arrays import Array, Feed, flat

__all__ = ["load_samples", "sample_files", "stacked_samples"]


def load_samples(
    path: Path,
    specs: Sequence[InputSpec],
    shapes: ConcreteShapes,
    *,
    limit: int,
    seed: int,
    outputs: Sequence[InputSpec],
    option: str = "data",
    labels: Path | None = None,
) -> Samples:
    """Samples from a file or a folder, see the module's text for the forms.

    Every chosen sample is read and checked here, and read again when it is asked for.

    Args:
        path: the file or folder.
        specs: the inputs of the model, in its order.
        shapes: sizes; axis 0 is the batch, and guesses give way to the data's own sizes.
        limit: more samples than this are cut to a seeded choice in their order.
        seed: of that choice.
        outputs: those of the model, in its order.
        option: which argument named the path, for messages.
        labels: file of the labels of all samples; default: those among the data.

    Raises:
        InputError: the data cannot be read or do not fit; names file, input, expected and found.
    """
    names = [output.name for output in outputs]
    fitter = Fitter(specs, shapes, names, own_labels=labels is None)
    if not exists(path):
        raise InputError(f"{named(option, path)}: no such file or folder")
    if path.is_dir():
        return _from_folder(path, fitter, specs, limit, seed, outputs, option, labels)
    if path.suffix == ".npz":
        return stacked_samples(
            str(path), read_npz(path), fitter, shapes, limit=limit, seed=seed, labels=labels
        )
    if path.suffix == ".npy":
        if len(fitter.specs) != 1:
            raise InputError(
                f"{path}: an .npy serves a model with one input, this one has {len(fitter.specs)} "
                f"({', '.join(fitter.specs)}); use an .npz with one array for each"
            )
        arrays = {next(iter(fitter.specs)): read_npy(path)}
        return stacked_samples(
            str(path), arrays, fitter, shapes, limit=limit, seed=seed, labels=labels
        )
    raise InputError(
        f"{named(option, path)}: expected .npz, .npy or a folder of .npz files or test_data_set_*, "
        f"got a file {path.suffix or 'without suffix'!r}"
    )


def sample_files(path: Path) -> tuple[Path, ...]:
    """The files that samples of a file or a folder are read from, whatever is in them."""
    if not exists(path) or not path.is_dir():
        return (path,)
    patterns = ("*.npz", "*.pb", "test_data_set_*/*.pb")
    return tuple(file for pattern in patterns for file in path.glob(pattern))


def _choose(total: int, limit: int, seed: int, fitter: Fitter) -> list[int]:
    if total <= limit:
        return list(range(total))
    fitter.note(f"{limit} of {total} samples are used, chosen with seed {seed}")
    chosen = np.random.default_rng(seed).choice(total, limit, replace=False)
    return sorted(int(index) for index in chosen)


def stacked_samples(
    source: str,
    arrays: Mapping[str, Array],
    fitter: Fitter,
    shapes: ConcreteShapes,
    *,
    limit: int,
    seed: int,
    labels: Path | None,
) -> Samples:
    """Samples that lie along axis 0 of one array an input.

    Args:
        source: what messages and the report call them.
        arrays: input -> array; an input without axes is the same for every sample.
        fitter: for the model's inputs.
        shapes: of the inputs; axis 0 is the batch.
        limit: more samples than this are cut to a seeded choice in their order.
        seed: of that choice.
        labels: file of the labels of all samples; default: those among the arrays.

    Raises:
        InputError: the arrays do not fit the model, or each other.
    """
    fitted = fitter.fit(arrays, source, stacked=True)
    steps: dict[str, int | None] = {}  # rows that one sample takes; None: an element, unstacked
    counts: dict[str, int] = {}
    for name, array in fitted.items():
        known = shapes.shapes.get(name)
        if array.ndim == 0:
            continue
        steps[name] = None if known == () else max(1, known[0]) if known else 1
        batch = steps[name] or 1
        counts[name], left = divmod(len(array), batch)
        if not counts[name]:
            raise InputError(
                f"{source}: input {name!r}: expected at least one batch of {batch} along axis 0, "
                f"got {len(array)}"
            )
        if left:
            fitter.note(
                f"{source}: input {name!r}: {left} of {len(array)} rows do not fill a batch of "
                f"{batch} and were left out"
            )
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise InputError(f"{source}: expected as many samples for every input, got {found}")
    total = min(counts.values(), default=1)
    of_each = fitter.labels(arrays) if labels is None else read_labels(labels)
    of_sample = None
    if of_each is not None:
        rows = {len(fitted[name]): step or 1 for name, step in steps.items()}
        where = f"{source}: labels" if labels is None else named("labels", labels)
        of_sample = cut(of_each, where, total, rows)
    chosen = _choose(total, limit, seed, fitter)

    def feed(index: int) -> Feed:
        row = chosen[index]
        result: dict[str, Array] = {}
        for name, array in fitted.items():
            if name not in steps:
                result[name] = array
            elif (step := steps[name]) is None:
                result[name] = np.asarray(array[row])
            else:
                result[name] = np.asarray(array[row * step : (row + 1) * step])
        return result

    feeds = Lazy(len(chosen), feed)
    for item in feeds:
        fitter.inspect(item, source)
    return Samples(
        source,
        feeds,
        (None,) * len(chosen),
        fitter.notes,
        total,
        None if of_sample is None else tuple(of_sample(row) for row in chosen),
    )


def _from_folder(
    path: Path,
    fitter: Fitter,
    specs: Sequence[InputSpec],
    limit: int,
    seed: int,
    outputs: Sequence[InputSpec],
    option: str,
    labels: Path | None,
) -> Samples:
    """Samples that are a file or a folder each."""
    sets = [item for item in path.glob("test_data_set_*") if item.is_dir()]
    sets.sort(key=lambda item: [int(part) for part in re.findall(r"\d+", item.name)])
    archives = sorted(item for item in path.glob("*.npz") if item.is_file())
    if numbered(path, "input"):
        sets = [path]
    if sets and archives:
        fitter.note(f"{path}: {len(archives)} .npz files beside the .pb test data were left out")
    items = sets or archives
    if not items:
        raise InputError(
            f"{named(option, path)}: expected .npz files, test_data_set_* folders or input_0.pb, "
            "found "
            "none"
        )
    numbers = _choose(len(items), limit, seed, fitter)
    chosen = [items[index] for index in numbers]

    def arrays(index: int) -> Mapping[str, Array]:
        item = chosen[index]
        return _read_set(item, "input", specs) if sets else read_npz(item)

    def feed(index: int) -> Feed:
        return fitter.fit(arrays(index), str(chosen[index]), stacked=False)

    def stored(index: int) -> Expected:
        found = _read_set(chosen[index], "output", outputs)
        several = {spec.name for spec in outputs if spec.kind == "sequence"}
        return {n: flat(a) if n in several else a for n, a in found.items()} or None

    own: list[Array | None] = []
    for index, item in enumerate(chosen):
        read = arrays(index)
        fitter.inspect(fitter.fit(read, str(item), stacked=False), str(item))
        own.append(fitter.labels(read))
    if labels is None:
        of_each = all_or_none(own, lambda index: str(chosen[index]))
    else:
        every = read_labels(labels)
        each, left = divmod(len(every), len(items))
        steps = {} if left or not each else {len(every): each}
        of_sample = cut(every, named("labels", labels), len(items), steps)
        of_each = [of_sample(number) for number in numbers]
    expected = Lazy(len(chosen), stored) if sets else (None,) * len(chosen)
    for _ in expected:  # a broken file shows now, not in the middle of the check
        pass
    feeds = Lazy(len(chosen), feed)
    return Samples(
        str(path),
        feeds,
        expected,
        fitter.notes,
        len(items),
        None if of_each is None else tuple(of_each),
    )


def _read_set(folder: Path, stem: str, specs: Sequence[InputSpec]) -> dict[str, Array]:
    """Name -> array of ``stem_N.pb``: by the tensor's own name, else by its number.

    Values of kinds that no array can hold are left out, and those that hold nothing.
    """
    arrays: dict[str, Array] = {}
    names = [spec.name for spec in specs]
    for number, file in numbered(folder, stem).items():
        spec = specs[number] if number < len(specs) else None
        if spec is not None and not spec.fed:
            continue
        own, array = read_value(
            file,
            is_sequence=spec is not None and spec.kind == "sequence",
            optional=spec is not None and spec.optional,
        )
        if own not in names and number >= len(names):
            raise InputError(
                f"{file}: the model has {len(names)} {stem}s ({', '.join(names)}), "
                f"expected no {stem}_{number}.pb"
            )
        name = own if own in names else names[number]
        if name in arrays:
            raise InputError(f"{file}: expected one file for each {stem}, got {name!r} twice")
        if array is not None:
            arrays[name] = array
    return arrays
