"""Rounded inputs: what kernels of integers lose by rounding what they multiply.

Runs with weights exchanged show what becomes of the weights alone.  Here the very kernels stand in
the model, with weights that both runs have in common, so that the difference is of the inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from onnx_lowrank.evaluation.outputs import MeanDamage, mean_damage
from onnx_lowrank.fitting.rounding import Postponed
from onnx_lowrank.fitting.static import put_static
from onnx_lowrank.graph.opset import raise_opset
from onnx_lowrank.graph.spool import Spool
from onnx_lowrank.maps.choice import Choice
from onnx_lowrank.maps.find import Group
from onnx_lowrank.maps.format_writer import FormatWriter
from onnx_lowrank.maps.formats import Format, folded, suited
from onnx_lowrank.maps.pair import constants_of
from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.numerics.blocks import round_blocks
from onnx_lowrank.numerics.rotation import rotated_first
from onnx_lowrank.ranks.probe import Probe

__all__ = ["lost_by_inputs", "lost_inside", "seen_inputs"]

# An estimate is measured where it makes more than this share of a damage.
_COUNTS = 0.1


def seen_inputs(
    choices: Mapping[Group, Choice],
    estimate: Callable[[Mapping[Group, Choice]], float],
    others: float,
    probe: Probe,
) -> MeanDamage:
    """What kernels of blocks of integers lose by their inputs, for choices all together.

    The estimate shares among layers what was measured of all of them.  Where it counts, the chosen
    layers are run with kernels of their blocks, those of pairs with their weights whole, and the
    estimate is scaled by what that shows.

    Args:
        choices: what becomes of the layers.
        estimate: of choices.
        others: the damage but for that.
        probe: runs the model.

    Returns:
        it, with its standard error where it was measured; the estimate where runs do not tell.
    """
    estimated = estimate(choices)
    within = set(probe.groups)
    own = {group: choice for group, choice in choices.items() if group in within}
    forms = {g: form for g, choice in own.items() if (form := choice.format) and _blocked(g, form)}
    dense = {group: replace(own[group], rank=None, joint=None) for group in forms}
    alike = estimate(dense)
    if estimated <= _COUNTS * (others + estimated) or alike <= 0.0:
        return MeanDamage(estimated)
    seen, scale = lost_by_inputs(forms, probe), estimated / alike
    if seen.mean is None:
        return MeanDamage(estimated)
    error = None if seen.error is None else scale * seen.error
    return MeanDamage(scale * seen.mean, error)


def _blocked(group: Group, form: Format) -> bool:
    """Whether a kernel multiplies with blocks of integers as they are."""
    return bool(form.block) and not form.table and not form.integers and not folded(group)


def lost_by_inputs(formats: Mapping[Group, Format], probe: Probe) -> MeanDamage:
    """Damage of kernels that round what they multiply, all layers together, weights aside.

    Args:
        formats: of dense weights, whose blocks count; each has 8 bits here.
        probe: runs the model.
    """
    if not formats:
        return MeanDamage(0.0)
    model = probe.model.clone()
    node_of = dict(zip(probe.model.graph, model.graph, strict=True))
    raise_opset(model, max(form.opset for form in formats.values()))
    constants: dict[str, Array] = {}
    with Spool() as spool:
        writer = FormatWriter(model, spool)
        for group, form in formats.items():
            matrix = group.matrix.numpy()[0]
            codes = round_blocks(matrix, 8, suited(form.block, len(matrix)))
            writer.put([node_of[member.site.node] for member in group.members], codes, form)
            constants |= constants_of(group, codes.values()[None])
        together = probe.damages_of(model)
    return _excess(together, probe.damages(constants, probe.places()))


def lost_inside(formats: Mapping[Group, Format], probe: Probe) -> float:
    """Damage of rounding what second factors multiply, all layers together, all else aside.

    Args:
        formats: of factors, with integers of inputs.
        probe: runs the model.
    """
    if not formats:
        return 0.0
    model = probe.model.clone()
    node_of = dict(zip(probe.model.graph, model.graph, strict=True))
    raise_opset(model, max(form.opset for form in formats.values()))
    constants: dict[str, Array] = {}
    waiting: list[Postponed] = []
    with Spool() as spool:
        writer = FormatWriter(model, spool)
        for group, form in formats.items():
            first, second = _turned(group.matrix.numpy()[0])
            codes = [round_blocks(factor, 8, len(factor)) for factor in (first, second)]
            nodes = [node_of[member.site.node] for member in group.members]
            heads = writer.split(nodes, first, second)
            for own, part in zip((heads, nodes), codes, strict=True):
                if form.static:
                    writer.put(own, part.values())
                    waiting.append(Postponed(own, part, form))
                else:
                    writer.put(own, part, form)
            product = codes[0].values() @ codes[1].values()
            constants |= constants_of(group, product[None]) | probe.rounds(group)
        if waiting and probe.static is not None:
            put_static(model, waiting, probe.static.method, probe.feeds, probe.open_model, spool)
        together = probe.damages_of(model)
    return _excess(together, probe.damages(constants, probe.places())).mean or 0.0


def _excess(together: Sequence[float | None], apart: Sequence[float | None]) -> MeanDamage:
    """By how much damages of samples are above other ones, at least 0; None where not known."""
    both = [(a, b) for a, b in zip(together, apart, strict=True) if a is not None and b is not None]
    if not all(math.isfinite(a) and math.isfinite(b) for a, b in both):
        return MeanDamage(None)
    found = mean_damage([a - b for a, b in both])
    return found if found.mean is None else replace(found, mean=max(found.mean, 0.0))


def _turned(matrix: Array) -> tuple[Array, Array]:
    """``W[m, n]`` as two exact factors, one of which is a rotation of its smaller side."""
    m, n = matrix.shape
    turn = rotated_first(np.eye(min(m, n)))
    w = np.asarray(matrix, np.float64)
    first, second = (w @ turn, turn.T) if n <= m else (turn, turn.T @ w)
    return first.astype(np.float32), np.ascontiguousarray(second, np.float32)
