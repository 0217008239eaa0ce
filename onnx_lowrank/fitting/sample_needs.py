"""How many samples the methods want for a model's layers, told before the work."""

from __future__ import annotations

import math
from collections.abc import Sequence

from onnx_lowrank.fitting.statistics import Statistics

__all__ = ["Method", "wanted_samples"]

Method = str
"""What a message calls a method, such as "refit"."""

# Rows of samples, such as texts.  Random directions of the outputs that Fisher information wants,
# over those drawn from one row.
_FISHER = 256
# A tenth of them judges the healing: 16.
_HEALING = 160
# Of the samples of a refit a fifth is held out.
_REFIT = 1.25


def wanted_samples(
    statistics: Statistics, samples: int, methods: Sequence[Method], rows: int = 1
) -> dict[Method, int]:
    """How many samples each method wants for the layers that were calibrated.

    Moments of a layer with m inputs have full rank from m rows on; calibration and refit want that
    for the layer that lacks most.

    Args:
        statistics: moments of the layers.
        samples: how many samples they were gathered from.
        methods: of "Fisher information", "refit" and "healing", those that are used.
        rows: how many rows a sample holds: one that is a whole batch counts as many times.

    Returns:
        Method -> samples, "calibration" first.
    """
    needs = [
        math.ceil(group.shape[1] * samples / known)
        for group, fit in statistics.fit.items()
        if not fit[0].diagonal and (known := min(moments.rows for moments in fit)) > 0
    ]
    calibration = max(needs, default=1)
    found = {"calibration": calibration}
    others = {
        "Fisher information": math.ceil(_FISHER / rows),
        "refit": max(2, math.ceil(_REFIT * calibration)),
        "healing": math.ceil(_HEALING / rows),
    }
    return found | {method: others[method] for method in methods}
