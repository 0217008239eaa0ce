"""Concrete input shapes: what the model fixes, what the user gave, what has to be assumed.

Order of authority: a size that the model fixes, then one that the user gave, then a
guess.  A symbolic dimension has the same size everywhere.  Every guess is reported as a note.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from onnx_lowrank.data.cache import PAST
from onnx_lowrank.data.declared import InputSpec
from onnx_lowrank.data.lengths import Length
from onnx_lowrank.errors import InputError, UsageError, named
from onnx_lowrank.phrases import listed, near_names

__all__ = [
    "IMAGE_SIZES",
    "SEQUENCE",
    "ConcreteShapes",
    "concrete_shapes",
    "parse_dims",
    "parse_input_shapes",
]

SEQUENCE = 64
"""Length assumed for sequences and for whatever else has no better guess."""
IMAGE_SIZES = ((224, 224), (48, 320), (32, 320), (640, 640))
"""Height and width to assume for images, in the order of trial: photos, lines of text, scenes."""
LINE_WIDTH = 320
"""Width assumed for an image whose height is fixed and small: a line of text."""
AUDIO = 16_000
"""Samples assumed for a raw waveform: one second at 16 kHz."""

_BATCH_NAME = re.compile(r"batch|^(n|b|bs)$", re.IGNORECASE)
_SEQUENCE_NAME = re.compile(r"seq|token|length|^(s|t|l|time|len)$|_len$", re.IGNORECASE)
_AUDIO_NAME = re.compile(r"audio|wave|pcm|samples", re.IGNORECASE)
_CHANNELS = (1, 3, 4)
# What the exporters of decoders call their inputs.
_TOKEN_INPUT = re.compile(r"^(decoder_)?(input_ids|inputs_embeds)$")
_MASK_INPUT = re.compile(r"^attention_mask$")


@dataclass(frozen=True)
class ConcreteShapes:
    """Sizes to run the model with.

    Attributes:
        shapes: input name -> sizes.  An input of unknown rank stands here only where the user
            gave its shape; one that is not a tensor never does.
        dims: name of a symbolic dimension -> its size.
        notes: every assumption, one sentence each.
        assumed: input name -> the axes whose size is a guess.
        lengths: input name -> the size of another one that it is at random.
    """

    shapes: dict[str, tuple[int, ...]]
    dims: dict[str, int]
    notes: tuple[str, ...] = ()
    assumed: dict[str, frozenset[int]] = field(default_factory=dict)
    lengths: dict[str, Length] = field(default_factory=dict)


def parse_input_shapes(texts: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """``["x:1,128"]`` -> ``{"x": (1, 128)}``; a name may hold colons, the last one separates.

    Raises:
        UsageError: a text is not of that form, or a name is given twice.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for text in texts:
        name, colon, sizes = text.rpartition(":")
        numbers = [_size(part) for part in sizes.split(",")]
        if not colon or not name or None in numbers:
            raise UsageError(
                f"{named('input_shapes', text)}: expected name:size,size,… such as input_ids:1,128 "
                "with whole numbers from 0"
            )
        if name in shapes:
            raise UsageError(
                f"{named('input_shapes', text)}: the shape of {name!r} was given before"
            )
        shapes[name] = tuple(number for number in numbers if number is not None)
    return shapes


def parse_dims(texts: Sequence[str]) -> dict[str, int]:
    """``["batch=1"]`` -> ``{"batch": 1}``; the last equals sign separates.

    Raises:
        UsageError: a text is not of that form, or a name is given twice.
    """
    dims: dict[str, int] = {}
    for text in texts:
        name, equals, size = text.rpartition("=")
        number = _size(size)
        if not equals or not name or number is None:
            raise UsageError(
                f"{named('dims', text)}: expected name=size such as batch=1 with a whole number "
                "from 0"
            )
        if name in dims:
            raise UsageError(f"{named('dims', text)}: the size of {name!r} was given before")
        dims[name] = number
    return dims


def _size(text: str) -> int | None:
    text = text.strip()
    return int(text) if text.isascii() and text.isdecimal() else None


