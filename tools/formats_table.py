"""Print what number formats and ranks cost and lose on a sentence encoder, in one run.

    python tools/formats_table.py [--samples 1024] [--judged 256] [--rounds 40]

The texts are those of ``fit_table.py``.  The first table has the float model, ONNX Runtime's own
dynamic quantization, rounding to nearest and what ``--weights`` makes, alone and with pairs:
bytes of the file, cosine between its embeddings and the float model's, and the time of one short
text on one thread against the float model's, run in turns.  The second table has what the result
with pairs loses when it is quantized by ``quantize_dynamic`` later, and what the float model does;
the exit code is 1 where that is above its bar.

Needs ``models/cache/minilm-l6.onnx`` and its tokenizer (see ``models/get.py``) and the package
``tokenizers`` of the extra ``exporters``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from fit_table import JUDGED, ROOT, Feed, batches, calibrating, embeddings, paragraphs
from onnxruntime.quantization import QuantType, quantize_dynamic
from tokenizers import Tokenizer

from onnx_lowrank import compress
from onnx_lowrank.numerics.arrays import Array
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
}
PAIRS = f"--keep {_KEPT:g}"
# What the cosine of the pairs may lose by being quantized.
_BAR = 0.02
_STRICT = 0.01  # QUInt8, per channel


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables; returns 1 if a bar is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cache = ROOT / "models" / "cache"
    parser.add_argument("--model", type=Path, default=cache / "minilm-l6.onnx")
    parser.add_argument("--tokenizer", type=Path, default=cache / "minilm-l6.tokenizer.json")
    parser.add_argument("--samples", type=int, default=1024, help="paragraphs to calibrate with")
    parser.add_argument("--judged", type=int, default=JUDGED, help="paragraphs that judge")
    parser.add_argument("--rounds", type=int, default=40, help="of the timing")
    options = parser.parse_args(arguments)
    tokenizer = Tokenizer.from_file(str(options.tokenizer))
    fit = calibrating(tokenizer, options.samples)
    judge = batches(tokenizer, sorted(paragraphs("h", "z", options.judged), key=len))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = {"float": options.model}
        for kind in (QuantType.QInt8, QuantType.QUInt8):
            files[f"dynamic, channels, {kind.name}"] = quantized(options.model, folder, True, kind)
        files |= ours(options.model, fit, judge[0], folder)
        cosine = judged(options.model, judge)
        cosines = {title: cosine(path) for title, path in files.items()}
        print(f"{options.samples} paragraphs calibrate, {options.judged} judge")
        print(f"{'':<28}{'MB':>7}{'cosine':>9}{'speed':>8}")
        speeds = timed(files, judge[0], options.rounds)
        for title, path in files.items():
            size = path.stat().st_size / 1e6
            print(f"{title:<28}{size:>7.2f}{cosines[title]:>9.4f}{speeds[title]:>7.2f}×")
        return 0 if later(options.model, files[PAIRS], folder, cosine) else 1


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


def timed(files: Mapping[str, Path], feed: Feed, rounds: int) -> dict[str, float]:
    """How many times as fast as the first file each is, by the median of the ratios."""
    short = {name: array[:1, :_TOKENS] for name, array in feed.items()}

    def caller(path: Path) -> Callable[[], dict[str, Array]]:
        session = open_session(path, threads=1)
        return lambda: run(session, short, "the model")

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
