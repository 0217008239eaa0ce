"""Runnable: sizes to assume with which a model really runs, found by trying.

A recognizer of text lines fails on a square image; a recurrent detector on a state whose batch is
that of no input, or on a window that is shorter than its first filter.  Where no size is declared,
what the graph does with the input says which ones to try: the sides of the weights that multiply
it, and the usual lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import onnx_ir as ir

from onnx_lowrank.data.declared import InputSpec
from onnx_lowrank.data.fitter import is_floating
from onnx_lowrank.data.lengths import lengths_of
from onnx_lowrank.data.samples import random_samples
from onnx_lowrank.data.shapes import IMAGE_SIZES, SEQUENCE, ConcreteShapes, concrete_shapes
from onnx_lowrank.errors import InputError, named
from onnx_lowrank.graph.walk import attribute, static_shape
from onnx_lowrank.numerics.arrays import Feed

__all__ = ["runnable_shapes"]

# Lengths to try after the sides of weights: windows of audio, then short sequences.
_LENGTHS = (512, 256, 576, 1024, 32, 16, 128, 1, 4096, 16_000)
# How many sides of weights are tried, and how far from the input they are looked for.
_SIDES, _FAR = 8, 8
# Which axis of its constant an operator's input has to fit, by the constant's place.
_FITS = {("MatMul", 1): -2, ("Gemm", 1): 0, ("LSTM", 1): 2, ("GRU", 1): 2, ("RNN", 1): 2}


def runnable_shapes(
    runs: Callable[[Feed], bool | None],
    model: ir.Model,
    specs: Sequence[InputSpec],
    input_shapes: Mapping[str, tuple[int, ...]],
    dims: Mapping[str, int],
    *,
    lengths: bool = False,
) -> ConcreteShapes:
    """As `concrete_shapes`, but with assumed sizes that the model runs with.

    Args:
        runs: whether the model runs on a feed; None where a process did not survive or end it,
            which is not tried many times.
        model: the model.
        specs: its inputs.
        input_shapes: input name -> sizes that the user gave.
        dims: symbolic dimension -> size that the user gave.
        lengths: whether other sizes than those of images are tried too: not where samples bring
            their own.

    Only where the size of an image, or of an axis of floats, has to be guessed, or where an input
    is the length of another one, is anything run.  Where no guess runs the first one is returned,
    with a note, and the run that follows says why it fails.
    """

    def made(**guess: object) -> ConcreteShapes:
        return concrete_shapes(specs, input_shapes, dims, **guess)  # type: ignore[arg-type]

    def fed(guess: ConcreteShapes) -> bool | None:
        try:
            feed = random_samples(model, specs, guess, count=1, seed=0).feeds[0]
        except InputError:  # no random input can be made, whatever the sizes
            return None
        return runs(feed)

    def tried(guess: ConcreteShapes) -> bool | None:
        whole = _with_lengths(specs, guess) if lengths else guess
        answer = fed(whole)
        return fed(guess) if answer is False and whole.lengths else answer

    found = _sized(tried, made, model, specs, lengths=lengths)
    whole = _with_lengths(specs, found) if lengths else found
    if not whole.lengths or fed(whole) is not False or fed(found) is False:
        return whole
    names = ", ".join(f"{name} {length}" for name, length in whole.lengths.items())
    note = f"the model does not run with {names}, but with other numbers"
    return replace(found, notes=(*found.notes, note))


def _with_lengths(specs: Sequence[InputSpec], guess: ConcreteShapes) -> ConcreteShapes:
    return replace(guess, lengths=lengths_of(specs, guess.shapes))


def _sized(
    tried: Callable[[ConcreteShapes], bool | None],
    made: Callable[..., ConcreteShapes],
    model: ir.Model,
    specs: Sequence[InputSpec],
    *,
    lengths: bool,
) -> ConcreteShapes:
    """Sizes with which the model runs, by trial; the first ones where none do.

    Args:
        tried: whether the model runs with sizes; None where that is not known.
        made: sizes by a guess.
        model: the model.
        specs: its inputs.
        lengths: whether other sizes than those of images are tried too.
    """
    first = made()
    images = [made(image=size) for size in IMAGE_SIZES]
    if any(guess.shapes != first.shapes for guess in images):
        for size, guess in zip(IMAGE_SIZES, images, strict=True):
            if not tried(guess):
                continue
            if guess is images[0]:
                return guess
            note = "the model does not run on images of {}×{}, but on {}×{}".format(
                *IMAGE_SIZES[0], *size
            )
            return replace(guess, notes=(*guess.notes, note))
        return first
    if not lengths or not _guessed(specs, first, made(length=SEQUENCE + 1)):
        return first
    if tried(first) is not False:
        return first
    guesses: list[ConcreteShapes] = []
    for length in dict.fromkeys([SEQUENCE, *_sides(model, specs), *_LENGTHS]):
        for guess in (made(length=length, state=1), made(length=length)):
            if all(guess.shapes != other.shapes for other in (first, *guesses)):
                guesses.append(guess)
    found, count = None, 1
    for guess in guesses:
        answer, count = tried(guess), count + 1
        if answer is not False:
            found = guess if answer else None
            break
    if found is not None:
        changed = [name for name, shape in found.shapes.items() if shape != first.shapes[name]]
        sizes = ", ".join(f"{name} {list(first.shapes[name])}" for name in changed)
        note = f"the model does not run on {sizes}: other sizes were tried until it did"
        return replace(found, notes=(*found.notes, note))
    note = (
        f"no sizes were found with which the model runs, {count} were tried: give them "
        f"with {named('input_shapes')} or {named('dims')}, or samples with {named('data')}"
    )
    return replace(first, notes=(*first.notes, note))


def _guessed(specs: Sequence[InputSpec], one: ConcreteShapes, other: ConcreteShapes) -> bool:
    """Whether a length has to be guessed for an input of floats."""
    floats = [spec.name for spec in specs if spec.drawn and is_floating(spec.dtype)]
    return any(one.shapes.get(name) != other.shapes.get(name) for name in floats)


def _sides(model: ir.Model, specs: Sequence[InputSpec]) -> list[int]:
    """Sizes of an input's last axis that weights near it ask for, the nearest first."""
    floats = {spec.name for spec in specs if spec.drawn and is_floating(spec.dtype)}
    found: dict[int, None] = {}
    inputs = [value for value in model.graph.inputs if value.name in floats]
    for node in _behind(inputs):
        for index, value in enumerate(node.inputs):
            shape = None if value is None or value.const_value is None else value.const_value.shape
            sizes = static_shape(shape)
            if not sizes or len(sizes) < 2:
                continue
            axis = _FITS.get((node.op_type, index))
            if node.op_type == "Gemm" and attribute(node, "transB", 0):
                axis = 1
            if node.op_type == "Conv" and index == 1:
                # A filter wants a window that it fits into, often twice or four times.
                found |= dict.fromkeys((2 * sizes[-1], 4 * sizes[-1], sizes[-1]))
            elif axis is not None and -len(sizes) <= axis < len(sizes):
                found[sizes[axis]] = None
    return [size for size in found if size > 1][:_SIDES]


def _behind(values: Sequence[ir.Value]) -> Iterator[ir.Node]:
    """Nodes that read the values, also in subgraphs, then those behind them, a few steps far."""
    seen: set[ir.Node] = set()
    waiting = list(values)
    for _ in range(_FAR):
        nodes = [use.node for value in waiting for use in value.uses() if use.node not in seen]
        yield from dict.fromkeys(nodes)
        seen.update(nodes)
        waiting = [output for node in dict.fromkeys(nodes) for output in node.outputs]
