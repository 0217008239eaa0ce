"""Damage of number formats: what rounding a layer does to the model's outputs.

What the outputs feel of a rounding error E is ``tr(G Eᵀ C E)`` (`onnx_lowrank.numerics.felt`), with
E from the very rounding that is written.  One run of the model with the layer rounded sets the
scale, as in `onnx_lowrank.ranks.damage`: without it the last layers of a model come out many times
too low.  The scale holds for all formats of the layer.

Kernels of integers round their inputs to 8 bits as well.  One run of the model with all layers in 8
bits, against what the weights alone do, says how much that loses; layers share it by an estimate:
an input of m elements that is rounded with a step s has errors of ``s²/12`` each, and s goes with
the largest element of a block, about ``√(2 ln b)`` times the root mean square of b normal ones.

Products that round their inputs with one range do that in the model that is run to measure damage,
too, each layer alone and all that are chosen together; so do those that round their results.  What
the second factor of a pair multiplies is not there: one run of the model with every weight W as two
exact factors, W·Q and Qᵀ with Q a rotation, both in integers, says how much its rounding loses;
layers share that in
proportion to the energy of what is rounded, as far as it is felt.

A correction of rank r leaves the energy of E outside of its r leading components.  The factors of a
pair are rounded at one rank; what that loses is taken to be the same share of the energy that the
pair holds at any other one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from onnx_lowrank.fitting.fit import fit
from onnx_lowrank.fitting.rounded_weights import (
    centre_of,
    moments_of,
    round_factors,
    round_weight,
    shift_by,
)
from onnx_lowrank.fitting.spectra import group_memory, largest_first
from onnx_lowrank.fitting.statistics import Statistics
from onnx_lowrank.maps.choice import Choice
from onnx_lowrank.maps.find import Group
from onnx_lowrank.maps.formats import Format, Variant, folded
from onnx_lowrank.maps.pair import Factors, constants_of
from onnx_lowrank.maps.tables import table_codes
from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.numerics.correction import corrected_energies, felt_error
from onnx_lowrank.numerics.crew import HERE, Crew
from onnx_lowrank.numerics.fisher import PLAIN
from onnx_lowrank.numerics.gptq import Inverse
from onnx_lowrank.numerics.parallel import map_layers
from onnx_lowrank.progress import Advance
from onnx_lowrank.ranks.alone import alone
from onnx_lowrank.ranks.damage import DamageCurve, DamageFrom
from onnx_lowrank.ranks.formats import Formats
from onnx_lowrank.ranks.probe import Probe
from onnx_lowrank.ranks.rounded_inputs import lost_by_inputs, lost_inside

__all__ = ["RoundingDamage", "rounding_damages"]

# Elements of an input that are rounded with one step, where 8 bits are tried.
_BLOCK = 128
# What 10,000 normal numbers lose by 8 bits for their range, as a share of their mean square: for
# layers where the outputs show nothing.
_LOST = (2.0 * math.sqrt(2.0 * math.log(10_000)) / 255.0) ** 2 / 12.0


@dataclass(frozen=True, eq=False)
class RoundingDamage:
    """What rounding does to the outputs, of one group.

    Attributes:
        dense: damage of the weight in each format.
        pairs: damage of the factors in each format, for each unit of energy that the pair holds.
        known_from: what it is known from.
        slope: damage for each unit of what is felt of the weight's error.
        inputs: damage of the rounding of what it multiplies, by blocks of `_BLOCK`.
        ranged: the same with one range for all of a run.
        inside: of what the second factor multiplies, of a pair that holds all of the energy.
        maps: whether it is of all maps around a width, which a rank adds none to.
    """

    dense: Mapping[Format, float]
    pairs: Mapping[Format, float]
    known_from: DamageFrom = "outputs"
    slope: float = 0.0
    inputs: float = 0.0
    ranged: float = 0.0
    inside: float = 0.0
    maps: bool = False

    def at(self, variant: Variant, curve: DamageCurve | None) -> float:
        """What a variant's format adds to the damage of its rank; 0 for floats."""
        if variant.format is None:
            return 0.0
        form, rank = variant.format, variant.rank
        inputs = self.unseen(variant, curve) + (self.ranged if form.integers else 0.0)
        if rank is None:
            return self.dense[form] + inputs
        assert curve is not None
        return self.pairs[form] * curve.held(rank) + inputs

    def unseen(self, variant: Variant, curve: DamageCurve | None) -> float:
        """The part of it that runs with weights exchanged do not show: that of rounded inputs."""
        form, rank = variant.format, variant.rank
        if form is None or form.table:
            return 0.0
        if form.integers:
            if rank is None or curve is None:
                return 0.0
            whole = curve.held(curve.full)
            return self.inside * curve.held(rank) / whole if whole > 0.0 else self.inside
        if not form.block:
            return 0.0
        own = self.inputs * math.log(form.block) / math.log(_BLOCK)
        return own if rank is None or self.maps else 2.0 * own  # B's are rounded too


