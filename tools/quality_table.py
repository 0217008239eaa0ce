"""Print what models out of ordinary packages lose by their own metric, beside int8 alone.

    python tools/quality_table.py [vit] [minilm-l6] [captcha] [ppocrv5-rec] [--effort standard]
                                  [--ops default,hidden,heads]
    python tools/quality_table.py smollm2 --samples 64 --judged 48

For each model of ``models/cache/`` (see ``models/get.py``): the float model; ours at 80 % and 70 %
of the parameters of the linear layers; ``quantize_dynamic`` per channel; and ours with ``--weights
auto`` in as many bytes as that takes.  The metric is the task's own: accuracy of a classifier of
MNIST, share of functions of the standard library whose docstring a sentence encoder finds among
those of all (R@1), share of freshly drawn images that are read without a mistake, log-likelihood of
a decoder's next token with the perplexity that it makes.  Each figure is a mean over items that
nothing was fitted to, with its standard error; the difference to the float model is that of the
same items, with its own.

Needs the packages ``captcha``, ``matplotlib``, ``pillow`` and ``tokenizers`` of the extra
``exporters``.
"""

from __future__ import annotations

import argparse
import ast
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from fit_table import ROOT, batches, calibrating, embeddings
from onnxruntime.quantization import QuantType, quantize_dynamic
from tokenizers import Tokenizer

from onnx_lowrank import LowRankError, compress
from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.numerics.divergence import surprises
from onnx_lowrank.runtime.session import open_session, run

sys.path.insert(0, str(ROOT / "models"))

from drawn import TASKS, feeds
from windows import LENGTH, windows

__all__ = ["main"]

CACHE = ROOT / "models" / "cache"
KEPT = (0.8, 0.7)
# Images of MNIST that calibrate; the others judge.
_FITTED = 300


@dataclass(frozen=True)
class Task:
    """A model, what it is fitted to, and how each item of a task is scored.

    Attributes:
        model: the file.
        data: samples for `compress`.
        scores: from a model's file or bytes to one score an item.
        metric: what the score is.
        options: for `compress`, beside the goal.
        shown: of the scores' mean, what else is printed.
    """

    model: Path
    data: Any
    scores: Callable[[Path | bytes], Array]
    metric: str
    options: Mapping[str, Any] = field(default_factory=dict)
    shown: Callable[[float], str] = lambda _: ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table for each model; returns 1 if a row could not be made."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = f"of {', '.join(MAKERS)}; default: all but smollm2, which takes long"
    parser.add_argument("models", nargs="*", metavar="MODEL", help=names)
    parser.add_argument("--samples", type=int, default=256, help="items to calibrate with")
    parser.add_argument("--judged", type=int, default=320, help="items that judge")
    parser.add_argument("--effort", default="standard", help="as that of the command")
    parser.add_argument("--ops", default="default", help="as that of the command")
    parser.add_argument(
        "--kept", type=float, nargs="*", default=list(KEPT), help="shares of the linear parameters"
    )
    parser.add_argument("--no-formats", action="store_true", help="leave the last row out")
    options = parser.parse_args(arguments)
    unknown = set(options.models) - set(MAKERS)
    if unknown:
        parser.error(f"expected models of {', '.join(MAKERS)}, got {', '.join(sorted(unknown))}")
    met = True
    for name in options.models or [name for name in MAKERS if name != "smollm2"]:
        task = MAKERS[name](options.samples, options.judged)
        how = {"effort": options.effort, "ops": options.ops.split(",")}
        met &= table(name, task, how, options.kept, formats=not options.no_formats)
    return 0 if met else 1


def table(
    name: str, task: Task, how: Mapping[str, Any], kept: Sequence[float], *, formats: bool
) -> bool:
    """Print the rows of one model; whether all of them could be made."""
    before = task.scores(task.model)
    print(f"{name}: {task.metric} of {len(before)} items")
    print(f"{'':<26}{'MB':>8}{'score':>9}{'error':>8}{'lost':>9}{'error':>8}", flush=True)
    _row("float", task, task.model.stat().st_size, before, before)
    options: dict[str, Any] = {"data": task.data, "bench": False, "simplify": True, **how}
    options |= task.options
    met = True
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "int8.onnx")
        quantize_dynamic(task.model, path, per_channel=True, weight_type=QuantType.QInt8)
        limit = path.stat().st_size
        rows: dict[str, Mapping[str, Any]] = {
            **{f"--keep {share:g}": {"keep": share} for share in kept},
            "int8 per channel": {},
            "--weights auto, as small": {"weights": "auto", "max_size": limit},
        }
        if not formats:
            del rows["--weights auto, as small"]
        for title, goal in rows.items():
            if not goal:
                _row(title, task, limit, task.scores(path), before)
                continue
            try:
                result = compress(task.model, **goal, **options)
            except LowRankError as error:
                print(f"{title:<26}  {error}", flush=True)
                met = False
                continue
            model = ir.to_proto(result.model).SerializeToString()
            _row(title, task, len(model), task.scores(model), before)
    return met


