"""Seeded random input that a model can run on.

Floats are standard normal; masks are all ones, those of truth values that mark padding all false;
unsigned bytes, which are images, use their whole range; a length is the size of the axis that it
names (`onnx_lowrank.data.lengths`); a single integer is one of those that the graph compares it
with, if any; other integers stay below the smallest table that they index, or are 0 and 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from onnx_lowrank.data.declared import InputSpec
from onnx_lowrank.data.fitter import is_floating, require_fed
from onnx_lowrank.data.lengths import Length
from onnx_lowrank.data.shapes import ConcreteShapes
from onnx_lowrank.errors import InputError, named
from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.phrases import listed

__all__ = ["LARGEST", "check_random", "random_feed", "random_note"]

LARGEST = 2 << 30
"""Bytes of an input that are made at random at most."""


def check_random(specs: Sequence[InputSpec], shapes: ConcreteShapes) -> None:
    """Refuse inputs for which no random data can be made.

    Raises:
        InputError: an input of unknown rank without a given shape, one of strings, one that is too
            large, or one that must be fed and is no tensor.
    """
    require_fed(specs)
    for spec in specs:
        if spec.kind == "sequence" and not spec.optional:
            raise InputError(
                f"input {spec.name!r}: expected a tensor, the model wants a sequence of tensors, "
                f"which cannot be made at random; give samples with {named('data')}"
            )
        if not spec.drawn:
            continue
        if spec.name not in shapes.shapes:
            option = named("input_shapes", f"{spec.name}:…")
            raise InputError(
                f"input {spec.name!r}: the model does not give its rank; "
                f"give its shape with {option} or samples with {named('data')}"
            )
        shape = shapes.shapes[spec.name]
        size = math.prod(shape) * spec.dtype.itemsize
        if size > LARGEST:
            raise InputError(
                f"input {spec.name!r}: expected at most {LARGEST >> 30} GiB to make at random, "
                f"got {size / 2**30:.3g} GiB for shape {list(shape)}; give samples with "
                f"{named('data')}, or a smaller shape with {named('input_shapes')}"
            )
        if spec.dtype.kind == "O":
            raise InputError(
                f"input {spec.name!r}: expected numbers, the model wants strings, which cannot "
                f"be made at random; give samples with {named('data')}"
            )


def random_feed(
    specs: Sequence[InputSpec],
    shapes: ConcreteShapes,
    bounds: Mapping[str, int],
    seed: tuple[int, int],
    choices: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, Array]:
    """One feed; the same seed gives the same values.

    Args:
        specs: the inputs.
        shapes: their sizes.
        bounds: input -> number that its values must stay below.
        seed: the seed of the run and the number of the sample.
        choices: input -> the numbers that its values are among, where these are known.
    """
    rng = np.random.default_rng(seed)
    found = {}
    for spec in specs:
        if spec.drawn:
            shape, among = shapes.shapes[spec.name], (choices or {}).get(spec.name)
            length = shapes.lengths.get(spec.name)
            if length is not None:
                found[spec.name] = np.full(shape, length.size, spec.dtype)
            elif among:
                found[spec.name] = np.asarray(rng.choice(among, shape)).astype(spec.dtype)
            else:
                found[spec.name] = _values(spec, shape, bounds.get(spec.name), rng)
    return found


def _values(
    spec: InputSpec, shape: tuple[int, ...], bound: int | None, rng: np.random.Generator
) -> Array:
    dtype = spec.dtype
    if _is_mask(spec):
        return np.zeros(shape, dtype) if _of_padding(spec) else np.ones(shape, dtype)
    if dtype.kind == "b":
        return np.asarray(rng.random(shape) < 0.5)
    if dtype.kind == "c":
        values = rng.standard_normal(shape) + 1j * rng.standard_normal(shape)
        return np.asarray(values).astype(dtype)
    if is_floating(dtype):
        return np.asarray(rng.standard_normal(shape)).astype(dtype)
    if bound is None:
        bound = 256 if dtype == np.uint8 else 2
    elif dtype.itemsize < 4:
        bound = min(bound, np.iinfo(dtype).max + 1)
    return np.asarray(rng.integers(0, bound, shape)).astype(dtype)


def _is_mask(spec: InputSpec) -> bool:
    return "mask" in spec.name.lower()


def _of_padding(spec: InputSpec) -> bool:
    """Whether ones of a mask mark padding, as in ``key_padding_mask`` of PyTorch's attention."""
    return spec.dtype.kind == "b" and "pad" in spec.name.lower()


def random_note(
    specs: Sequence[InputSpec],
    bounds: Mapping[str, int],
    seed: int,
    choices: Mapping[str, Sequence[int]] | None = None,
    lengths: Mapping[str, Length] | None = None,
) -> str:
    """The random input in one sentence."""
    groups: dict[str, list[str]] = {}
    for spec in specs:
        if not spec.drawn:
            continue
        if _is_mask(spec):
            text = "all false, no padding" if _of_padding(spec) else "all ones"
        elif lengths and spec.name in lengths:
            text = f"always {lengths[spec.name]}"
        elif choices and spec.name in choices:
            text = f"always {' or '.join(map(str, choices[spec.name]))}"
        elif spec.dtype.kind == "b":
            text = "random truth values"
        elif is_floating(spec.dtype) or spec.dtype.kind == "c":
            text = "standard normal"
        else:
            top = bounds.get(spec.name, 256 if spec.dtype == np.uint8 else 2)
            text = f"integers from 0 to {top - 1}"
        groups.setdefault(text, []).append(spec.name)
    parts = [f"{listed(names, 3)} {text}" for text, names in groups.items()]
    return f"random input (seed {seed}), not real data: {'; '.join(parts)}"
