"""Print what number formats and ranks cost and lose on a sentence encoder, in one run.

    python tools/formats_table.py [--samples 1024] [--judged 256] [--rounds 40] [--no-later]

The texts are those of ``fit_table.py``.  The first table has the float model, ONNX Runtime's own
dynamic quantization, rounding to nearest and what ``--weights`` makes, alone, with pairs, and
chosen for each layer with the linear layers alone or the tables of embeddings too, by a share of
the bytes or, with ``--activations int8``, by a loss and a size: bytes of the
file and of the linear weights, cosine between its embeddings and the float model's, the time of one
short text on one thread against the float model's, run in turns, and where it was predicted the
damage to the outputs over the damage achieved.  The second table has what the result with pairs
loses when it is quantized by ``quantize_dynamic`` later, and what the float model does.  The exit
code is 1 where a bar is missed; the last lines name them.

Needs ``models/cache/minilm-l6.onnx`` and its tokenizer (see ``models/get.py``) and the package
``tokenizers`` of the extra ``exporters``.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from fit_table import (
    JUDGED,
    Feed,
    batches,
    calibrating,
    embeddings,
    encoder_parser,
    paragraphs,
)
from onnxruntime.quantization import QuantType, quantize_dynamic
from tokenizers import Tokenizer

from onnx_lowrank import compress, sweep
from onnx_lowrank.compression.sweep_report import Point
from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.runtime.saturation import saturates
from onnx_lowrank.runtime.session import open_session, run
from onnx_lowrank.runtime.timing import interleave

__all__ = ["main"]

_KEPT = 0.8
_TOKENS = 16
# The rows of ours: options of `compress` beside the samples.
ROWS: dict[str, dict[str, Any]] = {
    "4 bits to nearest": {"energy": 1.0, "weights": "4", "calibrate": False},
    "--weights 4": {"energy": 1.0, "weights": "4"},
    "--weights 8": {"energy": 1.0, "weights": "8"},
    f"--keep {_KEPT:g}": {"keep": _KEPT, "uniform": True},
    f"--keep {_KEPT:g} --weights 8": {"keep": _KEPT, "uniform": True, "weights": "8"},
    "--weights 8 --activations int8": {"energy": 1.0, "weights": "8", "activations": "int8"},
}
PAIRS = f"--keep {_KEPT:g}"
_DYNAMIC, _FAST = "dynamic, channels, ", "within a loss of "
INT8 = f"{_DYNAMIC}{QuantType.QUInt8.name if saturates() else QuantType.QInt8.name}"
# Shares of the bytes that `--weights auto` keeps: of the linear layers, and with the tables.
LINEAR = (0.235, 0.19, 0.165, 0.152, 0.141, 0.13)
ALL = (0.26, 0.215, 0.19, 0.165, 0.155, 0.15, 0.14, 0.125)
# Bars: cosine at least, MB of what at most.
_STRICT_COSINE, _STRICT_LINEAR = 0.995, 6.5
_COSINE, _FILE = 0.992, 14.0
_PREDICTED = (0.67, 1.5)
# Of int8's bytes, what a model may have that is as near and as fast.
_SMALLER = 0.9
# Losses (1 - cosine of the outputs) within which the fastest model is looked for, with inputs in 8
# bits and that share of int8's bytes.
FAST = (0.0075, 0.0068)
# What the cosine of the pairs may lose by being quantized.
_BAR = 0.02
_STRICT = 0.01  # QUInt8, per channel


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables; returns 1 if a bar is missed."""
    parser = encoder_parser(__doc__)
    parser.add_argument("--samples", type=int, default=1024, help="paragraphs to calibrate with")
    parser.add_argument("--judged", type=int, default=JUDGED, help="paragraphs that judge")
    parser.add_argument("--rounds", type=int, default=40, help="of the timing")
    parser.add_argument("--linear", type=float, nargs="*", default=LINEAR, help="shares to keep")
    parser.add_argument("--all", type=float, nargs="*", default=ALL, help="the same with tables")
    parser.add_argument("--fast", type=float, nargs="*", default=FAST, help="losses of the fast")
    parser.add_argument("--heal", type=int, default=0, help="steps for what formats are chosen for")
    parser.add_argument("--no-later", action="store_true", help="leave out the second table")
    options = parser.parse_args(arguments)
    tokenizer = Tokenizer.from_file(str(options.tokenizer))
    fit = calibrating(tokenizer, options.samples)
    judge = batches(tokenizer, sorted(paragraphs("h", "z", options.judged), key=len))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = {"float": options.model}
        for kind in (QuantType.QInt8, QuantType.QUInt8):
            files[f"{_DYNAMIC}{kind.name}"] = quantized(options.model, folder, True, kind)
        files |= ours(options.model, fit, judge[0], folder)
        points: dict[str, Point] = {}
        for title, shares, ops in (
            ("auto", options.linear, ["matmul", "gemm"]),
            ("auto, tables", options.all, None),
        ):
            found = chosen(options.model, fit, judge[0], folder, shares, ops, options.heal)
            for share, (path, point) in found:
                files[f"{title}, {share:g}"] = path
                points[f"{title}, {share:g}"] = point
        files |= fast(options.model, files[INT8], fit, judge[0], folder, options.fast)
        cosine = judged(options.model, judge)
        cosines = {title: cosine(path) for title, path in files.items()}
        print(f"{options.samples} paragraphs calibrate, {options.judged} judge")
        print(f"{'':<32}{'MB':>7}{'linear':>8}{'cosine':>9}{'speed':>8}{'predicted':>11}")
        short = {name: array[:1, :_TOKENS] for name, array in judge[0].items()}
        speeds = timed(files, short, options.rounds)
        for title, path in files.items():
            size, own = path.stat().st_size / 1e6, linear(path) / 1e6
            ratio = predicted(points.get(title))
            shown = "" if ratio is None else f"{ratio:.2f}"
            print(
                f"{title:<32}{size:>7.2f}{own:>8.2f}{cosines[title]:>9.4f}{speeds[title]:>7.2f}×"
                f"{shown:>11}"
            )
        met = not points or bars(files, cosines, points)
        met &= not options.fast or as_fast(files, cosines, speeds)
        if not options.no_later:
            met &= later(options.model, files[PAIRS], folder, cosine)
        return 0 if met else 1


