"""Print what models out of ordinary packages lose by their own metric, beside int8 alone.

    python tools/quality_table.py [vit] [minilm-l6] [captcha] [ppocrv5-rec] [--effort standard]
                                  [--ops default,hidden,heads]
    python tools/quality_table.py smollm2 --samples 64 --judged 48
    python tools/quality_table.py vit-s --samples 64 --judged 400
    python tools/quality_table.py moonshine --kept 0.8 0.7 --effort thorough --time-limit 10m

For each model of ``models/cache/`` (see ``models/get.py``): the float model; ours at 80 % and 70 %
of the parameters of the linear layers; ``quantize_dynamic`` per channel; and ours with ``--weights
auto``, once in as many bytes as that takes, once as near to the float model as that is (mean
relative L2 error of the outputs, or loss by the task's ``--metric``, on calibration samples).
``--halved`` has rows of half of the float model's bytes: pairs alone, and with number formats.  The
metric is the task's own: accuracy of a classifier of MNIST, share of functions of the standard
library whose docstring a sentence encoder finds among those of all (R@1), share of freshly drawn
images that are read without a mistake, log-likelihood of a decoder's next token with the perplexity
that it makes, accuracy of a linear probe (fitted to the float model) on the class token of a larger
vision transformer, share of words that a decoder reads right out of a speech encoder's output (1
less the word error rate; the decoder stays as it is).  Each figure is a mean over items that
nothing was fitted to, with its standard error; the difference to the float model is that of the
same items, with its own.

Needs the packages ``captcha``, ``matplotlib``, ``pillow`` and ``tokenizers`` of the extra
``exporters``; ``moonshine`` needs the recordings ``prompts`` too.
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
import onnx
import onnx_ir as ir
from fit_table import ROOT, batches, calibrating, embeddings
from onnxruntime.quantization import QuantType, quantize_dynamic
from tokenizers import Tokenizer

from onnx_lowrank import LowRankError, check, compress
from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.numerics.divergence import surprises
from onnx_lowrank.runtime.session import open_session, run

sys.path.insert(0, str(ROOT / "models"))

import speech
from drawn import TASKS, feeds
from mnist import load as digits
from windows import LENGTH, windows

__all__ = ["main"]

CACHE = ROOT / "models" / "cache"
KEPT = (0.8, 0.7)
# Samples of the calibration that say how far int8 is from the float model.
_COMPARED = 64
# Images of MNIST that calibrate; the others judge.
_FITTED = 300
# Moonshine's input.
_SOUND = "input_values"
# The ViT-S: its input, the value that holds its tokens, and what its images are normalised with.
_PIXELS, _TOKENS = "input_image", "/backbone/layernorm/Add_1_output_0"
_MEAN, _SPREAD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Images that the probe is fitted to, and images of one run.
_PROBED, _AT_ONCE = 400, 8


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
    names = f"of {', '.join(MAKERS)}; default: all but {' and '.join(LONG)}, which take long"
    parser.add_argument("models", nargs="*", metavar="MODEL", help=names)
    parser.add_argument("--samples", type=int, default=256, help="items to calibrate with")
    parser.add_argument("--judged", type=int, default=320, help="items that judge")
    parser.add_argument("--effort", default="standard", help="as that of the command")
    parser.add_argument("--time-limit", help="of each row, as that of the command")
    parser.add_argument("--ops", default="default", help="as that of the command")
    parser.add_argument(
        "--kept", type=float, nargs="*", default=list(KEPT), help="shares of the linear parameters"
    )
    parser.add_argument("--no-formats", action="store_true", help="leave the last two rows out")
    parser.add_argument("--halved", action="store_true", help="rows of half of the bytes")
    options = parser.parse_args(arguments)
    unknown = set(options.models) - set(MAKERS)
    if unknown:
        parser.error(f"expected models of {', '.join(MAKERS)}, got {', '.join(sorted(unknown))}")
    met = True
    for name in options.models or [name for name in MAKERS if name not in LONG]:
        task = MAKERS[name](options.samples, options.judged)
        how = {"effort": options.effort, "ops": options.ops.split(",")}
        if options.time_limit is not None:
            how["time_limit"] = options.time_limit
        formats, halved = not options.no_formats, options.halved
        met &= table(name, task, how, options.kept, formats=formats, halved=halved)
    return 0 if met else 1


def table(
    name: str,
    task: Task,
    how: Mapping[str, Any],
    kept: Sequence[float],
    *,
    formats: bool,
    halved: bool,
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
        }
        if halved:
            half = task.model.stat().st_size // 2
            rows["half, pairs"] = {"max_size": half}
            rows["half, --weights auto"] = {"max_size": half, "weights": "auto"}
        if formats:
            auto = {"weights": "auto"}
            near = {"tolerance": lost(task, path), "objective": "size"}
            rows["--weights auto, as small"] = {**auto, "max_size": limit}
            rows["--weights auto, as near"] = {**auto, **near}
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


def lost(task: Task, path: Path) -> float:
    """How far a model is from the float model, by what a tolerance limits."""
    report = check(task.model, path, data=task.data, samples=_COMPARED, **task.options)
    (target,) = report.targets
    if target.judged is not None:
        return target.judged.loss
    return max(output.relative_l2 for output in target.outputs)


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


def probed(samples: int, judged: int) -> Task:
    """A ViT-S: whether a linear probe on its class token names the digit of an image."""
    model = CACHE / "vit-s.onnx"
    train, held_out = digits()
    fitted, known = images(train.images[:samples]), train.labels[samples:][:_PROBED]
    learnt: list[Array] = []

    def scores(path: Path | bytes) -> Array:
        if not learnt:
            learnt.append(_probe(class_tokens(model, train.images[samples:][:_PROBED]), known))
        found = _with_one(class_tokens(path, held_out.images[:judged])) @ learnt[0]
        return np.asarray(found.argmax(-1) == held_out.labels[:judged], np.float64)

    options = {"judge_at": [_TOKENS]}
    return Task(model, {_PIXELS: fitted}, scores, "accuracy of a probe", options)


def images(pixels: Array) -> Array:
    """Images (N, 784) in 0..1 as the ViT-S takes them: 224 by 224, in three channels."""
    large = np.kron(pixels.reshape(-1, 28, 28), np.ones((8, 8)))[:, None]
    mean, spread = (np.array(own).reshape(3, 1, 1) for own in (_MEAN, _SPREAD))
    return np.asarray((large - mean) / spread, np.float32)


def class_tokens(path: Path | bytes, pixels: Array) -> Array:
    """The class token of each image, shape [N, 384]."""
    model = onnx.load(path) if isinstance(path, Path) else onnx.load_from_string(path)
    del model.graph.output[:]  # the session then leaves the decoder out
    model.graph.output.append(onnx.ValueInfoProto(name=_TOKENS))
    session = open_session(model.SerializeToString(), threads=1)
    found = []
    for start in range(0, len(pixels), _AT_ONCE):
        feed = {_PIXELS: images(pixels[start : start + _AT_ONCE])}
        found.append(run(session, feed, "the model")[_TOKENS][:, 0])
    return np.concatenate(found).astype(np.float64)


def _probe(features: Array, labels: Array) -> Array:
    """A linear map to ten classes by ridge regression, with an intercept."""
    x = _with_one(features)
    aims = np.eye(10)[labels] - 0.1
    ridge = 1e-2 * np.trace(x.T @ x) / x.shape[1]
    return np.asarray(np.linalg.solve(x.T @ x + ridge * np.eye(x.shape[1]), x.T @ aims))


def _with_one(features: Array) -> Array:
    return np.concatenate([features, np.ones((len(features), 1))], axis=1)


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


def listening(samples: int, judged: int) -> Task:
    """Moonshine's encoder: the share of words that its decoder reads right, a sentence an item."""
    recorded = speech.prompts()
    chosen = speech.sentences(recorded)
    order = np.random.default_rng(0).permutation(len(chosen))[:judged]
    judging = [chosen[place] for place in sorted(order)]
    fitted = [{_SOUND: sound[np.newaxis]} for sound in speech.sounds(recorded)[:samples]]
    reader, said = speech.Reader(), [speech.words(sentence.text) for sentence in judging]
    counts = np.array([len(own) for own in said], np.float64)

    def scores(path: Path | bytes) -> Array:
        session, wrong = open_session(path, threads=1), np.zeros(len(judging))
        for place, sentence in enumerate(judging):
            (hidden,) = run(session, {_SOUND: sentence.sound[np.newaxis]}, "the model").values()
            read = speech.words(reader.read(hidden, sentence.seconds))
            wrong[place] = speech.mistakes(said[place], read)
        # Sentences differ in length: the mean of these is 1 less the ratio of the sums, their
        # spread that of a ratio, to first order.
        rate = wrong.sum() / counts.sum()
        return np.asarray(1 - rate - (wrong - rate * counts) / counts.mean())

    def shown(mean: float) -> str:
        return f"  WER {1 - mean:.2%}"

    metric = f"words read right, of {counts.sum():.0f}, in sentences"
    return Task(CACHE / "moonshine.onnx", fitted, scores, metric, shown=shown)


MAKERS: Mapping[str, Callable[[int, int], Task]] = {
    "vit": mnist,
    "minilm-l6": sentences,
    "captcha": reading("captcha"),
    "ppocrv5-rec": reading("ppocrv5-rec"),
    "smollm2": decoding,
    "vit-s": probed,
    "moonshine": listening,
}
LONG = ("smollm2", "vit-s", "moonshine")


if __name__ == "__main__":
    sys.exit(main())
