"""Print how number formats run on other targets: whether, how near, how fast, what is left out.

    python tools/target_formats_table.py [--target NAME …] [--iterations 40] [--keep 0.5]

The model is the vision transformer on handwritten digits that ``models/get.py`` makes, with fixed
inputs, so that every target can take it.  Rows are the float model, ONNX Runtime's own dynamic and
static int8, what ``--weights`` makes, pairs, pairs with ``--weights 8``, and 8 bits with inputs in
8 bits too: with ranges of each run, for ``qnn`` with those of the samples, alone and chosen with
ranks in about as many bytes.  For each target (web,
qemu-arm64 and qnn, unless others are named): the relative L2 distance of the outputs there to those
of the float model on the CPU, the nodes that the target took itself, the operators that it left to
the CPU, and what one inference costs, in turns where times mean something, else the deterministic
cost that the target tells.  The last table has what the rules of ``support`` say of each row.
Targets that are not here are listed.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from rich.console import Console
from rich.table import Table
from rich.text import Text
from targets_table import CACHE, UNITS, taken

from onnx_lowrank import LowRankError, compress
from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.graph.load import load
from onnx_lowrank.graph.walk import node_name
from onnx_lowrank.maps.find import find
from onnx_lowrank.maps.forms import all_forms, chosen_forms
from onnx_lowrank.numerics.arrays import Feed
from onnx_lowrank.runtime.session import open_session, run
from onnx_lowrank.targets import open_target
from onnx_lowrank.targets.base import Job, Outcome, Target
from onnx_lowrank.targets.support import support_of

__all__ = ["main"]

TARGETS = ("web", "qemu-arm64", "qnn")
# The share of the bytes that the smallest row for QNN keeps: about those of int8.
SMALL = 0.25
# Where products of integers with inputs that are rounded beforehand have one scale, or many.
STATIC = {"int8 static, by channels": True, "int8 static, one scale": False}
_PROVIDERS = ("qnn", "nnapi", "coreml (MLProgram)", "xnnpack", "webgpu")


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the models, run them everywhere, print; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", nargs="+", default=TARGETS, metavar="NAME")
    parser.add_argument("--keep", type=float, default=0.5, help="share that pairs keep")
    parser.add_argument("--samples", type=int, default=8, help="samples to compare on")
    parser.add_argument("--fit", type=int, default=256, help="samples that calibrate")
    parser.add_argument("--iterations", type=int, default=40, help="timed runs of each model")
    options = parser.parse_args(arguments)
    source = CACHE / "vit.onnx"
    if not source.exists():
        parser.error(f"{source} is not there; python models/get.py vit makes it")
    logging.disable(logging.WARNING)  # the quantizers' advice
    console = Console(width=150, highlight=False)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fit, judge = samples(source, options.fit, options.samples)
        files = made(source, fit, options.keep, folder)
        exact = outputs(files["float"], judge)
        console.print(
            f"{source.name} with fixed inputs, {len(fit)} samples calibrate, {len(judge)} compare"
        )
        for target in options.target:
            try:
                measured(open_target(target), files, judge, exact, options.iterations, console)
            except LowRankError as error:
                console.print(Text(f"not here: {target}: {error}"))
        ruled(files, console)
    return 0


def samples(source: Path, fit: int, judge: int) -> tuple[list[Feed], list[Feed]]:
    """One inference each: those that calibrate, and others."""
    with np.load(source.with_suffix(".calibration.npz")) as given:
        (name,) = given.files
        own: list[Feed] = [{name: row[None]} for row in given[name][:fit]]
    with np.load(source.with_suffix(".data.npz")) as given:
        return own, [{name: row[None]} for row in given[name][:judge]]


def made(source: Path, fit: Sequence[Feed], keep: float, folder: Path) -> dict[str, Path]:
    """The model in every format."""
    statistics = folder / "statistics"
    common: dict[str, Any] = {
        "data": source.with_suffix(".data.npz"),
        "calibration": fit,
        "calibration_samples": len(fit),
        "check": False,
        "bench": False,
    }
    fixed = folder / "float.onnx"
    compress(source, **common, energy=1.0, shape_for="qnn").save(fixed)
    found = {"float": fixed, "int8 dynamic": folder / "dynamic.onnx"}
    layers = products(fixed)
    quantize_dynamic(
        fixed,
        found["int8 dynamic"],
        per_channel=True,
        weight_type=QuantType.QUInt8,
        nodes_to_quantize=layers,
    )
    for title, channels in STATIC.items():
        found[title] = folder / f"static-{channels:d}.onnx"
        quantize_static(
            fixed,
            found[title],
            _Reader(fit),
            per_channel=channels,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_quantize=layers,
        )
    rows: dict[str, dict[str, Any]] = {
        "--weights 8": {"energy": 1.0, "weights": "8"},
        "--weights 4": {"energy": 1.0, "weights": "4"},
        f"--keep {keep:g}": {"keep": keep, "uniform": True},
        f"--keep {keep:g} --weights 8": {"keep": keep, "uniform": True, "weights": "8"},
        "--activations int8": {"energy": 1.0, "weights": "8", "activations": "int8"},
        "  --for qnn": {
            "energy": 1.0,
            "weights": "8",
            "activations": "int8",
            "shape_for": "qnn",
        },
        f"  --for qnn --keep {SMALL:g}": {
            "keep": SMALL,
            "weights": "auto",
            "activations": "int8",
            "shape_for": "qnn",
            "check": True,  # a budget measures
        },
    }
    for number, (title, row) in enumerate(rows.items()):
        known: dict[str, Any] = dict(common)
        if statistics.exists():
            del known["calibration"], known["calibration_samples"]
            known["load_stats"] = statistics
        else:
            known["save_stats"] = statistics
        found[title] = folder / f"ours-{number}.onnx"
        # Ranges of inputs are no part of the statistics.
        own = common if row.get("shape_for") else known
        compress(fixed, **{**own, **row}).save(found[title])
    return found


def products(path: Path) -> list[str]:
    """Names of the linear layers that may have a format."""
    model = load(path).model
    finding = find(model, Constants(model), all_forms(), chosen_forms(None))
    return [
        node_name(member.site.node)
        for group in finding.groups
        for member in group.members
        if member.site.node.op_type in ("MatMul", "Gemm")
    ]


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    """Samples as ONNX Runtime's quantizer wants them."""

    def __init__(self, feeds: Iterable[Feed]) -> None:
        self._feeds: Iterator[Feed] = iter(feeds)

    def get_next(self) -> Feed | None:
        """The next sample; None behind the last."""
        return next(self._feeds, None)


