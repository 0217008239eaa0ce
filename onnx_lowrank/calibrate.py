"""Calibrate: second moments of what every linear map really multiplies.

The model is run on the samples with the activations of its linear maps as outputs; activations
that several maps read in the same way (Q, K and V) are gathered once.  Two sets of moments come
out: those that the factors are fitted to, and those of held-out samples that judge the fit.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_lowrank.errors import InputError
from onnx_lowrank.find import Group
from onnx_lowrank.forms import Site
from onnx_lowrank.forms.base import node_name
from onnx_lowrank.numerics.moments import Accumulator, Moments
from onnx_lowrank.progress import Advance

__all__ = ["Feed", "Statistics", "find_mask", "gather"]

Array = npt.NDArray[Any]
Feed = Mapping[str, Array]
Runner = Callable[[Feed], Mapping[str, Array]]

# Accumulators of one pass over the samples.
_MEMORY = 1 << 30
# Fewer rows than this many times m leave the moments uncertain: said, and shrunk.
_FEW = 1.0


@dataclass(frozen=True, eq=False)
class Statistics:
    """Moments of the activations of groups, one for each slice of their matrix.

    Attributes:
        fit: what the factors are fitted to, shrunk where the rows were few.
        held: of held-out samples; empty where there were none.
        missing: why a group has none: it is factored by its weight alone.
        notes: what else the user should know.
    """

    fit: Mapping[Group, tuple[Moments, ...]] = field(default_factory=dict)
    held: Mapping[Group, tuple[Moments, ...]] = field(default_factory=dict)
    missing: Mapping[Group, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(eq=False)
class _Stream:
    """The vectors that sites with one activation and one way of reading it multiply."""

    site: Site
    value: ir.Value
    fit: list[Accumulator] = field(default_factory=list)
    held: list[Accumulator] = field(default_factory=list)

    def open(self) -> None:
        site = self.site
        make = [self.fit, self.held]
        for accumulators in make:
            accumulators.extend(
                Accumulator(site.m, diagonal=site.form.indices) for _ in range(site.slices)
            )

    @property
    def memory(self) -> int:
        site = self.site
        return 16 * site.slices * (site.m if site.form.indices else site.m * site.m)

    def add(self, array: Array, mask: Array | None, accumulators: Sequence[Accumulator]) -> None:
        site = self.site
        if mask is not None and array.shape[: mask.ndim] == mask.shape:
            array = array[mask]
        for rows, accumulator in zip(site.form.vectors(site, array), accumulators, strict=True):
            accumulator.add(rows)


def find_mask(feed: Feed) -> str | None:
    """The input that marks padding, by its usual name and shape: ``attention_mask[B, T]``."""
    for name in ("attention_mask", "input_mask", "padding_mask", "mask"):
        array = feed.get(name)
        if array is not None and array.ndim == 2 and array.dtype.kind in "iub":
            others = [other for key, other in feed.items() if key != name]
            if any(other.shape[:2] == array.shape for other in others):
                return name
    return None


def gather(
    model: ir.Model,
    groups: Sequence[Group],
    open_model: Callable[[ir.Model], Runner],
    fit: Sequence[Feed],
    held: Sequence[Feed],
    mask: str | None,
    advance: Advance,
) -> Statistics:
    """Run the samples and add up the moments.

    Args:
        model: the model; it is not changed.
        groups: whose activations are wanted.
        open_model: makes a runner of a model that gives its outputs by name.
        fit: samples to fit to.
        held: samples to judge with.
        mask: input whose zeros mark rows to leave out.
        advance: called with 1 after each sample.

    Raises:
        InputError: an activation holds NaN or Inf, or the mask masks everything.
    """
    streams, members, missing = _streams(model, groups)
    for chosen in _passes(list(streams.values())):
        run = open_model(_tapped(model, chosen))
        for samples, kind in ((fit, "fit"), (held, "held")):
            for number, feed in enumerate(samples):
                keep = _kept(feed, mask, number)
                outputs = run(feed)
                for stream in chosen:
                    name = stream.value.name or ""
                    array = feed[name] if name in feed else outputs[name]
                    try:
                        stream.add(array, keep, getattr(stream, kind))
                    except FloatingPointError as error:
                        raise InputError(
                            f"calibration: the input of {node_name(stream.site.node)!r} holds "
                            f"NaN or Inf in sample {number}"
                        ) from error
                advance(1)
    return _statistics(streams, members, missing)


def _streams(
    model: ir.Model, groups: Sequence[Group]
) -> tuple[dict[Hashable, _Stream], dict[Group, list[Hashable]], dict[Group, str]]:
    streams: dict[Hashable, _Stream] = {}
    members: dict[Group, list[Hashable]] = {}
    missing: dict[Group, str] = {}
    for group in groups:
        keys: list[Hashable] = []
        for member in group.members:
            site = member.site
            value = site.form.activation(site)
            if member.transposed or value is None or site.node.graph is not model.graph:
                continue
            key = (value, site.form.reading(site), site.slices)
            streams.setdefault(key, _Stream(site, value))
            keys.append(key)
        if keys:
            members[group] = keys
        else:
            missing[group] = "its activation is inside a subgraph or function"
    return streams, members, missing


def _passes(streams: Sequence[_Stream]) -> Iterator[list[_Stream]]:
    """The streams in groups whose accumulators fit in the working memory."""
    chosen: list[_Stream] = []
    used = 0
    for stream in streams:
        if chosen and used + stream.memory > _MEMORY:
            yield chosen
            chosen, used = [], 0
        stream.open()
        chosen.append(stream)
        used += stream.memory
    if chosen:
        yield chosen


def _tapped(model: ir.Model, streams: Sequence[_Stream]) -> ir.Model:
    """A copy of the model whose outputs are the activations of the streams."""
    copy = model.clone()
    wanted = {stream.value.name: stream.site.operand.dtype for stream in streams}
    inputs = {value.name for value in copy.graph.inputs}
    del copy.graph.outputs[:]
    found = [v for node in copy.graph for v in node.outputs if v.name in wanted]
    for value in found:
        if value.dtype is None:
            value.dtype = wanted[value.name]
        value.shape = None  # a declared shape may be too narrow for what is fed
        copy.graph.outputs.append(value)
    if not found and copy.graph.inputs and inputs:  # all of them are inputs: run anything
        copy.graph.outputs.extend(v for v in (node.outputs[0] for node in list(copy.graph)[:1]))
    return copy


def _kept(feed: Feed, mask: str | None, number: int) -> npt.NDArray[np.bool_] | None:
    if mask is None:
        return None
    if mask not in feed:
        raise InputError(f"--mask {mask!r}: expected one of the inputs {', '.join(feed)}")
    keep = np.asarray(feed[mask] != 0)
    if not keep.any():
        raise InputError(f"--mask {mask!r}: masks all rows of sample {number}")
    return keep


def _statistics(
    streams: Mapping[Hashable, _Stream],
    members: Mapping[Group, Sequence[Hashable]],
    missing: Mapping[Group, str],
) -> Statistics:
    fitted: dict[Group, tuple[Moments, ...]] = {}
    held: dict[Group, tuple[Moments, ...]] = {}
    without = dict(missing)
    few: list[str] = []
    ready = {
        key: ([a.moments() for a in stream.fit], [a.moments() for a in stream.held])
        for key, stream in streams.items()
    }
    for group, keys in members.items():
        slices = range(group.shape[0])
        own = [Moments.combined([ready[key][0][e] for key in keys]) for e in slices]
        judged = [Moments.combined([ready[key][1][e] for key in keys]) for e in slices]
        if any(moments is None for moments in own):
            without[group] = "no sample reaches it"
            continue
        known = [moments for moments in own if moments is not None]
        if min(moments.rows for moments in known) < _FEW * group.shape[1] and not (
            known[0].diagonal
        ):
            few.append(node_name(group.members[0].site.node))
        fitted[group] = tuple(moments.shrunk() for moments in known)
        if all(moments is not None for moments in judged):
            held[group] = tuple(moments for moments in judged if moments is not None)
    notes = []
    if few:
        shown = ", ".join(few[:2]) + (f" and {len(few) - 2} more" if len(few) > 2 else "")
        notes.append(
            f"calibration: fewer rows than columns at {shown}; the moments are shrunk, more "
            "samples would help"
        )
    return Statistics(fitted, held, without, tuple(notes))