def concrete_shapes(
    specs: Sequence[InputSpec],
    input_shapes: Mapping[str, tuple[int, ...]],
    dims: Mapping[str, int],
    *,
    image: tuple[int, int] = IMAGE_SIZES[0],
    length: int = SEQUENCE,
    state: int | None = None,
) -> ConcreteShapes:
    """Give every axis of every tensor input a size.

    Args:
        specs: the inputs of the model.
        input_shapes: input name -> sizes that the user gave.
        dims: symbolic dimension -> size that the user gave.
        image: height and width to assume for images.
        length: what to assume for sequences, and where there is no better guess.
        state: what to assume for an axis between two fixed ones, such as the batch of a recurrent
            state [2, ?, 128]; None for ``length``.

    Raises:
        InputError: an unknown input or dimension, a wrong rank, a size other than the one that
            the model fixes, or two sizes for one symbolic dimension.
    """
    values = _given_dims(specs, dims)
    source = {name: f"{named('dims', f'{name}={size}')}" for name, size in values.items()}
    tensors = {spec.name: spec for spec in specs if spec.drawn}
    for name, sizes in input_shapes.items():
        if name not in tensors:
            raise InputError(
                f"{named('input_shapes')}: the model has no tensor input {name!r}; "
                + near_names(name, tensors)
            )
        _bind(tensors[name], sizes, values, source)

    shapes: dict[str, tuple[int, ...]] = {}
    assumed: dict[str, frozenset[int]] = {}
    guessed: set[str] = set()
    _step(tensors, values, guessed)
    for spec in tensors.values():
        if spec.name in input_shapes:
            shapes[spec.name] = tuple(input_shapes[spec.name])
            assumed[spec.name] = frozenset()
        elif spec.shape is not None:
            shapes[spec.name], assumed[spec.name] = _resolve(
                spec, spec.shape, values, guessed, _Guess(image, length, state)
            )
    notes = _notes(tensors, shapes, assumed)
    return ConcreteShapes(shapes, values, notes, assumed)


def _given_dims(specs: Sequence[InputSpec], dims: Mapping[str, int]) -> dict[str, int]:
    axes = [axis for spec in specs for axis in spec.shape or () if isinstance(axis, str)]
    # "past + sequence" is set by its terms as well as by itself.
    known = dict.fromkeys([*axes, *(term for axis in axes for term in _terms(axis))])
    for name in dims:
        if name not in known:
            raise InputError(
                f"{named('dims', f'{name}={dims[name]}')}: no input has a dimension {name!r}; "
                + near_names(name, known)
            )
    return dict(dims)


def _bind(
    spec: InputSpec, sizes: tuple[int, ...], values: dict[str, int], source: dict[str, str]
) -> None:
    """Check the sizes of one input and note the symbolic sizes that follow from it."""
    text = f"{spec.name}:{','.join(map(str, sizes))}"
    if spec.shape is None:
        return
    if len(spec.shape) != len(sizes):
        raise InputError(
            f"{named('input_shapes', text)}: expected {len(spec.shape)} sizes for "
            f"{_text(spec.shape)}, "
            f"got {len(sizes)}"
        )
    for index, (axis, size) in enumerate(zip(spec.shape, sizes, strict=True)):
        if isinstance(axis, int) and axis != size:
            raise InputError(
                f"{named('input_shapes', text)}: axis {index} is fixed to {axis} in the model, "
                f"got {size}"
            )
        if isinstance(axis, str):
            if values.get(axis, size) != size:
                raise InputError(
                    f"{named('input_shapes', text)}: axis {index} is {axis!r}, expected "
                    f"{values[axis]} "
                    f"({source[axis]}), got {size}"
                )
            values[axis] = size
            source.setdefault(axis, named("input_shapes", text))


def _step(specs: Mapping[str, InputSpec], values: dict[str, int], guessed: set[str]) -> None:
    """Sizes of one step of a decoder with a cache: the mask covers the past and the new tokens.

    Only where the three lengths have names of their own; adds to `values` and `guessed`.
    """
    past = _axis_named(specs, PAST, -2)
    new = _axis_named(specs, _TOKEN_INPUT, 1)
    total = _axis_named(specs, _MASK_INPUT, 1)
    if past is None or new is None or total is None or len({past, new, total}) < 3:
        return
    if any(_terms(axis) for axis in (past, new, total)):
        return  # the names say it themselves
    given = {axis for axis in (past, new, total) if axis in values}
    if total in given:
        whole = values[total]
        if new not in given:
            values[new] = max(1, whole - values.get(past, max(0, whole - SEQUENCE)))
        if past not in given:
            values[past] = max(0, whole - values[new])
    else:
        values.setdefault(new, SEQUENCE)
        values.setdefault(past, SEQUENCE)
        values[total] = values[past] + values[new]
    guessed.update({past, new, total} - given)


