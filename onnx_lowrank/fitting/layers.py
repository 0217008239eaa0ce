"""Layers as arrays: what the fit of one needs, without its graph.

What is computed of it is a function of these arrays alone, wherever that is done.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnx_lowrank.fitting.statistics import Statistics
from onnx_lowrank.maps.find import Group
from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.numerics.fisher import PLAIN, Fisher
from onnx_lowrank.numerics.moments import Moments
from onnx_lowrank.numerics.stacks import Leading

__all__ = ["LayerArrays", "arrays_of"]


@dataclass(frozen=True, eq=False)
class LayerArrays:
    """One layer.

    Attributes:
        stack: ``W[e, m, n]``.
        moments: what its factors are fitted to, by slice; None fits them to the weight alone.
        fisher: in what coordinates of its outputs errors count alike.
        held: moments of samples that judge the fit; None without.
        heads: ``A[e, l, m]``, the first map of the pair whose second one the layer is; where a
            width is in front, all maps that make it.
        bases: leading components by slice, where they are known.
        inner: whether something that is no map is between that map and the layer.
        selects: whether its rank is how many of its inputs are kept.
    """

    stack: Array
    moments: tuple[Moments, ...] | None = None
    fisher: Fisher = PLAIN
    held: tuple[Moments, ...] | None = None
    heads: tuple[Array, ...] = ()
    bases: tuple[Leading, ...] = ()
    inner: bool = False
    selects: bool = False


def arrays_of(
    group: Group, statistics: Statistics, *, judged: bool = True, leads: bool = True
) -> LayerArrays:
    """A group as arrays; its weight is read, or mapped into memory.

    Args:
        group: the group.
        statistics: what is known of its inputs and outputs.
        judged: whether what judges a fit belongs to it, and components that are known.
        leads: whether it is fitted by itself, or as the first of several that share a factor.
    """
    return LayerArrays(
        _in_order(group.matrix.numpy()),
        statistics.inputs(group) if leads else None,
        statistics.coordinates(group),
        statistics.held.get(group) if judged and group in statistics.fit else None,
        tuple(_in_order(head.matrix.numpy()) for head in group.heads),
        statistics.bases.get(group, ()) if judged and leads else (),
        group.inner is not None,
        group.selects,
    )


def _in_order(array: Array) -> Array:
    """An array in C or Fortran order, which it keeps on its way to another process.

    The order decides which product of BLAS is called, and so about the last bits.
    """
    plain = array.flags.c_contiguous or array.flags.f_contiguous
    return array if plain else np.ascontiguousarray(array)
