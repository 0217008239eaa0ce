"""Labels of samples: from a file of their own, or from a key of the data that is no input.

``.npy``, ``.npz``    one array, axis 0 as the rows of the samples
``.txt``, ``.csv``    one label a line; whole numbers, other numbers or words
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from onnx_lowrank.data.sample_files import (
    read_npy,
    read_npz,
)
from onnx_lowrank.errors import InputError, named
from onnx_lowrank.files import is_file
from onnx_lowrank.numerics.arrays import Array

__all__ = ["LABEL_NAMES", "all_or_none", "cut", "own_name", "read_labels"]

LABEL_NAMES = ("labels", "label", "targets", "target", "y")
"""Keys of the data that are taken for labels, the first one there is."""


def own_name(names: Collection[str], taken: Collection[str]) -> str | None:
    """The name under which data hold labels; None if they hold none.

    Args:
        names: of the arrays that there are.
        taken: names that mean something else, such as the model's inputs and outputs.
    """
    return next((name for name in LABEL_NAMES if name in names and name not in taken), None)


def read_labels(path: Path) -> Array:
    """The labels of a file, shape [rows, …].

    Raises:
        InputError: the file cannot be read, or is something else.
    """
    option = named("labels", path)
    if not is_file(path):
        raise InputError(f"{option}: no such file")
    if path.suffix == ".npy":
        labels = read_npy(path)
    elif path.suffix == ".npz":
        arrays = read_npz(path)
        if len(arrays) > 1:
            raise InputError(f"{option}: expected one array, got {', '.join(arrays)}")
        labels = next(iter(arrays.values()))
    elif path.suffix in (".txt", ".csv"):
        labels = _lines(path, option)
    else:
        raise InputError(
            f"{option}: expected .npy, .npz, .txt or .csv, got a file "
            f"{path.suffix or 'without suffix'!r}"
        )
    if labels.ndim == 0 or labels.size == 0:
        raise InputError(f"{option}: expected labels along axis 0, got shape {list(labels.shape)}")
    return labels


def _lines(path: Path, option: str) -> Array:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except OSError as error:
        raise InputError(f"{option}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(f"{option}: expected text in UTF-8: {error}") from error
    while lines and not lines[-1]:
        lines.pop()
    if len(lines) > 1 and lines[0].lower() in LABEL_NAMES:
        del lines[0]  # the head of a column
    for number, line in enumerate(lines, 1):
        if not line or (path.suffix == ".csv" and "," in line):
            raise InputError(f"{option}: line {number}: expected one label, got {line!r}")
    for convert in (int, float):
        try:
            return np.array([convert(line) for line in lines])
        except (ValueError, OverflowError):
            continue
    return np.array(lines)


def cut(labels: Array, where: str, total: int, steps: Mapping[int, int]) -> Callable[[int], Array]:
    """Labels cut as the samples are.

    Args:
        labels: shape [rows, …].
        where: what they are, for messages.
        total: how many samples there are.
        steps: rows of an input -> how many of them make one sample.

    Returns:
        From the number of a sample to its labels.

    Raises:
        InputError: there are neither as many labels as rows nor as samples; it names both counts.
    """
    count = len(labels) if labels.ndim else 0
    step = {total: 1, **steps}.get(count)
    if step is None:
        rows = sorted({total, *steps})
        wanted = " or ".join(str(number) for number in rows)
        raise InputError(f"{where}: expected {wanted} labels, one for each sample, got {count}")
    return lambda index: np.asarray(labels[index * step : (index + 1) * step])


def all_or_none(found: Sequence[Array | None], name: Callable[[int], str]) -> list[Array] | None:
    """The labels given with each sample; None if none has any.

    Args:
        found: of each sample.
        name: of a sample, for messages.

    Raises:
        InputError: only some have labels.
    """
    labels = [np.atleast_1d(array) for array in found if array is not None]
    if labels and len(labels) < len(found):
        bare = next(index for index, array in enumerate(found) if array is None)
        raise InputError(
            f"{name(bare)}: expected labels for every sample, got {len(labels)} for {len(found)}"
        )
    return labels or None