def _row(title: str, task: Task, size: int, scores: Array, before: Array) -> None:
    lost = before - scores
    errors = [float(np.std(own, ddof=1) / np.sqrt(len(own))) for own in (scores, lost)]
    print(
        f"{title:<26}{size / 1e6:>8.2f}{scores.mean():>9.4f}{errors[0]:>8.4f}{lost.mean():>9.4f}"
        f"{errors[1]:>8.4f}{task.shown(float(scores.mean()))}",
        flush=True,
    )


def mnist(samples: int, judged: int) -> Task:
    """The vision transformer: whether a held-out image gets its label."""
    model = CACHE / "vit.onnx"
    with np.load(model.with_suffix(".data.npz")) as stored:
        arrays = dict(stored)
    labels = np.load(model.with_suffix(".labels.npy"))
    start = max(samples + 16, _FITTED)
    (name, images), *_ = arrays.items()
    chosen = slice(start, start + judged)

    def scores(path: Path | bytes) -> Array:
        logits = run(open_session(path, threads=1), {name: images[chosen]}, "the model")
        (found,) = logits.values()
        return np.asarray(found.argmax(-1) == labels[chosen], np.float64)

    fitted = {key: array[:start] for key, array in arrays.items()}
    return Task(model, fitted, scores, "accuracy")


def sentences(samples: int, judged: int) -> Task:
    """MiniLM-L6: whether a function finds its docstring among those of all by its signature."""
    model = CACHE / "minilm-l6.onnx"
    tokenizer = Tokenizer.from_file(str(model.with_suffix(".tokenizer.json")))
    known = signatures("h", "z", judged)
    asked, answers = (batches(tokenizer, texts) for texts in zip(*known, strict=True))

    def scores(path: Path | bytes) -> Array:
        likeness = embeddings(path, asked) @ embeddings(path, answers).T
        return np.asarray(likeness.argmax(axis=1) == np.arange(len(known)), np.float64)

    return Task(model, calibrating(tokenizer, samples), scores, "docstrings found first (R@1)")


def signatures(first: str, last: str, count: int) -> list[tuple[str, str]]:
    """Functions of modules from letter to letter: name and arguments, and the first paragraph."""
    found: dict[str, str] = {}
    for file in sorted(Path(os.__file__).parent.glob("*.py")):
        if not first <= file.name[0].lower() <= last:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                paragraph = (ast.get_docstring(node) or "").split("\n\n")[0]
                text = " ".join(paragraph.split())
                if len(text) >= 40:
                    names = [node.name, *(argument.arg for argument in node.args.args)]
                    found.setdefault(text, " ".join(names).replace("_", " "))
    order = np.random.default_rng(0).permutation(len(found))[:count]
    texts = sorted(found)
    return [(found[texts[index]], texts[index]) for index in order]


def decoding(samples: int, judged: int) -> Task:
    """SmolLM2: the mean log-likelihood of the tokens of a window; modules a-g calibrate."""
    model = CACHE / "smollm2.onnx"
    tokenizer = Tokenizer.from_file(str(model.with_suffix(".tokenizer.json")))
    judging = windows(tokenizer, "h", "z", judged)["input_ids"]
    # A quarter of what is given, at most 16, judges inside of the command.
    fitted = windows(tokenizer, "a", "g", samples + 16)

    def scores(path: Path | bytes) -> Array:
        session = open_session(path, threads=1)
        found = []
        for ids in judging:
            (logits,) = run(session, {"input_ids": ids[np.newaxis]}, "the model").values()
            found.append(-surprises(logits[0, :-1], ids[1:]).mean())
        return np.asarray(found)

    return Task(
        model,
        fitted,
        scores,
        f"log-likelihood of the next token in windows of {LENGTH}",
        {"metric": "perplexity"},
        lambda mean: f"  perplexity {np.exp(-mean):.2f}",
    )


def reading(name: str) -> Callable[[int, int], Task]:
    """A model that reads drawn text: whether an image is read without a mistake."""

    def made(samples: int, judged: int) -> Task:
        task = TASKS[name]
        judge, fit = task.draw(judged, 3), feeds(task, task.draw(samples, 1))

        def scores(path: Path | bytes) -> Array:
            session = open_session(path, threads=1)
            read: list[str] = []
            for feed in feeds(task, judge):
                (output,) = run(session, feed, task.name).values()
                read += task.read(output)
            pairs = zip(read, judge.texts, strict=True)
            return np.array([own == text for own, text in pairs], np.float64)

        return Task(task.model, fit, scores, "images read without a mistake")

    return made


MAKERS: Mapping[str, Callable[[int, int], Task]] = {
    "vit": mnist,
    "minilm-l6": sentences,
    "captcha": reading("captcha"),
    "ppocrv5-rec": reading("ppocrv5-rec"),
    "smollm2": decoding,
}


if __name__ == "__main__":
    sys.exit(main())