@dataclass(frozen=True, eq=False)
class _Felt:
    """Rounding errors of one group before the outputs have been seen.

    Attributes:
        dense: by format, in units of what is felt.
        pairs: by format, for each unit of energy that the pair holds.
        reference: the format that is tried.
        values: the weight in it.
        relative: the error of that, as a share of all that the group gives.
        inputs: what is felt of inputs with errors in proportion to their mean square.
        inside: the same of what a second factor multiplies.
        shift: what the bias adds; None where there is none.
    """

    dense: Mapping[Format, float]
    pairs: Mapping[Format, float]
    reference: Format
    values: Array
    relative: float
    inputs: float = 0.0
    inside: float = 0.0
    shift: npt.NDArray[np.float64] | None = None


def rounding_damages(
    formats: Mapping[Group, Formats],
    curves: Mapping[Group, DamageCurve],
    statistics: Statistics,
    probe: Probe,
    advance: Advance,
    crew: Crew = HERE,
) -> dict[Group, RoundingDamage]:
    """Round each group alone and run the samples.

    Args:
        formats: which formats there are for a group.
        curves: damage of the groups' ranks.
        statistics: what is rounded on, and judged by its held moments, if any.
        probe: runs the model.
        advance: called with 1 for every group.
        crew: who fits the factors.
    """
    groups = [group for group in formats if any(formats[group].dense)]
    pairs = _references(groups, formats, curves, statistics, crew)

    def work(group: Group) -> _Felt:
        if group.members[0].site.form.indices:
            return _table(group, formats[group], statistics)
        return _product(group, formats[group], statistics, curves.get(group), pairs.get(group))

    found = {}
    inputs: dict[Group, float] = {}
    inside: dict[Group, float] = {}
    within = set(probe.groups)
    felt_of = map_layers(work, largest_first(groups), group_memory, room=crew.room())
    for group, felt in felt_of:
        damage = None
        if group in within:
            constants = constants_of(group, felt.values[None], felt.shift)
            damage = alone(probe, constants, len(groups))
        base = felt.dense[felt.reference]
        known: DamageFrom = "outputs"
        if base <= 0.0:
            scale = 1.0  # nothing is lost
        elif damage:
            scale = damage / base
        else:
            # Not seen, or not exchanged: its own relative error, or what ranks were found to do.
            known = "own error" if group in within else "other layers"
            curve = curves.get(group)
            scale = felt.relative / base if curve is None or not curve.slope else curve.slope
        found[group] = RoundingDamage(
            {form: scale * error for form, error in felt.dense.items()},
            {form: scale * error for form, error in felt.pairs.items()},
            known,
            scale,
            ranged=_lost_by_range(group, formats[group], probe, len(groups), scale * felt.inputs),
        )
        if formats[group].blocks is not None and not folded(group):
            inputs[group] = scale * felt.inputs
        if any(form is not None and form.integers for form in formats[group].pairs):
            inside[group] = scale * felt.inside
        advance(1)
    pairs_of = ((group, formats[group].pairs) for group in inside)
    ranged = {g: form for g, own in pairs_of for form in own if form is not None and form.integers}
    known_blocks = ((group, formats[group].blocks) for group in inputs)
    blocks = {g: replace(form, block=_BLOCK) for g, form in known_blocks if form is not None}
    by_inputs = _shared(lost_by_inputs(blocks, probe).mean or 0.0, inputs)
    by_inside = _shared(lost_inside(ranged, probe), inside)
    return {
        group: replace(
            found[group], inputs=by_inputs.get(group, 0.0), inside=by_inside.get(group, 0.0)
        )
        for group in groups
    }


def _shared(total: float, shares: Mapping[Group, float]) -> dict[Group, float]:
    """A total in proportion to shares."""
    whole = sum(shares.values())
    return {group: total * own / whole if whole > 0.0 else 0.0 for group, own in shares.items()}


