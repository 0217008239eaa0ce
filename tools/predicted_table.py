"""Print how well the damage of whole models is predicted, on models of several kinds, in one run.

    python tools/predicted_table.py [vit] [minilm-l3] [magika] [captcha] [ppocrv4-rec] [ppocrv5-rec]
                                    [--shares 0.5 0.2] [--metric kl] [--samples 256] [--held 256]

Each model of ``models/cache/`` (see ``models/get.py``) is compressed at shares of the bytes (with
``--weights fp32`` of the parameters) of its linear layers and tables.  A row has the size of the
file, the damage to the outputs that was predicted when ranks and formats were chosen, the damage
achieved on samples that had no part in that, each with its standard error, and the quotient of the
two.  Damage is the mean relative square error of the outputs, or what ``--metric`` makes of it.
The exit code is 1 where a quotient is outside of 0.67 to 1.5.

Samples are digits (``vit``), docstrings of the standard library (``minilm-l3``), its files
(``magika``) and freshly drawn images of text (the others).  Needs the packages ``captcha``,
``matplotlib``, ``pillow`` and ``tokenizers`` of the extra ``exporters``.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from fit_table import ROOT, Feed, batches, calibrating, paragraphs
from formats_table import predicted
from tokenizers import Tokenizer

from onnx_lowrank import sweep

sys.path.insert(0, str(ROOT / "models"))

from drawn import CAPTCHA, LINES, Task, feeds

__all__ = ["main"]

CACHE = ROOT / "models" / "cache"
_WITHIN = (0.67, 1.5)
# What the file type detector reads: so many bytes of a file's ends, and what stands for no byte.
_END, _NO_BYTE, _SHORTEST = 1024, 256, 64
FIT_SEED, HELD_SEED = 1, 2
_TOGETHER = 4  # images of text in one run

Samples = tuple[Sequence[Feed], Sequence[Feed]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 where a quotient is outside of the bar."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--shares", type=float, nargs="+", help="to keep, in place of ours")
    parser.add_argument("--weights", default="auto", help="as that of the command")
    parser.add_argument("--ops", default="default", help="as that of the command")
    parser.add_argument("--metric", help="as that of the command")
    parser.add_argument("--judge-at", nargs="*", default=(), help="as that of the command")
    parser.add_argument("--effort", default="quick", help="as that of the command")
    parser.add_argument("--samples", type=int, default=256, help="to fit to")
    parser.add_argument("--held", type=int, default=256, help="for the search and for judging")
    options = parser.parse_args(arguments)
    unknown = set(options.models) - set(MODELS)
    if unknown:
        parser.error(f"expected models of {', '.join(MODELS)}, got {', '.join(sorted(unknown))}")
    print(f"{options.samples} samples to fit to, {options.held} others; --metric {options.metric}")
    print(f"{'':<14}{'kept':>6}{'MB':>8}{'predicted':>22}{'achieved':>22}{'quotient':>10}")
    met = True
    for name in options.models or MODELS:
        read, shares = MODELS[name]
        fit, held = read(options.samples, options.held)
        report = sweep(
            CACHE / f"{name}.onnx",
            shares=options.shares or shares,
            weights=options.weights,
            ops=tuple(options.ops.split(",")),
            metric=options.metric,
            judge_at=tuple(options.judge_at),
            effort=options.effort,
            data=held,
            samples=len(held),
            calibration=fit,
            calibration_samples=len(fit),
            bench=False,
        )
        for text in (*report.missed, *report.notes):
            print(f"{name}: {text}", file=sys.stderr)
        for point in report.points:
            ratio = predicted(point)
            if point.keep >= 1.0 or ratio is None:
                continue
            met &= _WITHIN[0] <= ratio <= _WITHIN[1]
            own = with_error(point.predicted_damage, point.predicted_error)
            seen = with_error(point.damage, point.damage_error)
            size = point.bytes / 1e6
            print(f"{name:<14}{point.keep:>6g}{size:>8.3f}{own:>22}{seen:>22}{ratio:>10.2f}")
        sys.stdout.flush()
    print(f"{'met' if met else 'MISSED'}: every quotient within {_WITHIN}")
    return 0 if met else 1


def with_error(value: float | None, error: float | None) -> str:
    """A figure and its standard error, where that is known."""
    text = "" if value is None else f"{value:.3g}"
    return text if error is None else f"{text} ± {error:.2g}"


def digits(samples: int, held: int) -> Samples:
    """Images of MNIST, each a sample."""
    with np.load(CACHE / "vit.data.npz") as stored:
        ((name, images),) = stored.items()
    each = [{name: images[index : index + 1]} for index in range(samples + held)]
    return each[:samples], each[samples:]


def sentences(samples: int, held: int) -> Samples:
    """Paragraphs of the standard library, in padded batches."""
    tokenizer = Tokenizer.from_file(str(CACHE / "minilm-l3-static.tokenizer.json"))
    texts = sorted(paragraphs("h", "z", held), key=len)
    return calibrating(tokenizer, samples), batches(tokenizer, texts)


def files(samples: int, held: int) -> Samples:
    """Both ends of files of the standard library, of all kinds in turns, each a sample."""
    kinds: dict[str, list[Path]] = {}
    for path in sorted(Path(os.__file__).parent.rglob("*")):
        if path.is_file() and not path.is_symlink() and path.stat().st_size >= _SHORTEST:
            kinds.setdefault(path.suffix, []).append(path)
    dice = np.random.default_rng(FIT_SEED)
    mixed = [[own[place] for place in dice.permutation(len(own))] for own in kinds.values()]
    turns = (own[turn] for turn in range(samples + held) for own in mixed if turn < len(own))
    chosen = [path for path, _ in zip(turns, range(samples + held), strict=False)]
    each = [{"bytes": ends(chosen[place])} for place in dice.permutation(len(chosen))]
    return each[:samples], each[samples:]


def ends(path: Path) -> np.ndarray[tuple[int, ...], np.dtype[np.int32]]:
    """The first and the last bytes of a file as the detector takes them, shape [1, 2048]."""
    content = path.read_bytes()
    found = np.full((1, 2 * _END), _NO_BYTE, np.int32)
    first = np.frombuffer(content[: 4 * _END].lstrip()[:_END], np.uint8)
    last = np.frombuffer(content[-4 * _END :].rstrip()[-_END:], np.uint8)
    found[0, : len(first)] = first
    found[0, 2 * _END - len(last) :] = last
    return found


def drawn(task: Task) -> Callable[[int, int], Samples]:
    """Images of text, in small batches: the search then has many samples."""
    return lambda samples, held: (
        feeds(task, task.draw(samples, FIT_SEED), _TOGETHER),
        feeds(task, task.draw(held, HELD_SEED), _TOGETHER),
    )


# How the samples of each are read, and the shares that are kept of it.
MODELS: dict[str, tuple[Callable[[int, int], Samples], tuple[float, ...]]] = {
    "vit": (digits, (0.5, 0.2, 0.1)),
    "minilm-l3": (sentences, (0.2, 0.14)),
    "magika": (files, (0.3, 0.15)),
    "captcha": (drawn(CAPTCHA), (0.08, 0.04)),
    "ppocrv4-rec": (drawn(replace(LINES, name="ppocrv4-rec")), (0.26, 0.2)),
    "ppocrv5-rec": (drawn(LINES), (0.26, 0.2, 0.16)),
}


if __name__ == "__main__":
    sys.exit(main())
