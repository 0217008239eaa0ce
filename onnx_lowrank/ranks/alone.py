"""Alone: the damage of one layer that is exchanged, on as few samples as tell it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from onnx_lowrank.evaluation.outputs import mean_damage
from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.ranks.probe import Probe

__all__ = ["SAMPLES", "Halves", "alone"]

SAMPLES = 12
"""Samples that set the scales of all layers.  They are the same for every layer, so that one that
is easy or hard scales all damages alike: measured on a sentence encoder with 36 layers, 12 of them
choose ranks that are no worse than those of 32."""
# Every second one of them comes first.  Where their mean is known to this share of it, by its
# standard error, the others are left out; of fewer than so many no error is known.
_SURE, _TELLING = 0.25, 5
# After so many layers of which hardly any was known by half of the samples, so large a share at
# most, all go into one run from then on: weights are then read once for all of them.
_FIRST, _HARDLY = 4, 0.25
# Where layers are many and samples long, as those of language models, all layers together take at
# most so many runs for each sample there is; a sample then has rows enough to set a scale.  Of one
# window of 256 tokens that scale is, beside those of other layers, known to about a fifth.
_RUNS, _ROWS = 15, 12


@dataclass
class Halves:
    """How often half of the samples told the damage of a layer.

    Attributes:
        tried: layers that were measured on one half first.
        enough: those for which it was enough.
    """

    tried: int = 0
    enough: int = 0

    def worth(self, count: int) -> bool:
        """Whether half of so many samples may be enough."""
        often = self.tried < _FIRST or self.enough > _HARDLY * self.tried
        return often and (count + 1) // 2 >= _TELLING


def alone(
    probe: Probe,
    constants: Mapping[str, Array],
    measurements: int,
    most: int | None = None,
    halves: Halves | None = None,
) -> float | None:
    """The damage that a layer alone does, on as many samples as so many measurements leave to each.

    Args:
        probe: runs the model.
        constants: as for `Probe.damage`.
        measurements: how many layers there are to measure.
        most: samples that are worth it; default: all.
        halves: of the layers before; half of the samples are enough where these agree, unless they
            hardly ever did.  Default: all samples are run.
    """
    every = len(probe.feeds) if most is None else min(most, len(probe.feeds))
    fewest = min(every, math.ceil(_ROWS / probe.rows))
    count = max(fewest, min(every, _RUNS * len(probe.feeds) // max(measurements, 1)))
    places = probe.places(count)
    if halves is None or not halves.worth(len(places)):
        found = list(probe.damages(constants, places))
    else:
        found = list(probe.damages(constants, places[::2]))
        enough = _settled(found)
        halves.tried, halves.enough = halves.tried + 1, halves.enough + enough
        if not enough:
            found += probe.damages(constants, places[1::2])
    # What so few samples do not show, another one may.
    return mean_damage(found).mean or probe.damage(constants)


def _settled(damages: Sequence[float | None]) -> bool:
    """Whether the mean of damages is known well enough."""
    found = mean_damage(damages)
    if len(damages) < _TELLING or found.mean is None or found.error is None:
        return False
    return found.error <= _SURE * found.mean