def _axis_named(specs: Mapping[str, InputSpec], name: re.Pattern[str], axis: int) -> str | None:
    """The symbolic size of an axis of the first input with such a name."""
    for spec in specs.values():
        if name.search(spec.name) and spec.shape is not None and len(spec.shape) >= 2:
            found = spec.shape[axis]
            return found if isinstance(found, str) else None
    return None


def _resolve(
    spec: InputSpec,
    axes: tuple[int | str | None, ...],
    values: dict[str, int],
    guessed: set[str],
    guess: _Guess,
) -> tuple[tuple[int, ...], frozenset[int]]:
    """Sizes of one input, and which of its axes are guesses; adds to `values` and `guessed`."""
    sizes: list[int] = []
    assumed: set[int] = set()
    for index, axis in enumerate(axes):
        if isinstance(axis, int):
            sizes.append(axis)
            continue
        if axis is None:
            sizes.append(_guess(spec, axes, index, guess))
            assumed.add(index)
            continue
        if axis not in values:
            terms = _terms(axis)
            for term in terms:
                if term not in values:
                    values[term] = SEQUENCE
                    guessed.add(term)
            if terms:
                constant = sum(int(part) for part in axis.split("+") if part.strip().isdecimal())
                values[axis] = constant + sum(values[term] for term in terms)
                if guessed.intersection(terms):
                    guessed.add(axis)
            else:
                values[axis] = _guess(spec, axes, index, guess)
                guessed.add(axis)
        sizes.append(values[axis])
        if axis in guessed:
            assumed.add(index)
    return tuple(sizes), frozenset(assumed)


def _terms(axis: str) -> list[str]:
    """The names in a sum such as "past_length + 1" (decoders with a cache); else nothing."""
    parts = [part.strip() for part in axis.split("+")]
    if len(parts) < 2 or not all(re.fullmatch(r"\w+", part) for part in parts):
        return []
    return [part for part in parts if not part.isdecimal()]


@dataclass(frozen=True)
class _Guess:
    """What is assumed where nothing is known."""

    image: tuple[int, int]
    length: int
    state: int | None


def _guess(spec: InputSpec, axes: tuple[int | str | None, ...], index: int, guess: _Guess) -> int:
    symbol = axes[index]
    name = symbol if isinstance(symbol, str) else ""
    if _BATCH_NAME.search(name):
        return 1
    if _SEQUENCE_NAME.search(name):
        return guess.length
    if index == 0:
        return 1
    is_float = spec.dtype.kind in "fV"  # the small floats of ml_dtypes are of kind V
    if len(axes) == 2 and is_float and (_AUDIO_NAME.search(name) or _AUDIO_NAME.search(spec.name)):
        return AUDIO
    if len(axes) == 4 and (is_float or spec.dtype == np.uint8):
        channels_last = axes[3] in _CHANNELS and axes[1] not in _CHANNELS
        rows, columns = (1, 2) if channels_last else (2, 3)
        if index not in (rows, columns):
            return 3
        other = axes[columns if index == rows else rows]
        if isinstance(other, int) and other < IMAGE_SIZES[0][0]:
            return LINE_WIDTH
        return guess.image[index == columns]
    between = len(axes) == 3 and index == 1 and all(isinstance(axes[i], int) for i in (0, 2))
    return guess.length if guess.state is None or not between else guess.state


def _notes(
    specs: Mapping[str, InputSpec],
    shapes: Mapping[str, tuple[int, ...]],
    assumed: Mapping[str, frozenset[int]],
) -> tuple[str, ...]:
    """One note for all inputs with the same shape and the same guesses."""
    groups: dict[tuple[tuple[int, ...], str, bool], list[str]] = {}
    for name, axes in assumed.items():
        if axes:
            declared = specs[name].shape or ()
            labels = [
                f"{declared[axis] if isinstance(declared[axis], str) else f'axis {axis}'}"
                f"={shapes[name][axis]}"
                for axis in sorted(axes)
            ]
            has_names = any(isinstance(declared[axis], str) for axis in axes)
            groups.setdefault((shapes[name], ", ".join(labels), has_names), []).append(name)
    dims = f"{named('dims')} or "
    return tuple(
        f"{listed(names, 3)}: {list(shape)} (assumed {labels}; set with "
        f"{dims if has_names else ''}{named('input_shapes')})"
        for (shape, labels, has_names), names in groups.items()
    )


def _text(shape: Sequence[int | str | None]) -> str:
    return "[" + ", ".join("?" if axis is None else str(axis) for axis in shape) + "]"