def outputs(path: Path, feeds: Sequence[Feed]) -> list[Feed]:
    """What a model gives on the CPU."""
    session = open_session(path, threads=1)
    return [run(session, feed, path.name) for feed in feeds]


def measured(
    target: Target,
    files: Mapping[str, Path],
    feeds: Sequence[Feed],
    exact: Sequence[Feed],
    iterations: int,
    console: Console,
) -> None:
    """One table: all formats on one target."""
    print(f"running on {target.name} …", file=sys.stderr, flush=True)
    job = Job(iterations=iterations, threads=1)
    found = target.run(list(files.values()), feeds, job, lambda _: None)
    table = Table(box=None, padding=(0, 2, 0, 0), title_justify="left")
    table.add_column(target.name, no_wrap=True)
    for heading in ("MB", "off by", "nodes taken", "cost", "float / this"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("left to the CPU")
    for (title, path), outcome in zip(files.items(), found, strict=True):
        size = f"{path.stat().st_size / 1e6:.2f}"
        if outcome.error is not None:
            table.add_row(Text(title), size, "–", "–", "–", "–", Text(outcome.error[:80]))
            continue
        table.add_row(
            Text(title),
            size,
            f"{off(outcome.outputs, exact):.1e}",
            taken(target, outcome),
            *cost(found[0], outcome),
            Text(left(target, outcome)),
        )
    console.print(table)
    console.print()


def off(found: Sequence[Feed], exact: Sequence[Feed]) -> float:
    """Relative L2 distance of all outputs together."""
    pairs = [
        (np.asarray(one[name], np.float64), np.asarray(array, np.float64))
        for one, other in zip(found, exact, strict=True)
        for name, array in other.items()
    ]
    lost = sum(float(np.square(one - other).sum()) for one, other in pairs)
    return float(np.sqrt(lost / sum(float(np.square(other).sum()) for _, other in pairs)))


def cost(base: Outcome, outcome: Outcome) -> tuple[str, str]:
    """What one inference costs, and the float model's cost divided by it."""
    if base.times_ns and outcome.times_ns:
        ratio = np.median(np.array(base.times_ns) / np.array(outcome.times_ns))
        return f"{float(np.median(outcome.times_ns)) / 1e6:.3g} ms", f"{ratio:.2f}"
    for name, value in outcome.costs.items():
        if name in base.costs:
            factor, unit = UNITS.get(name, (1.0, name))
            return f"{value * factor:.3g} {unit}", f"{base.costs[name] / value:.2f}"
    return "–", "–"


def left(target: Target, outcome: Outcome) -> str:
    """The operators that the target did not run itself."""
    if outcome.nodes is None or target.own is None:
        return ""
    names = [name for key, own in outcome.nodes.items() if key != target.own for name in own]
    return listed(re.findall(r"\w+", name)[-1] for name in names)


def listed(operators: Iterable[str]) -> str:
    """Such as ``8 MatMulInteger, 1 Cast``."""
    return ", ".join(f"{count} {name}" for name, count in Counter(operators).most_common())


def ruled(files: Mapping[str, Path], console: Console) -> None:
    """What the rules of every provider leave to the CPU."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("nodes taken, by the rules", no_wrap=True)
    for provider in _PROVIDERS:
        table.add_column(provider.replace(" (MLProgram)", ""), justify="right", no_wrap=True)
    table.add_column("left by qnn")
    for title, path in files.items():
        found = {
            support.provider: support.model for support in support_of(path, None, {}, {}).providers
        }
        cells = [f"{found[name].taken}/{found[name].nodes}" for name in _PROVIDERS]
        table.add_row(Text(title), *cells, listed(node.op_type for node in found["qnn"].left))
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
