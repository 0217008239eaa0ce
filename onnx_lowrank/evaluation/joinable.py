"""Joinable: whether a model gives the same for samples that run together, and without padding.

That is not known from the graph: a layer may normalize over all that it is given, or read padding.
So it is tried, with samples as different as there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from onnx_lowrank.data.cache import PAST
from onnx_lowrank.data.declared import InputSpec, input_specs
from onnx_lowrank.data.joining import APART, Joining
from onnx_lowrank.errors import InputError
from onnx_lowrank.evaluation.outputs import compare_outputs
from onnx_lowrank.evaluation.reading import Reading
from onnx_lowrank.evaluation.unchanged import change
from onnx_lowrank.graph.walk import all_nodes
from onnx_lowrank.numerics.arrays import Array, Feed
from onnx_lowrank.runtime.taps import Runner

__all__ = ["joinable", "same_values"]

# Their step is that of the largest number in all of a tensor, which another sample may hold.
_WHOLE = frozenset({"DynamicQuantizeLinear", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM"})
# Samples that are tried, at most.
_TRIED = 3


def joinable(
    model: ir.Model,
    feeds: Sequence[Feed],
    reading: Reading,
    run: Runner,
    most: Callable[[], int],
) -> Joining:
    """How samples of a model go together.

    Args:
        model: declares which axes may have any size.
        feeds: the samples.
        reading: which rows of outputs count; its mask marks padding.
        run: runs the model.
        most: how many samples may be in one run; it is asked only if that matters.
    """
    specs = input_specs(model)
    places = [0, len(feeds) // 2, len(feeds) - 1]
    try:
        cut = _cutting(specs, reading.mask, feeds)
        if cut.cuts:
            lengths = [cut.length(feed) for feed in feeds]
            places = [int(np.argmin(lengths)), int(np.argmax(lengths)), *places]
        tried = [feeds[place] for place in dict.fromkeys(places)][:_TRIED]
        whole: list[Feed] = []
        if cut.cuts:
            whole = [run(feed) for feed in tried]
            cut = _avoiding(cut, whole)
            short = [run(cut.short(feed)) for feed in tried]
            pairs = zip(whole, short, tried, strict=True)
            if not all(
                _same(model, reading, [before], [feed], after, cut.short(feed))
                for before, after, feed in pairs
            ):
                cut = APART
        return _stacking(model, specs, tried, whole, reading, run, cut, most)
    except InputError:
        return APART


def same_values(model: ir.Model, before: Feed, after: Feed) -> bool:
    """Whether two runs give the same values, but for rounding."""
    types = {value.dtype for value in model.graph.outputs}
    types |= {value.dtype for value in model.graph.initializers.values()}
    try:
        return change(compare_outputs(before, after), types) is None
    except InputError:
        return False


def _cutting(specs: Sequence[InputSpec], mask: str | None, feeds: Sequence[Feed]) -> Joining:
    """What may be cut off by the names of sizes; `APART` where nothing is padding, or to cut."""
    own = next((spec for spec in specs if spec.name == mask), None)
    shape = None if own is None else own.shape
    if mask is None or shape is None or len(shape) != 2 or not isinstance(shape[1], str):
        return APART
    axes: dict[str, int] = {}
    for spec in specs:
        if spec.kind != "tensor" or spec.shape is None or PAST.search(spec.name):
            return APART
        found = [axis for axis, size in enumerate(spec.shape) if size == shape[1]]
        if len(found) > 1:
            return APART
        axes |= dict.fromkeys([spec.name], found[0]) if found else {}
    cut = Joining(mask=mask, axes=axes)
    padded = any(cut.length(feed) < feed[mask].shape[-1] for feed in feeds)
    fitting = all(
        feed[name].ndim > axis and feed[name].shape[axis] == feed[mask].shape[-1]
        for feed in feeds
        for name, axis in axes.items()
    )
    return cut if padded and fitting else APART


def _avoiding(cut: Joining, whole: Sequence[Feed]) -> Joining:
    """The same, with the sizes of outputs that lengths should differ from."""
    sizes = {size for values in whole for array in values.values() for size in array.shape[1:]}
    return Joining(cut.size, cut.mask, cut.axes, frozenset(sizes))


def _stacking(
    model: ir.Model,
    specs: Sequence[InputSpec],
    tried: Sequence[Feed],
    whole: Sequence[Feed],
    reading: Reading,
    run: Runner,
    cut: Joining,
    most: Callable[[], int],
) -> Joining:
    """The same with several samples in a run, where the model takes them and gives the same."""
    free = all(spec.shape and not isinstance(spec.shape[0], int) for spec in specs)
    if not free or any(node.op_type in _WHOLE for node in all_nodes(model)):
        return cut
    wanted = Joining(len(tried), cut.mask, cut.axes, cut.avoided)
    own = next((own for own in wanted.runs(tried) if len(own) > 1), None)
    if own is None or (size := most()) < len(own):
        return cut
    chosen = [tried[place] for place in own]
    first = chosen[0]
    if all(np.array_equal(feed[name], first[name]) for feed in chosen for name in first):
        return cut  # what one sample does to another does not show
    before = [whole[place] if whole else run(tried[place]) for place in own]
    together = wanted.joined(chosen)
    try:
        after = run(together)
    except InputError:
        return cut
    if not _same(model, reading, before, chosen, after, together):
        return cut
    return Joining(size, cut.mask, cut.axes, cut.avoided)


def _same(
    model: ir.Model,
    reading: Reading,
    before: Sequence[Feed],
    feeds: Sequence[Feed],
    after: Feed,
    together: Feed,
) -> bool:
    """Whether what counts of the outputs of one run is what each of its samples gives alone."""
    counted: dict[str, Array] = {}
    found: dict[str, Array] = {}
    for name, array in after.items():
        parts = [own[name] for own in before]
        if not all(part.ndim and part.shape[:1] == (1,) for part in parts) and len(parts) > 1:
            return False
        rows = [
            reading.counted(name, part, reading.kept(feed))
            for part, feed in zip(parts, feeds, strict=True)
        ]
        whole = rows[0] if len(rows) == 1 else None
        if whole is None:
            if len({row.shape[1:] for row in rows}) > 1:
                return False
            whole = np.concatenate(rows)
        counted[name] = whole
        found[name] = reading.counted(name, array, reading.kept(together))
    return same_values(model, counted, found)
