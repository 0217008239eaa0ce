"""Print the cost table of a model, and how well it predicts what a whole model saves.

    python tools/cost_table.py [--model models/cache/minilm-l6.onnx] [--ops all] [--keep 0.8 0.5]
                               [--multiples] [--save FILE]

Every kind of layer is timed alone, dense and as a pair (see ``onnx_lowrank/ranks/microbench.py``).
Then every layer keeps the same share of its parameters, and the time that the table says is saved
stands beside that of the two whole models run in turns.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from onnx_lowrank import compress
from onnx_lowrank.compression.settings import Settings
from onnx_lowrank.compression.trial import Trial
from onnx_lowrank.errors import LowRankError
from onnx_lowrank.files import workspace
from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.graph.load import load
from onnx_lowrank.graph.simplify import simplify
from onnx_lowrank.graph.walk import node_name
from onnx_lowrank.maps.find import Group, find
from onnx_lowrank.maps.forms import all_forms, chosen_forms
from onnx_lowrank.ranks import cost_file
from onnx_lowrank.ranks.costs import CostTable, measure_costs, plan_costs
from onnx_lowrank.ranks.microbench import (
    Limits,
    clock_for,
    compare,
    serialized,
    session_timer,
)
from onnx_lowrank.ranks.times import Place
from onnx_lowrank.runtime.session import OrtLog, default_threads, open_session

__all__ = ["main"]

ROOT = Path(__file__).resolve().parent.parent


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and the comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=ROOT / "models/cache/minilm-l6.onnx")
    parser.add_argument("--ops", default="default", help="as onnx-lowrank takes them")
    parser.add_argument("--keep", type=float, nargs="*", default=[0.8, 0.5])
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--multiples", action="store_true", help="measure rank multiples too")
    parser.add_argument("--save", type=Path, help="write the table to this file")
    options = parser.parse_args(arguments)
    try:
        _show(options)
    except LowRankError as error:
        print(f"cost_table: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _show(options: argparse.Namespace) -> None:
    ops = tuple(options.ops.split(","))
    settings = Settings(threads=options.threads, ops=ops)
    log = OrtLog()
    timer = session_timer(
        lambda data, _: open_session(data, threads=options.threads, log=log),
        clock_for("CPUExecutionProvider", options.threads),
    )
    source = load(options.model)
    with workspace(None) as folder:
        trial = Trial(source, settings, folder, log)
        model = simplify(source, folder, trial.differs).model or source.model
        groups = find(model, Constants(model), all_forms(), chosen_forms(ops)).groups
        place = Place.here(trial.provider.full, trial.threads)
        start = time.perf_counter()
        plan = plan_costs(groups, model, trial.outputs)
        table = measure_costs(plan, timer, place, lambda _: None, multiples=options.multiples)
        seconds = time.perf_counter() - start
        _print(table, seconds)
        if options.save is not None:
            cost_file.save(options.save, table)
        feed = dict(trial.samples.feeds[0])
        print("kept    ms alone     ms before  after   ms saved: predicted  measured")
        for keep in options.keep:
            after = compress(
                model, keep=keep, ops=ops, min_gain=0.0, simplify=False, check=False, bench=False
            )
            ranks = {(row.name, row.form): row.rank for row in after.report.layers}
            saved, alone = _predicted(table, groups, ranks)
            pair = compare(
                timer([serialized(model), serialized(after.model)], feed),
                Limits(most=105, seconds=30.0),
            )
            before = pair.base_ns / 1e6
            print(
                f"{keep:<6g} {alone:9.2f} {before:13.2f} {before * pair.ratios[0]:6.2f} "
                f"{saved:21.2f} {before * (1 - pair.ratios[0]):9.2f} "
                f"± {before * pair.ratios[0] * pair.widths[0]:.2f}"
            )


def _print(table: CostTable, seconds: float) -> None:
    print(f"{len(table.times)} kinds of layers in {seconds:.1f} s; {table.place}")
    names = {key: f"{key.form} {key.shape[1]}×{key.shape[2]}" for key in table.times}
    for key, times in sorted(table.times.items()):
        activation = next((text for text in key.inputs if text[-1:] == "]"), "")
        pairs = "  ".join(
            f"{rank}: {ns / times.dense_ns:.2f} ±{width:.2f}"
            for rank, ns, width in zip(times.ranks, times.pair_ns, times.widths, strict=True)
        )
        liked = "" if times.multiple is None else f"  multiple {times.multiple}"
        print(
            f"{names[key]:<24} of {activation:<18} {times.dense_ns / 1e3:8.1f} µs  {pairs}{liked}"
        )
    for note in table.notes():
        print(f"note: {note}")


def _predicted(
    table: CostTable, groups: Sequence[Group], ranks: dict[tuple[str, str], int | None]
) -> tuple[float, float]:
    """Milliseconds that the pairs save, and that all maps that became pairs took."""
    saved = alone = 0.0
    for group in groups:
        site = group.members[0].site
        rank = ranks.get((node_name(site.node), site.form.name))
        if rank is not None:
            dense, pair = table.dense(group), table.pair(group, rank)
            if dense is not None and pair is not None:
                saved, alone = saved + dense - pair, alone + dense
    return saved / 1e6, alone / 1e6


if __name__ == "__main__":
    sys.exit(main())