def bars(
    files: Mapping[str, Path], cosines: Mapping[str, float], points: Mapping[str, Point]
) -> bool:
    """Print how near the bars are; whether all are met."""
    own = [(title, cosines[title]) for title in points]
    strict = [linear(files[title]) / 1e6 for title, found in own if found >= _STRICT_COSINE]
    small = [files[title].stat().st_size / 1e6 for title, found in own if found >= _COSINE]
    ratios = [ratio for point in points.values() if (ratio := predicted(point)) is not None]
    least, most = min(ratios, default=1.0), max(ratios, default=1.0)
    lines = (
        (
            min(strict, default=float("inf")) <= _STRICT_LINEAR,
            f"linear MB at a cosine of {_STRICT_COSINE} or more: {min(strict, default=0):.2f}, "
            f"bar {_STRICT_LINEAR}",
        ),
        (
            min(small, default=float("inf")) <= _FILE,
            f"file MB at a cosine of {_COSINE} or more: {min(small, default=0):.2f}, bar {_FILE}",
        ),
        (
            _PREDICTED[0] <= least and most <= _PREDICTED[1],
            f"predicted over achieved damage: {least:.2f} to {most:.2f}, bar {_PREDICTED}",
        ),
    )
    print()
    for met, line in lines:
        print(f"{'met' if met else 'MISSED'}: {line}")
    return all(met for met, _ in lines)


def as_fast(
    files: Mapping[str, Path], cosines: Mapping[str, float], speeds: Mapping[str, float]
) -> bool:
    """Print how fast a model is that is smaller than int8's and as near; whether as fast as it."""
    least, most = cosines[INT8], _SMALLER * files[INT8].stat().st_size
    own = [t for t in files if t.startswith(_FAST) and cosines[t] >= least]
    ratios = [speeds[t] / speeds[INT8] for t in own if files[t].stat().st_size <= most]
    met = max(ratios, default=0.0) >= 1.0
    print(
        f"{'met' if met else 'MISSED'}: speed over int8's at {_SMALLER:.0%} of its bytes and a "
        f"cosine of {least:.4f} or more: {max(ratios, default=0.0):.2f}, bar 1.0 ({INT8})"
    )
    return met


def fast(
    model: Path, int8: Path, fit: Sequence[Feed], held: Feed, folder: Path, losses: Sequence[float]
) -> dict[str, Path]:
    """The fastest models within losses that are smaller than int8's."""
    arrays: Any = held
    np.savez(folder / "held.npz", **arrays)
    found = {}
    for number, loss in enumerate(losses):
        known: dict[str, Any] = {"load_costs" if number else "save_costs": folder / "costs.json"}
        result = compress(
            model,
            tolerance=loss,
            metric="cosine",
            max_size=int(_SMALLER * int8.stat().st_size),
            weights="8,4",
            activations="int8",
            data=folder / "held.npz",
            calibration=fit,
            calibration_samples=len(fit),
            simplify=False,
            threads=1,
            **known,
        )
        title = f"{_FAST}{loss:g}"
        found[title] = folder / f"fast-{number}.onnx"
        ir.save(result.model, found[title])
    return found


def predicted(point: Point | None) -> float | None:
    """Predicted over achieved damage; None where one of them is not known."""
    if point is None or not point.predicted_damage or not point.damage:
        return None
    return point.predicted_damage / point.damage


