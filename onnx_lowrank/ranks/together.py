"""Together: the damage of several layers at once, on as many samples as it takes to tell it.

Outputs that leap, such as classes of characters, lose most on few samples: the mean of some ten
says next to nothing, though no sample is unlike the others.  Where the samples that a search judges
with leave the damage unsure, those that factors are fitted to are asked as well.  On these layers
look better than they are, by a factor that second moments tell without leaps: what is felt of a
layer's error, ``tr(G Eᵀ C E)``, under C of the samples of the search over that under C of those
that were fitted to; of all layers together, each with its damage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from onnx_lowrank.evaluation.outputs import MeanDamage, mean_damage
from onnx_lowrank.fitting.statistics import Statistics
from onnx_lowrank.maps.find import Group
from onnx_lowrank.numerics.arrays import Array, Feed
from onnx_lowrank.numerics.correction import felt_error
from onnx_lowrank.numerics.fisher import PLAIN
from onnx_lowrank.ranks.probe import Probe

__all__ = ["Together"]

# A mean whose standard error is this share of it is sure; of fewer samples no error is known.
_SURE, _TELLING = 0.15, 5
# At most so many times the samples of the search are asked besides.
_TIMES = 4


class Together:
    """Tells what several layers do to the outputs.

    Attributes:
        further: samples that may be asked besides those of the probe.
        asked: how many of them were asked at most.
    """

    def __init__(
        self,
        probe: Probe,
        statistics: Statistics,
        slopes: Mapping[Group, float],
        further: Sequence[Feed] = (),
    ) -> None:
        """Nothing runs yet.

        Args:
            probe: runs the model; on samples that nothing was fitted to.
            statistics: what factors are fitted to, and ``held`` moments of the probe's samples.
            slopes: damage of groups for each unit of what is felt of their error.
            further: samples that the factors are fitted to.
        """
        self._probe, self._statistics, self._slopes = probe, statistics, slopes
        most = min(len(further), _TIMES * len(probe.feeds))
        places = sorted({int(place) for place in np.linspace(0, len(further) - 1, most)})
        self.further = [further[place] for place in places]
        self.asked = 0
        self._known: dict[Group, tuple[Array, float, float]] = {}

    def measured(self, constants: Mapping[str, Array]) -> MeanDamage:
        """The mean damage over samples, and its standard error.

        Args:
            constants: as for `Probe.outputs`.
        """
        found = list(self._probe.damages(constants, self._probe.places()))
        rounds = -(-len(self.further) // len(found))
        if _sure(found) or not rounds:
            return mean_damage(found)
        factor = self.optimism(constants)
        for start in range(rounds):
            feeds = self.further[start::rounds]  # every round lies evenly among all
            own = self._probe.further(constants, feeds)
            found += [None if damage is None else factor * damage for damage in own]
            if _sure(found):
                break
        self.asked = max(self.asked, len(found) - len(self._probe.feeds))
        return mean_damage(found)

    def optimism(self, constants: Mapping[str, Array]) -> float:
        """How many times larger the damage is on samples that nothing was fitted to; 1 or more.

        Args:
            constants: as for `Probe.outputs`; of groups without moments of both kinds of samples
                nothing is known.
        """
        fitted = held = 0.0
        for group, slope in self._slopes.items():
            value = constants.get(group.matrix.name)
            if value is not None and group in self._statistics.held:
                own, other = self._felt(group, value)
                fitted, held = fitted + slope * own, held + slope * other
        return max(held / fitted, 1.0) if fitted > 0.0 else 1.0

    def _felt(self, group: Group, value: Array) -> tuple[float, float]:
        """What is felt of a group's error under both kinds of moments."""
        known = self._known.get(group)
        if known is not None and known[0] is value:
            return known[1:]
        statistics, matrix = self._statistics, group.matrix
        errors = matrix.numpy().astype(np.float64) - matrix.layout.apply(value)
        fisher = statistics.felt.get(group, PLAIN)
        sums = [0.0, 0.0]
        both = zip(errors, statistics.fit[group], statistics.held[group], strict=True)
        for error, own, other in both:
            centre = None if own.diagonal else own.centre
            for place, moments in enumerate((own, other)):
                sums[place] += felt_error(error, moments.about(centre), fisher)
        self._known[group] = (value, sums[0], sums[1])
        return sums[0], sums[1]


def _sure(damages: Sequence[float | None]) -> bool:
    """Whether the mean of damages is known well enough, or nothing can be compared."""
    found = mean_damage(damages)
    if found.mean is None:
        return True
    known = len(damages) >= _TELLING and found.error is not None and found.mean > 0.0
    return known and (found.error or 0.0) <= _SURE * found.mean
