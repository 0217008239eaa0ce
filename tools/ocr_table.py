"""Print how far factors that are fitted to data go, on two models that read text.

    python tools/ocr_table.py [captcha] [ppocrv5-rec] [--judged 320] [--samples 256] [--heal STEPS]

For the captcha CRNN and the PP-OCRv5 recogniser: the share of freshly drawn images that the model
and its compressed versions read without a mistake, every layer keeping the same share of its
parameters, or ("budget") all layers together.  Calibration, what is held out for it, and judging
draw with three seeds.

With ``--formats`` another table has the bytes of the file and of what MatMul and Gemm multiply
with, the same share of images, the time of one image on one thread against the model's, run in
turns, and where it was predicted the damage to the outputs over the damage achieved.  Its rows are
the model, ONNX Runtime's dynamic quantization of it, ``--weights auto`` at shares of the bytes of
linear layers and convolutions, the same with the convolutions as they are (``--linear``), pairs of
floats at shares of the parameters (``--pairs``), and what is fastest within losses (``--fast``),
and within sizes of the file too (``--within``), and what is nearest within sizes (``--small``).
The last lines say how small and how fast a model is that reads as well as the original, within one
standard error, against int8; the exit code is 1 where a bar is missed.  With ``--ops default,conv``
convolutions may be pairs as well.

Needs ``models/cache/captcha.onnx``, ``models/cache/ppocrv5-rec.onnx`` and its characters (see
``models/get.py``), and the packages ``captcha``, ``matplotlib`` and ``pillow`` of the extra
``exporters``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from formats_table import linear, predicted, timed
from onnxruntime.quantization import QuantType, quantize_dynamic

from onnx_lowrank import compress, sweep
from onnx_lowrank.errors import LimitError
from onnx_lowrank.runtime.session import open_session, run

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "models"))

from drawn import BATCH, TASKS, Drawn, Task, exact, feeds

__all__ = ["main"]

SHARES = {"captcha": (0.5, 0.2), "ppocrv5-rec": (0.8, 0.6)}
# What each column passes to compress; all but the plain one have the calibration images.
COLUMNS: dict[str, Mapping[str, Any]] = {
    "plain SVD": {"calibrate": False},
    "output PCA": {},
    "+ refit": {"refit": True},
    # The same total, spread by measured damage.
    "budget": {"uniform": False, "check": True},
}
# Shares of the bytes that `--weights auto` keeps: of all, and with convolutions as they are.
FORMAT_SHARES = {"captcha": (0.08, 0.05, 0.04, 0.03), "ppocrv5-rec": (0.26, 0.2, 0.16)}
LINEAR_SHARES = {"captcha": (0.06, 0.04, 0.03, 0.02), "ppocrv5-rec": ()}
PAIRS = {"captcha": (0.3, 0.2), "ppocrv5-rec": ()}
# Losses (relative L2 error of the outputs) within which the fastest model is looked for.
FAST = {"captcha": (0.15,), "ppocrv5-rec": ()}
# Of int8's bytes, how many a model may have that reads as well, and how much faster it has to be.
_SMALLER, _FASTER = 0.12, 1.3
_PREDICTED = (0.67, 1.5)
_INT8 = "int8 dynamic, "
FIT_SEED, HELD_SEED, JUDGE_SEED = 1, 2, 3
HELD = 2 * BATCH


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(TASKS)}")
    parser.add_argument("--judged", type=int, default=320, help="images to judge with")
    parser.add_argument("--samples", type=int, default=256, help="images to calibrate with")
    parser.add_argument("--batch", type=int, default=BATCH, help="of them that are one sample")
    parser.add_argument("--keep", type=float, nargs="*", help="shares to keep instead of ours")
    parser.add_argument("--heal", type=int, default=0, help="steps of a column with healing")
    parser.add_argument("--ops", default="default", help="as that of the command")
    parser.add_argument("--formats", action="store_true", help="the table of number formats")
    parser.add_argument("--linear", type=float, nargs="*", help="shares, convolutions as they are")
    parser.add_argument("--pairs", type=float, nargs="*", help="shares that pairs of floats keep")
    parser.add_argument("--fast", type=float, nargs="*", help="losses of what is fastest")
    parser.add_argument(
        "--within", type=float, nargs="*", default=(), help="MB at most of what is fastest"
    )
    parser.add_argument(
        "--small", type=float, nargs="*", default=(), help="MB at most of what is nearest"
    )
    parser.add_argument("--held", type=int, default=128, help="images that tell achieved damage")
    parser.add_argument("--effort", default="quick", help="as that of the command")
    parser.add_argument("--time-limit", help="as that of the command, of each model")
    parser.add_argument("--rounds", type=int, default=60, help="of the timing")
    options = parser.parse_args(arguments)
    unknown = set(options.models) - set(TASKS)
    if unknown:
        parser.error(f"expected models of {', '.join(TASKS)}, got {', '.join(sorted(unknown))}")
    if options.heal:
        COLUMNS["+ refit, heal"] = {"refit": True, "heal": options.heal}
    ops = tuple(options.ops.split(","))
    if options.formats:
        met = True
        for name in options.models or TASKS:
            own = argparse.Namespace(**vars(options))
            own.linear = LINEAR_SHARES[name] if options.linear is None else options.linear
            own.pairs = PAIRS[name] if options.pairs is None else options.pairs
            own.fast = FAST[name] if options.fast is None else options.fast
            shares = FORMAT_SHARES[name] if options.keep is None else options.keep
            met &= formats(TASKS[name], own, ops, shares)
        return 0 if met else 1
    for name in options.models or TASKS:
        table(TASKS[name], options.judged, options.samples, options.keep or SHARES[name], ops)
    return 0


def table(
    task: Task, judged: int, samples: int, shares: Sequence[float], ops: tuple[str, ...]
) -> None:
    """Print the table of one model."""
    judge = task.draw(judged, JUDGE_SEED)
    fit = feeds(task, task.draw(samples, FIT_SEED))
    dense = accuracy(task, task.model, judge)
    print(
        f"{task.name}: share of {judged} images read without a mistake, dense {dense:.3f}; "
        f"{samples} calibrate"
    )
    print("  ".join(["kept ", *COLUMNS]), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for index, feed in enumerate(feeds(task, task.draw(HELD, HELD_SEED))):
            np.savez(Path(folder, f"{index}.npz"), allow_pickle=False, **feed)
        for share in shares:
            print(f"{share:<5g}", end="", flush=True)
            for name, extra in COLUMNS.items():
                fitted = extra.get("calibrate", True)
                options: dict[str, Any] = {
                    "uniform": True,
                    "ops": ops,
                    "rank_multiple": 1,
                    "min_gain": 0.0,
                    "data": folder,
                    "calibration": fit if fitted else None,
                    "calibration_samples": len(fit),
                    "simplify": False,
                    "check": False,
                    "bench": False,
                }
                result = compress(task.model, keep=share, **{**options, **extra})
                model = ir.to_proto(result.model).SerializeToString()
                found = accuracy(task, model, judge)
                print(f"  {found:<{len(name)}.3f}", end="", flush=True)
            print(flush=True)


@dataclass(frozen=True)
class Row:
    """One model of the table of formats.

    Attributes:
        file: its size in MB.
        linear: MB of what MatMul and Gemm multiply with.
        read: the share of images that it reads.
        error: the standard error of that.
    """

    file: float
    linear: float
    read: float
    error: float


def formats(
    task: Task, options: argparse.Namespace, ops: tuple[str, ...], shares: Sequence[float]
) -> bool:
    """Print the table of number formats of one model; whether its bars are met."""
    judge = task.draw(options.judged, JUDGE_SEED)
    fit = feeds(task, task.draw(options.samples, FIT_SEED), options.batch)
    common: dict[str, Any] = {
        "calibration": fit,
        "calibration_samples": len(fit),
        "simplify": False,
        "heal": options.heal,
        "effort": options.effort,
        "time_limit": options.time_limit,
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        common["data"] = folder / "held"
        common["data"].mkdir()
        held = feeds(task, task.draw(options.held, HELD_SEED))
        for index, feed in enumerate(held):
            np.savez(common["data"] / f"{index}.npz", allow_pickle=False, **feed)
        common["samples"] = len(held)
        common["work"] = folder / "work"  # moments and damages are those of all rows
        files, ratios = {"float": task.model}, dict[str, float]()
        for kind in (QuantType.QInt8, QuantType.QUInt8):
            path = files[f"{_INT8}{kind.name}"] = folder / f"{kind.name}.onnx"
            quantize_dynamic(task.model, path, per_channel=True, weight_type=kind)
        every: tuple[tuple[str, Sequence[float], dict[str, Any]], ...] = (
            ("auto", shares, {"ops": ops, "weights": "auto"}),
            ("linear", options.linear, {"quantize_ops": ("matmul", "gemm"), "weights": "auto"}),
            ("pairs", options.pairs, {"ops": ops}),
        )
        for title, own, more in every:
            into = folder / title
            into.mkdir()
            if not own:
                continue
            report = sweep(task.model, shares=own, models=into, bench=False, **common, **more)
            for point in report.points:
                if point.keep < 1.0 and point.model is not None:
                    files[f"{title}, {point.keep:g}"] = Path(point.model)
                    ratio = predicted(point)
                    ratios |= {} if ratio is None else {f"{title}, {point.keep:g}": ratio}
            for text in (*report.missed, *report.notes):
                print(text, file=sys.stderr)
        fast = {"activations": "int8", "threads": 1}
        wanted: dict[str, dict[str, Any]] = {}
        for size in options.small:
            wanted[f"nearest, {size:g} MB"] = {"max_size": round(1e6 * size)}
        for loss in options.fast:
            for most in options.within or (None,):
                title = f"fast, {loss:g}" if most is None else f"fast, {loss:g}, {most:g} MB"
                limit = {} if most is None else {"max_size": round(1e6 * most)}
                wanted[title] = {"tolerance": loss, **limit, **fast}
        for title, goal in wanted.items():
            try:
                result = compress(task.model, weights="auto", ops=ops, **goal, **common)
            except LimitError as error:
                print(f"{title}: {error}", file=sys.stderr)
                continue
            files[title] = folder / f"{title}.onnx"
            result.save(files[title])
            for text in result.report.notes:
                print(text, file=sys.stderr)
        return printed(task, files, ratios, judge, options)


def printed(
    task: Task,
    files: Mapping[str, Path],
    ratios: Mapping[str, float],
    judge: Drawn,
    options: argparse.Namespace,
) -> bool:
    """Print the rows of all files and how near the bars are; whether they are met."""
    print(
        f"{task.name}: share of {len(judge)} images read without a mistake; {options.samples} "
        f"calibrate, {options.held} say what damage is achieved"
    )
    print(
        f"{'':<22}{'MB':>8}{'linear':>8}{'read':>8}{'error':>8}{'speed':>8}{'predicted':>11}",
        flush=True,
    )
    one = {task.input: judge.images[:1]}
    speeds = timed(files, one, options.rounds)
    rows = {}
    for title, path in files.items():
        read = accuracy(task, path, judge)
        error = (read * (1.0 - read) / len(judge)) ** 0.5
        row = rows[title] = Row(path.stat().st_size / 1e6, linear(path) / 1e6, read, error)
        ratio = f"{ratios[title]:.2f}" if title in ratios else ""
        print(
            f"{title:<22}{row.file:>8.3f}{row.linear:>8.3f}{read:>8.3f}{error:>8.3f}"
            f"{speeds[title]:>7.2f}×{ratio:>11}",
            flush=True,
        )
    dense, int8 = rows["float"], [title for title in rows if title.startswith(_INT8)]
    least = dense.read - dense.error
    own = [title for title in rows if title != "float" and title not in int8]
    as_good = [title for title in own if rows[title].read >= least]

    def smallest(part: str) -> float:
        """Of int8's bytes."""
        sizes = [[getattr(rows[t], part) for t in titles] for titles in (as_good, int8)]
        return float(min(sizes[0], default=np.inf) / min(sizes[1]))

    def at_once(part: str) -> bool:
        """Whether one of them is both small and fast enough."""
        size = _SMALLER * min(getattr(rows[title], part) for title in int8)
        fast = _FASTER * max(speeds[title] for title in int8)
        return any(getattr(rows[t], part) <= size and speeds[t] >= fast for t in as_good)

    weights, file = smallest("linear"), smallest("file")
    speed = max((speeds[t] for t in as_good), default=0.0) / max(speeds[t] for t in int8)
    found = {
        f"{weights:.3f} of int8's bytes of linear weights, bar {_SMALLER}": weights <= _SMALLER,
        f"{file:.3f} of int8's file, bar {_SMALLER}": file <= _SMALLER,
        f"{speed:.2f} of int8's speed, bar {_FASTER}": speed >= _FASTER,
        "both of linear weights and speed in one row": at_once("linear"),
        "both of the file and speed in one row": at_once("file"),
        f"predicted over achieved damage within {_PREDICTED}": all(
            _PREDICTED[0] <= ratio <= _PREDICTED[1] for ratio in ratios.values()
        ),
    }
    print(f"of ours that read as well ({least:.3f} or more):")
    for line, met in found.items():
        print(f"  {'met' if met else 'MISSED'}: {line}")
    return all(found.values())


def accuracy(task: Task, model: Path | bytes, judge: Drawn) -> float:
    """Share of the images that the model reads without a mistake."""
    session = open_session(model)
    return exact(task, judge, lambda feed: next(iter(run(session, feed, task.name).values())))


if __name__ == "__main__":
    sys.exit(main())
