"""One model before and after on every target that runs here, as a table.

    python tools/targets_table.py [--model NAME] [--keep R] [--only TARGET …] [--also TARGET …]

Without arguments: the vision transformer on handwritten digits that ``models/get.py --all`` makes,
factored to half of its parameters with calibration samples, with fixed inputs (``--for qnn``), so
that every target can take it.  Printed are, for both models, the largest difference of any output
to the same model on the CPU, relative to the largest output there, the nodes that the target took
itself, and what one inference costs: the median time where times mean something, else the
deterministic cost that the target tells.  Targets that are not usable here are listed below;
those that need an address, such as ``ssh://user@host``, are given with ``--also``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from onnx_lowrank import LowRankError, compress
from onnx_lowrank.evaluation.subjects import SampleOptions, Subjects, open_subjects
from onnx_lowrank.numerics.arrays import Feed
from onnx_lowrank.runtime.assignment import nodes_elsewhere
from onnx_lowrank.runtime.log import OrtLog
from onnx_lowrank.targets import all_offers, open_target
from onnx_lowrank.targets.base import (
    Job,
    Outcome,
    Target,
)

CACHE = Path(__file__).resolve().parent.parent / "models" / "cache"
UNITS = {"context_bytes": (1e-6, "MB context"), "instructions": (1e-6, "million instructions")}


def main(arguments: Sequence[str]) -> int:
    """Make the model, run it everywhere, print; returns the exit status."""
    parser = argparse.ArgumentParser(description="One model before and after on every target.")
    parser.add_argument("--model", default="vit", help="name in models/cache (default: vit)")
    parser.add_argument("--keep", type=float, default=0.5, help="share of each layer to keep")
    parser.add_argument("--only", nargs="+", metavar="TARGET", help="these targets only")
    parser.add_argument(
        "--also", nargs="+", default=[], metavar="TARGET", help="targets with an address, too"
    )
    parser.add_argument("--samples", type=int, default=4, help="samples to compare on")
    parser.add_argument("--iterations", type=int, default=60, help="timed runs of each model")
    parser.add_argument("--threads", type=int, help="intra-op threads")
    options = parser.parse_args(arguments)
    source = CACHE / f"{options.model}.onnx"
    if not source.exists():
        parser.error(f"{source} is not there; python models/get.py --all makes it")
    try:
        with tempfile.TemporaryDirectory() as folder:
            run(source, options, Path(folder), Console(width=150, highlight=False))
    except LowRankError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    return 0


def run(source: Path, options: argparse.Namespace, folder: Path, console: Console) -> None:
    """Factor the model, then one row for each target."""
    data = source.with_suffix(".data.npz")
    calibration = source.with_suffix(".calibration.npz")
    after = folder / f"{source.stem}-lowrank.onnx"
    result = compress(
        source,
        keep=options.keep,
        uniform=True,
        shape_for="qnn",
        data=data if data.exists() else None,
        calibration=str(calibration) if calibration.exists() else None,
        samples=options.samples,
        bench=False,
    )
    result.save(after)
    given = SampleOptions(data=data if data.exists() else None, samples=options.samples, fix=True)
    copies = folder / "copies"
    copies.mkdir()
    subjects = open_subjects([source, after], given, copies, OrtLog())
    sizes = [file.stat().st_size for file in (source, after)]
    console.print(
        f"{source.name}, {sizes[0] / 1e6:.2f} → {sizes[1] / 1e6:.2f} MB "
        f"(--keep {options.keep:g} --uniform --for qnn), {options.samples} samples"
    )
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("target", no_wrap=True)
    table.add_column("max error against the CPU,\nrelative; before, after", justify="right")
    table.add_column("nodes taken\nbefore, after", justify="right")
    table.add_column("cost of one inference, before → after")
    missing = []
    reference: tuple[Outcome, ...] | None = None
    names = []
    for offer in all_offers():
        wanted = options.only is None or offer.name in (*options.only, "cpu")
        if wanted and not offer.usable:
            missing.append(f"{offer.name}: {offer.found}; {offer.install or ''}".rstrip("; "))
        elif wanted and offer.times != "remote":
            names.append(offer.name)
    names.sort(key=lambda name: name != "cpu")  # the others are compared with it
    for name in [*names, *options.also]:
        try:
            target = open_target(name)
            outcomes = outcomes_of(target, subjects, options)
        except LowRankError as error:
            missing.append(f"{name}: {error}")
            continue
        if reference is None:
            reference = outcomes
        table.add_row(*row(target, outcomes, reference))
    console.print(table)
    for line in missing:
        console.print(Text(f"not here: {line}"))


def outcomes_of(
    target: Target, subjects: Subjects, options: argparse.Namespace
) -> tuple[Outcome, ...]:
    """Both models on one target."""
    files = [subject.file for subject in subjects.models]
    job = Job(iterations=options.iterations, threads=options.threads)
    print(f"running on {target.name} …", file=sys.stderr, flush=True)
    return target.run(files, subjects.samples.feeds, job, lambda _: None)


def row(target: Target, outcomes: Sequence[Outcome], reference: Sequence[Outcome]) -> list[Text]:
    """The cells of one target."""
    name = f"{target.name} (emulated)" if target.emulated else target.name
    failed = [outcome.error for outcome in outcomes if outcome.error is not None]
    if failed:
        return [Text(name), Text("–"), Text("–"), Text(f"does not run: {failed[0]}")]
    errors = [
        f"{distance(o.outputs, r.outputs):.1e}" for o, r in zip(outcomes, reference, strict=True)
    ]
    exact = all(o is r for o, r in zip(outcomes, reference, strict=True))
    return [
        Text(name),
        Text("(is the CPU)" if exact else ", ".join(errors)),
        Text(", ".join(taken(target, outcome) for outcome in outcomes)),
        Text(cost(target, outcomes)),
    ]


def distance(found: Sequence[Feed], expected: Sequence[Feed]) -> float:
    """Largest difference of any element over the largest element."""
    worst = 0.0
    for one, other in zip(found, expected, strict=True):
        for name, array in other.items():
            exact = np.asarray(array, np.float64)
            scale = max(float(np.abs(exact).max(initial=0.0)), 1e-30)
            worst = max(worst, float(np.abs(one[name] - exact).max(initial=0.0)) / scale)
    return worst


def taken(target: Target, outcome: Outcome) -> str:
    """Such as "14/14"; "?" where the target does not tell."""
    if outcome.nodes is None:
        return "?"
    total = sum(map(len, outcome.nodes.values()))
    own = target.own
    elsewhere = 0 if own is None else len(nodes_elsewhere(outcome.nodes, own))
    return f"{total - elsewhere}/{total}"


def cost(target: Target, outcomes: Sequence[Outcome]) -> str:
    """Time where it means something, and deterministic costs."""
    before, after = outcomes
    parts = []
    if not target.emulated and before.times_ns and after.times_ns:
        times = [float(np.median(outcome.times_ns)) / 1e6 for outcome in outcomes]
        parts.append(f"{times[0]:.3g} → {times[1]:.3g} ms ({times[0] / times[1]:.2f}×)")
    for name, value in before.costs.items():
        if name in after.costs:
            factor, unit = UNITS.get(name, (1.0, name))
            new = after.costs[name]
            parts.append(f"{value * factor:.3g} → {new * factor:.3g} {unit} ({value / new:.2f}×)")
    return ", ".join(parts) or "– (times mean nothing)"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