def chosen(
    model: Path,
    fit: Sequence[Feed],
    held: Feed,
    folder: Path,
    shares: Sequence[float],
    ops: Sequence[str] | None,
    heal: int = 0,
) -> Iterator[tuple[float, tuple[Path, Point]]]:
    """Ranks and formats chosen for each layer at several shares of the bytes."""
    if not shares:
        return
    arrays: Any = held
    np.savez(folder / "held.npz", **arrays)
    into = folder / ("all" if ops is None else "linear")
    into.mkdir()
    report = sweep(
        model,
        shares=shares,
        weights="auto",
        quantize_ops=ops,
        heal=heal,
        data=folder / "held.npz",
        calibration=fit,
        calibration_samples=len(fit),
        simplify=False,
        bench=False,
        models=into,
    )
    for missed in report.missed:
        print(missed, file=sys.stderr)
    for point in report.points:
        if point.keep < 1.0 and point.model is not None:
            yield point.keep, (Path(point.model), point)


def linear(path: Path) -> int:
    """Bytes of the constants that products with a weight read; each counts once."""
    model = ir.load(path)
    # What is made of constants alone: their names and bytes.
    made: dict[ir.Value, dict[str, int]] = {}
    found: dict[str, int] = {}
    for node in model.graph:
        inputs = [value for value in node.inputs if value is not None]
        for value in inputs:
            if value not in made and (own := ir.convenience.get_const_tensor(value)) is not None:
                made[value] = {value.name or "": own.nbytes}
        if node.op_type in ("MatMul", "Gemm", "MatMulInteger"):
            for value in inputs[:2]:
                found |= made.get(value, {})
        elif inputs and all(value in made for value in inputs):
            parts = {name: size for value in inputs for name, size in made[value].items()}
            made |= dict.fromkeys(node.outputs, parts)
    return sum(found.values())


def ours(model: Path, fit: Sequence[Feed], held: Feed, folder: Path) -> dict[str, Path]:
    """The rows of this package, calibrated once."""
    arrays: Any = held
    np.savez(folder / "held.npz", **arrays)  # so that all others calibrate
    statistics = folder / "statistics"
    common: dict[str, Any] = {
        "data": folder / "held.npz",
        "simplify": False,
        "check": False,
        "bench": False,
    }
    found = {}
    for number, (title, row) in enumerate(ROWS.items()):
        source: dict[str, Any] = {}
        if row.get("calibrate", True) and statistics.exists():
            source = {"load_stats": statistics}
        elif row.get("calibrate", True):
            source = {"calibration": fit, "calibration_samples": len(fit)}
            source["save_stats"] = statistics
        result = compress(model, **common, **source, **row)
        found[title] = folder / f"ours-{number}.onnx"
        ir.save(result.model, found[title])
    return found


def quantized(model: Path, folder: Path, channels: bool, kind: QuantType, **more: Any) -> Path:
    """The model by ONNX Runtime's dynamic quantization."""
    path = folder / f"{model.stem}-{channels:d}-{kind.name}-{len(more)}.onnx"
    quantize_dynamic(model, path, per_channel=channels, weight_type=kind, **more)
    return path


def judged(model: Path, judge: Sequence[Feed]) -> Callable[[Path], float]:
    """A function that gives the mean cosine of a model's embeddings to those of the float model."""
    dense = embeddings(model, judge)
    return lambda path: float((embeddings(path, judge) * dense).sum(axis=1).mean())


def timed(files: Mapping[str, Path], feed: Mapping[str, Array], rounds: int) -> dict[str, float]:
    """How many times as fast as the first file each is, by the median of the ratios."""

    def caller(path: Path) -> Callable[[], dict[str, Array]]:
        session = open_session(path, threads=1)
        return lambda: run(session, feed, "the model")

    times = np.array(
        interleave(
            [[caller(path) for path in files.values()]], rounds=rounds, warmup=3, seconds=None
        )
    )
    ratios = np.median(times[:, :1] / times, axis=0)
    return dict(zip(files, (float(ratio) for ratio in ratios), strict=True))


def later(model: Path, pairs: Path, folder: Path, cosine: Callable[[Path], float]) -> bool:
    """Print what models lose by being quantized; whether the pairs stay within the bars."""
    print(f"\nlost by quantize_dynamic{'':<12}{'float':>9}{PAIRS:>14}   bar")
    before, met = cosine(pairs), True
    for channels in (False, True):
        for kind in (QuantType.QInt8, QuantType.QUInt8):
            for more in ({}, {"reduce_range": True}):
                lost = [
                    start - cosine(quantized(path, folder, channels, kind, **more))
                    for path, start in ((model, 1.0), (pairs, before))
                ]
                strict = channels and kind is QuantType.QUInt8 and not more
                bar = _STRICT if strict else _BAR
                met &= lost[1] <= bar
                title = f"{'channels' if channels else 'tensor'}, {kind.name}"
                title += ", reduced" if more else ""
                print(f"  {title:<34}{lost[0]:>9.4f}{lost[1]:>14.4f}   {bar:g}", flush=True)
    return met


if __name__ == "__main__":
    sys.exit(main())
