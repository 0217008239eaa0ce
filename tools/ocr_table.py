"""Print how far factors that are fitted to data go, on two models that read text.

    python tools/ocr_table.py [captcha] [ppocrv5-rec] [--judged 320] [--samples 256] [--heal STEPS]

For the captcha CRNN and the PP-OCRv5 recogniser: the share of freshly drawn images that the model
and its compressed versions read without a mistake, every layer keeping the same share of its
parameters, or ("budget") all layers together.  Calibration, what is held out for it, and judging
draw with three seeds.

With ``--formats`` another table has the bytes of the file and the same share for the model, for
ONNX Runtime's dynamic quantization of it and for ``--weights auto`` at shares of the bytes of the
linear layers and convolutions.  With ``--ops default,conv`` convolutions may be pairs as well.

Needs ``models/cache/captcha.onnx``, ``models/cache/ppocrv5-rec.onnx`` and its characters (see
``models/get.py``), and the packages ``captcha``, ``matplotlib`` and ``pillow`` of the extra
``exporters``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxruntime.quantization import QuantType, quantize_dynamic

from onnx_lowrank import compress, sweep
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
FORMAT_SHARES = {"captcha": (0.08, 0.04, 0.03, 0.022), "ppocrv5-rec": (0.26, 0.2, 0.16)}
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
    parser.add_argument("--keep", type=float, nargs="+", help="shares to keep instead of ours")
    parser.add_argument("--heal", type=int, default=0, help="steps of a column with healing")
    parser.add_argument("--ops", default="default", help="as that of the command")
    parser.add_argument("--formats", action="store_true", help="the table of number formats")
    options = parser.parse_args(arguments)
    unknown = set(options.models) - set(TASKS)
    if unknown:
        parser.error(f"expected models of {', '.join(TASKS)}, got {', '.join(sorted(unknown))}")
    if options.heal:
        COLUMNS["+ refit, heal"] = {"refit": True, "heal": options.heal}
    ops = tuple(options.ops.split(","))
    if options.formats:
        for name in options.models or TASKS:
            shares = options.keep or FORMAT_SHARES[name]
            formats(TASKS[name], options.judged, options.samples, shares, ops)
        return 0
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


def formats(
    task: Task, judged: int, samples: int, shares: Sequence[float], ops: tuple[str, ...]
) -> None:
    """Print the table of number formats of one model."""
    judge = task.draw(judged, JUDGE_SEED)
    fit = feeds(task, task.draw(samples, FIT_SEED))
    print(f"{task.name}: share of {judged} images read without a mistake; {samples} calibrate")
    print(f"{'':<20}{'MB':>8}{'read':>8}{'standard error':>16}{'predicted':>11}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "held").mkdir()
        (folder / "models").mkdir()
        for index, feed in enumerate(feeds(task, task.draw(HELD, HELD_SEED))):
            np.savez(folder / "held" / f"{index}.npz", allow_pickle=False, **feed)
        quantize_dynamic(
            task.model, folder / "int8.onnx", per_channel=True, weight_type=QuantType.QUInt8
        )
        for title, path in (("float", task.model), ("int8 dynamic", folder / "int8.onnx")):
            row(task, title, path, judge, "")
        report = sweep(
            task.model,
            shares=shares,
            weights="auto",
            ops=ops,
            rank_multiple=1,
            data=folder / "held",
            calibration=fit,
            calibration_samples=len(fit),
            simplify=False,
            bench=False,
            models=folder / "models",
        )
        for point in report.points:
            if point.keep < 1.0 and point.model is not None:
                ratio = ""
                if point.predicted_damage and point.damage:
                    ratio = f"{point.predicted_damage / point.damage:.2f}"
                row(task, f"auto, {point.keep:g}", Path(point.model), judge, ratio)
    for text in (*report.missed, *report.notes):
        print(text, file=sys.stderr)


def row(task: Task, title: str, path: Path, judge: Drawn, ratio: str) -> None:
    """Print the row of one file."""
    read, size = accuracy(task, path, judge), path.stat().st_size / 1e6
    error = (read * (1.0 - read) / len(judge.texts)) ** 0.5
    print(f"{title:<20}{size:>8.3f}{read:>8.3f}{error:>16.3f}{ratio:>11}", flush=True)


def accuracy(task: Task, model: Path | bytes, judge: Drawn) -> float:
    """Share of the images that the model reads without a mistake."""
    session = open_session(model)
    return exact(task, judge, lambda feed: next(iter(run(session, feed, task.name).values())))


if __name__ == "__main__":
    sys.exit(main())
