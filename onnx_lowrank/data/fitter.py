"""Fit arrays that come from files to the inputs of a model: names, types, shapes.

A type is converted only where every value survives (a float may be rounded to a shorter float);
each conversion, each array left aside and each guess that the data overrules is a note.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from onnx_lowrank.data.declared import InputSpec
from onnx_lowrank.data.labels import LABEL_NAMES, own_name
from onnx_lowrank.data.shapes import ConcreteShapes
from onnx_lowrank.errors import InputError, named
from onnx_lowrank.numerics.arrays import Array, sequence
from onnx_lowrank.phrases import listed, near_names

__all__ = ["Fitter", "is_floating", "require_fed"]


def is_floating(dtype: np.dtype[Any]) -> bool:
    """Whether a type is a float, the small ones of ml_dtypes (numpy's kind V) included."""
    return dtype.kind == "f" or (dtype.kind == "V" and "float" in dtype.name)


def require_fed(specs: Iterable[InputSpec]) -> None:
    """Refuse a model with an input that must be fed and is neither a tensor nor a sequence of them.

    Raises:
        InputError: naming that input and its type.
    """
    for spec in specs:
        if not spec.fed and not spec.optional:
            raise InputError(
                f"input {spec.name!r}: expected a tensor or a sequence of tensors, the model wants "
                f"{spec.kind}, which cannot be fed; use {named('check', False)} "
                f"{named('bench', False)}"
            )


class Fitter:
    """Checks and converts arrays for one model.

    Args:
        specs: the inputs of the model.
        shapes: the sizes that were given or assumed.
        output_names: arrays with these names are left aside.
        own_labels: whether labels among the arrays count; else they are left aside too.

    Raises:
        InputError: an input that must be fed cannot be.
    """

    def __init__(
        self,
        specs: Sequence[InputSpec],
        shapes: ConcreteShapes,
        output_names: Iterable[str],
        *,
        own_labels: bool = True,
    ) -> None:
        require_fed(specs)
        self.specs = {spec.name: spec for spec in specs if spec.fed}
        self._shapes = shapes
        self._outputs = frozenset(output_names)
        self._own_labels = own_labels
        self._notes: dict[str, None] = {}
        self._resized: dict[str, str] = {}
        self._not_finite: set[str] = set()

    @property
    def notes(self) -> tuple[str, ...]:
        """What was found so far, each once."""
        if not self._resized:
            return tuple(self._notes)
        assumed = listed(list(self._resized.values()), 4)
        return (*self._notes, f"the data's own sizes are used, not the assumed {assumed}")

    def note(self, text: str) -> None:
        """Add a note, once."""
        self._notes[text] = None

    def fit(self, arrays: Mapping[str, Array], where: str, *, stacked: bool) -> dict[str, Array]:
        """The arrays as the model wants them; an optional input may be missing.

        Args:
            arrays: name -> values; those of a sequence are an array of arrays, or one array whose
                axis 0 they lie along.
            where: the file, for messages.
            stacked: axis 0 holds samples and may have any size; a scalar input may have one.

        Raises:
            InputError: a name, type, rank or size is not what the model or an option asks for.
        """
        self._check_names(arrays, where)
        sizes: dict[str, tuple[int, str]] = {}
        fitted = {}
        for name, spec in self.specs.items():
            if name not in arrays:  # an optional one
                continue
            place = f"{where}: input {name!r}"
            if spec.kind == "sequence":
                fitted[name] = self._sequence(arrays[name], spec, place, stacked)
                continue
            array = self._convert(arrays[name], spec, place)
            self._check_shape(array, spec, place, stacked, sizes)
            fitted[name] = array
        # Those that the model itself wants empty are no lack of data.
        free = [array for name, array in fitted.items() if 0 not in (self.specs[name].shape or ())]
        if free and not any(array.size for array in free):
            raise InputError(f"{where}: expected data, got empty arrays only")
        return fitted

    def _sequence(self, given: Array, spec: InputSpec, where: str, stacked: bool) -> Array:
        """An array of arrays."""
        if stacked or given.ndim == 0:
            raise InputError(
                f"{where}: expected a sequence of tensors in each sample, which one array for all "
                "samples cannot hold; give a folder of test_data_set_*, a folder of .npz feeds "
                "whose arrays have the tensors along axis 0, or feeds from Python"
            )
        return sequence(
            self._convert(np.asarray(item), spec, f"{where}: element {number}")
            for number, item in enumerate(given)
        )

    def labels(self, arrays: Mapping[str, Array]) -> Array | None:
        """The labels given with the inputs."""
        name = own_name(arrays, {*self.specs, *self._outputs}) if self._own_labels else None
        return None if name is None else arrays[name]

    def inspect(self, feed: Mapping[str, Array], where: str) -> None:
        """Note NaN and Inf, once for each input."""
        for name, array in feed.items():
            if name in self._not_finite or not is_floating(array.dtype):
                continue
            bad = array.size - int(np.count_nonzero(np.isfinite(array)))
            if bad:
                self._not_finite.add(name)
                self.note(f"{where}: input {name!r} holds {bad} NaN or Inf of {array.size} values")

    def _check_names(self, arrays: Mapping[str, Array], where: str) -> None:
        missing = [n for n, spec in self.specs.items() if n not in arrays and not spec.optional]
        extra = [name for name in arrays if name not in self.specs]
        wrong = [name for name in extra if name not in self._outputs.union(LABEL_NAMES)]
        if missing or wrong:
            hints = [f"missing {name!r}" for name in missing[:3]]
            hints += [
                f"no input {name!r}, {near_names(name, missing or self.specs)}"
                for name in wrong[:3]
            ]
            raise InputError(
                f"{where}: expected arrays {_list(self.specs)}, got {_list(arrays)}: "
                + "; ".join(hints)
            )
        labels = own_name(extra, self._outputs) if self._own_labels else None
        for name in extra:
            what = "is taken for labels" if name == labels else "was left out"
            self.note(f"{where}: {name!r} is not an input of the model and {what}")

    def _convert(self, array: Array, spec: InputSpec, where: str) -> Array:
        wanted = spec.dtype
        if array.dtype.kind == "V" and array.dtype.names is None and not is_floating(array.dtype):
            # numpy stores the types of ml_dtypes as raw bytes of the same width.
            if wanted.kind == "V" and array.dtype.itemsize == wanted.itemsize:
                return array.view(wanted)
        elif array.dtype == wanted:
            return array
        if wanted.kind == "O" and array.dtype.kind in "US":
            text = array.astype(np.str_) if array.dtype.kind == "S" else array
            return text.astype(object)
        kinds = (_kind(array.dtype), _kind(wanted))
        if kinds[0] is None or kinds[1] is None or (kinds[0] == "float" and kinds[1] != "float"):
            raise InputError(f"{where}: expected {wanted}, got {array.dtype}")
        with np.errstate(all="ignore"):
            converted = array.astype(wanted)
        if kinds == ("float", "float"):
            same = np.array_equal(np.isfinite(converted), np.isfinite(array))
        else:
            same = bool(np.all(converted.astype(array.dtype) == array))
        if not same:
            raise InputError(
                f"{where}: expected {wanted}, got {array.dtype} with values that it cannot hold "
                f"({array.min()} to {array.max()})"
            )
        if array.dtype.newbyteorder("=") != wanted:
            self.note(f"input {spec.name!r}: {array.dtype.name} data was cast to {wanted.name}")
        return converted

    def _check_shape(
        self,
        array: Array,
        spec: InputSpec,
        where: str,
        stacked: bool,
        sizes: dict[str, tuple[int, str]],
    ) -> None:
        name = spec.name
        known = self._shapes.shapes.get(name)
        got = list(array.shape)
        if known is not None and len(got) != len(known):
            if not known and stacked and len(got) == 1:
                return
            raise InputError(f"{where}: expected rank {len(known)} {list(known)}, got {got}")
        for index, size in enumerate(got):
            declared = spec.shape[index] if spec.shape is not None else None
            guess = known is None or index in self._shapes.assumed.get(name, ())
            wanted = None if known is None else known[index]
            # Only a batch must hold something: the cache of a decoder is empty at its first step.
            if size == 0 and index == 0 and (stacked or wanted != 0):
                raise InputError(f"{where}: expected data, got an empty array {got}")
            if index == 0 and stacked:
                continue
            if not guess and size != wanted:
                reason = "in the model" if isinstance(declared, int) else "by the options"
                raise InputError(
                    f"{where}: axis {index} is fixed to {wanted} {reason}, got {size} in {got}"
                )
            if isinstance(declared, str):
                other, first = sizes.setdefault(declared, (size, name))
                if other != size:
                    raise InputError(
                        f"{where}: axis {index} is {declared!r}, which is {other} in {first!r}, "
                        f"got {size}"
                    )
            if guess and wanted is not None and size != wanted:
                self._resized[name] = f"{name} {list(known or ())}"


def _kind(dtype: np.dtype[Any]) -> str | None:
    if is_floating(dtype):
        return "float"
    if dtype.kind in "iub" or (dtype.kind == "V" and "int" in dtype.name):
        return "int"
    return None


def _list(names: Iterable[str]) -> str:
    return "[" + ", ".join(sorted(names)) + "]"
