"""Round: weights and pairs of a finished float model become integers, in place.

It comes last, behind refit and healing, so that what those did is rounded once.  Weights are
rounded by GPTQ on the moments of their inputs, to nearest where there are none; the second factor
of a pair is fitted to what became of the first one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from onnx_lowrank.fitting.statistics import Statistics
from onnx_lowrank.graph.spool import Spool
from onnx_lowrank.maps.choice import Choice
from onnx_lowrank.maps.find import Group
from onnx_lowrank.maps.formats import SMALLEST, Format, FormatWriter, suited
from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.numerics.correction import felt_error
from onnx_lowrank.numerics.moments import Moments
from onnx_lowrank.numerics.quantized_pair import (
    refitted_second,
    rounded,
    rounded_second,
)
from onnx_lowrank.progress import Advance

__all__ = ["Rounded", "round_weights"]


@dataclass(frozen=True)
class Rounded:
    """What became of one group's weights.

    Attributes:
        bytes: of its integers, scales and correction; a shared first factor counts once.
        error: relative error that the rounding adds, ``√(E‖x (W − Ŵ)‖² / E‖x W‖²)`` on the samples
            that it was made with, W the weight or the product of the pair; without samples of the
            weight itself.
    """

    bytes: int
    error: float


@dataclass(frozen=True, eq=False)
class _First:
    """A first factor ``A[m, k]`` as it was, and what its codes stand for."""

    exact: Array
    values: Array


def round_weights(
    model: ir.Model,
    choices: Mapping[Group, Choice],
    own: Mapping[Group, Group],
    statistics: Statistics,
    spool: Spool,
    advance: Advance,
) -> dict[Group, Rounded]:
    """Round the weights of groups with a format.

    Args:
        model: with pairs in it, of opset 21 or newer; it is changed.
        choices: of the groups that were found in the model before it had pairs.
        own: the same groups of this model.
        statistics: moments of the inputs of the groups, as they were before.
        spool: where the integers wait until they are saved.
        advance: called with the number of elements of every group that is done.
    """
    writer = FormatWriter(model, spool)
    firsts: dict[ir.Node, _First] = {}
    found = {}
    for group, choice in choices.items():
        if choice.format is None:
            continue
        moments = _uncentred(statistics, group)
        nodes = [member.site.node for member in own[group].members]
        if choice.rank is None:
            found[group] = _dense(writer, nodes, choice.format, moments)
        else:
            found[group] = _pair(writer, nodes, choice.format, moments, firsts)
        advance(group.matrix.size)
    return found


def _uncentred(statistics: Statistics, group: Group) -> Moments | None:
    """C of a group's inputs with their mean: nothing takes over what the rounding does to it."""
    moments = statistics.fit.get(group)
    return None if moments is None else replace(moments[0], centre=None).fitting()


def _dense(
    writer: FormatWriter, nodes: list[ir.Node], form: Format, moments: Moments | None
) -> Rounded:
    matrix = writer.weight(nodes[0]).numpy()
    codes = rounded(matrix, moments, form.bits, form.block)
    error = _relative(matrix, codes.values(), moments)
    writer.put(nodes, codes)
    return Rounded(codes.nbytes, error)


def _pair(
    writer: FormatWriter,
    nodes: list[ir.Node],
    form: Format,
    moments: Moments | None,
    firsts: dict[ir.Node, _First],
) -> Rounded:
    """Both factors; a first one that several groups share is rounded with the first of them."""
    heads = [_head(node) for node in nodes]
    second = writer.weight(nodes[0]).numpy()
    size = 0
    if heads[0] not in firsts:
        first = writer.weight(heads[0]).numpy()
        codes = rounded(first, moments, form.bits, form.block)
        size = codes.nbytes
        known = _First(np.array(first, np.float64), codes.values())
        writer.put(heads, codes)
        firsts |= dict.fromkeys(heads, known)
    exact, inner = firsts[heads[0]].exact, firsts[heads[0]].values
    matrix = exact @ second
    if len(second) < SMALLEST:
        fitted = refitted_second(matrix, inner, second, moments).astype(np.float32)
        writer.put(nodes, fitted)
        values, size = fitted, size + fitted.nbytes
    else:
        b = rounded_second(
            matrix, inner, second, moments, form.bits, suited(form.block, len(second))
        )
        writer.put(nodes, b)
        values, size = b.values(), size + b.nbytes
    return Rounded(size, _relative(matrix, inner @ values, moments))


def _head(node: ir.Node) -> ir.Node:
    """The first product of a pair."""
    assert node.inputs[0] is not None
    head = node.inputs[0].producer()
    assert head is not None
    return head


def _relative(exact: Array, values: Array, moments: Moments | None) -> float:
    whole = felt_error(exact, moments)
    off = felt_error(exact - values, moments)
    return math.sqrt(off / whole) if whole > 0.0 else 0.0
