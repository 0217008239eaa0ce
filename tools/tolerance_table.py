"""Print how near ``--tolerance`` comes to the best budget that a fine grid finds.

    python tools/tolerance_table.py [--models vit cnn] [--tolerances 0.05 0.2]

For each model of ``models/cache/`` with samples, and each tolerance of the relative L2 error, the
smallest model is asked for (``--objective size``).  Then budgets from 0.7 to 1.1 times the share
that it kept, in steps of 2 % of it, are tried one by one with ``--keep``, and the smallest is taken
whose error stays within the tolerance on the very samples that judge.  A search that has not seen
these cannot know as much.  Returns 1 if a result exceeds its tolerance there, or is more than 10 %
above that budget.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnx_lowrank import LowRankError, compress, sweep

__all__ = ["main"]

CACHE = Path(__file__).resolve().parent.parent / "models" / "cache"
NEAR = 1.10
GRID = np.arange(0.70, 1.101, 0.02)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; returns 1 if a result is beyond its tolerance or far from the best."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["vit", "cnn"])
    parser.add_argument("--tolerances", type=float, nargs="+", default=[0.05, 0.2])
    parser.add_argument("--samples", type=int, default=200, help="samples that judge")
    options = parser.parse_args(arguments)
    print(f"{'model':<18}{'tolerance':>9}  {'error':>7}  {'kept':>7}  {'best':>7}  kept / best")
    met = True
    for name in options.models:
        for tolerance in options.tolerances:
            try:
                met &= row(name, tolerance, options.samples)
            except LowRankError as error:
                print(f"{name:<18}{tolerance:>9g}  {error}")
                met = False
    return 0 if met else 1


def row(name: str, tolerance: float, samples: int) -> bool:
    """Print one line; whether the result is within the tolerance and near the best budget."""
    model = CACHE / f"{name}.onnx"
    common: dict[str, Any] = {
        "data": model.with_suffix(".data.npz"),
        "samples": samples,
        "bench": False,
    }
    report = compress(model, tolerance=tolerance, objective="size", **common).report
    assert report.check is not None
    error = max(o.relative_l2 for p in report.check.providers for o in p.outputs)
    linear = report.totals.linear_parameters_before
    kept = report.totals.linear_parameters_after / linear
    shares = [float(share) for share in kept * GRID if share < 1.0]
    points = sweep(model, shares=shares, metric="relative-l2", **common).points
    good = [p.linear_parameters / linear for p in points if (p.loss or 0.0) <= tolerance]
    best = min(good)
    print(
        f"{name:<18}{tolerance:>9g}  {error:>7.4f}  {kept:>7.4f}  {best:>7.4f}  {kept / best:.2f}",
        flush=True,
    )
    return error <= tolerance and kept <= NEAR * best


if __name__ == "__main__":
    sys.exit(main())