def _lost_by_range(
    group: Group, own: Formats, probe: Probe, measurements: int, felt: float
) -> float:
    """Damage of products of a group alone that round their inputs, and maybe their results.

    Args:
        group: the group.
        own: its formats.
        probe: runs the model.
        measurements: how many groups there are to measure.
        felt: damage of errors as large as the inputs, where the run shows nothing.
    """
    if own.integers is None:
        return 0.0
    return alone(probe, probe.rounds(group), measurements) or _LOST * felt


def _references(
    groups: Sequence[Group],
    formats: Mapping[Group, Formats],
    curves: Mapping[Group, DamageCurve],
    statistics: Statistics,
    crew: Crew,
) -> dict[Group, Factors]:
    """A pair of every group that may have one in a format."""
    choices = {}
    for group in groups:
        curve = curves.get(group)
        if any(formats[group].pairs) and curve is not None and curve.points:
            choices[group] = Choice(curve.points[0][0], "reference")
    return dict(fit(choices, replace(statistics, held={}), lambda _: None, crew))


def _product(
    group: Group,
    own: Formats,
    statistics: Statistics,
    curve: DamageCurve | None,
    pair: Factors | None,
) -> _Felt:
    matrix = group.matrix.numpy()[0]
    fisher = statistics.felt.get(group, PLAIN)
    moments = moments_of(statistics, group)
    centre, held = centre_of(statistics, group), statistics.held.get(group)
    judge = moments if held is None or moments is None else held[0].about(centre)
    inverse = None if moments is None else Inverse(moments)
    dense: dict[Format, float] = {}
    values: dict[Format, Array] = {}
    for form in dict.fromkeys(replace(f, correction=0) for f in own.dense if f is not None):
        values[form] = round_weight(matrix, form, moments, inverse=inverse).values()
        error = np.asarray(matrix, np.float64) - values[form]
        dense[form] = felt_error(error, judge, fisher)
        ranks = [
            f.correction
            for f in own.dense
            if f and f.correction and replace(f, correction=0) == form
        ]
        if ranks:
            total = max(felt_error(error, moments, fisher), 1e-300)
            taken = corrected_energies(error, moments, max(ranks), fisher)
            for rank in ranks:
                left = max(1.0 - float(taken[:rank].sum()) / total, 0.0)
                dense[replace(form, correction=rank)] = left * dense[form]
    whole = felt_error(matrix, judge, fisher)
    pairs: dict[Format, float] = {}
    for form in (f for f in own.pairs if f is not None):
        if pair is None or curve is None:
            pairs[form] = dense[next(iter(dense))] / whole if whole > 0.0 else 0.0
            continue
        error = pair.product()[0].astype(np.float64)
        error -= round_factors(pair, form, moments, inverse=inverse).product()[0]
        energy = curve.held(pair.rank)
        pairs[form] = felt_error(error, judge, fisher) / energy if energy > 0.0 else 0.0
    reference = _reference(own)
    relative = dense[reference] / whole if whole > 0.0 else 0.0
    power = 1.0 if moments is None else statistics.fit[group][0].trace / len(matrix)
    inputs = power * felt_error(matrix, None, fisher)
    m, n = matrix.shape
    inside = inputs
    if own.integers is not None and n <= m:  # what is rounded is a rotation of the outputs
        given = felt_error(matrix, moments) if moments is not None else felt_error(matrix, None)
        inside = given / n * felt_error(np.eye(n, dtype=np.float32), None, fisher)
    shift = shift_by(centre, matrix, values[reference])
    return _Felt(dense, pairs, reference, values[reference], relative, inputs, inside, shift)


def _table(group: Group, own: Formats, statistics: Statistics) -> _Felt:
    rows = group.matrix.numpy()[0]
    # Where a product reads the table as well, its rows count alike.
    counts = None if group.others or len(group.members) > 1 else statistics.fit.get(group)
    moments = None if counts is None else counts[0]
    dense, values = {}, {}
    for form in (f for f in own.dense if f is not None):
        values[form] = table_codes(rows, form).values().T
        dense[form] = felt_error(rows - values[form], moments)
    reference = _reference(own)
    whole = felt_error(rows, moments)
    relative = dense[reference] / whole if whole > 0.0 else 0.0
    return _Felt(dense, {}, reference, np.asarray(values[reference], rows.dtype), relative)


def _reference(own: Formats) -> Format:
    """The coarsest format without a correction but for its block: its damage is above noise."""
    return min((f for f in own.dense if f is not None and not f.correction), key=lambda f: f.bits)
