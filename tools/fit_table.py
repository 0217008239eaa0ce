"""Print how far factors that are fitted to data go, on a sentence encoder.

    python tools/fit_table.py [--shares 0.8 0.6] [--samples 8192] [--heal STEPS] [--ways NAME ...]

The texts are paragraphs of the standard library's docstrings: 256 first paragraphs of modules h-z
judge; those of modules a-g and of all packages calibrate.  Printed are the cosine between the
embeddings of the model and of its compressed versions, every layer keeping the same share of its
parameters, by the ways of others (``tools/other_methods.py``) and by ours; the time of gathering
the moments against that of only running the same samples (in turns, same session options), and the
time of the spectra and factors of all layers on one core.

Needs ``models/cache/minilm-l6.onnx`` and its tokenizer (see ``models/get.py``) and the package
``tokenizers`` of the extra ``exporters``.
"""

from __future__ import annotations

import argparse
import ast
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from other_methods import WAYS, aa_svd, by_layer
from threadpoolctl import threadpool_limits
from tokenizers import Tokenizer

from onnx_lowrank import compress
from onnx_lowrank.fitting.gather import gather
from onnx_lowrank.fitting.statistics import statistics_of
from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.graph.spool import Spool
from onnx_lowrank.maps.find import Group, find
from onnx_lowrank.maps.forms import all_forms, chosen_forms
from onnx_lowrank.maps.rewrite import rewrite
from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.numerics.moments import Moments
from onnx_lowrank.numerics.ranks import largest_rank
from onnx_lowrank.numerics.stacks import fitted_pair, squares
from onnx_lowrank.runtime.memory import Memory
from onnx_lowrank.runtime.session import default_threads, open_session, run

__all__ = ["main"]

ROOT = Path(__file__).resolve().parent.parent
JUDGED, LENGTH, BATCH = 256, 128, 16
TIMED = 12  # batches
# Folders of the standard library that hold no docstrings of its own, or none that describe it.
OTHERS = frozenset({"dist-packages", "idlelib", "lib2to3", "site-packages", "test", "tests"})
# Our rows: how the factors are made.
OURS: dict[str, dict[str, Any]] = {
    "plain SVD": {"calibrate": False},
    "output PCA": {},
    "+ refit": {"refit": True},
    "Fisher": {"fisher": True},
    "Fisher, refit": {"fisher": True, "refit": True},
}
HEALED = "+ heal"
AA_SVD = "AA-SVD"
# The rows: those of others behind the one that needs no samples.
ROWS = ("plain SVD", *WAYS, AA_SVD, *(name for name in OURS if name != "plain SVD"), HEALED)
# What ours have to reach: share -> row -> cosine; 0 stands for that of our row before it.
BARS: dict[float, dict[str, float]] = {
    0.8: {"output PCA": 0.90, "+ refit": 0.0, "Fisher, refit": 0.0, HEALED: 0.96},
    0.6: {"output PCA": 0.82, "+ refit": 0.0, "Fisher, refit": 0.0, HEALED: 0.92},
}
NAME, CELL = 16, 18  # widths

Feed = dict[str, Array]


def encoder_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the places of a sentence encoder and its tokenizer."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cache = ROOT / "models" / "cache"
    parser.add_argument("--model", type=Path, default=cache / "minilm-l6.onnx")
    parser.add_argument("--tokenizer", type=Path, default=cache / "minilm-l6.tokenizer.json")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; returns 1 if a bar is missed."""
    parser = encoder_parser(__doc__)
    parser.add_argument(
        "--shares",
        type=float,
        nargs="*",
        default=list(BARS),
        help="columns of the table; none prints the times alone",
    )
    parser.add_argument("--samples", type=int, default=8192, help="paragraphs to calibrate with")
    parser.add_argument("--repeats", type=int, default=5, help="of the timed gathering")
    parser.add_argument("--heal", type=int, default=0, help="steps of the last row's healing")
    parser.add_argument(
        "--ways", nargs="+", choices=ROWS, metavar="NAME", help=f"rows: of {', '.join(ROWS)}"
    )
    options = parser.parse_args(arguments)
    ways = options.ways or [name for name in ROWS if name != HEALED or options.heal]
    if HEALED in ways and not options.heal:
        parser.error(f"{HEALED!r} needs --heal STEPS")
    tokenizer = Tokenizer.from_file(str(options.tokenizer))
    fit = calibrating(tokenizer, options.samples)
    judge = batches(tokenizer, paragraphs("h", "z", JUDGED))
    met = True
    if options.shares:
        met = accuracy(options.model, fit, judge, options.shares, ways, options.heal)
    some = fit[:: max(1, len(fit) // TIMED)][:TIMED]  # of all lengths
    met &= gathering(options.model, some, options.repeats)
    met &= factoring(options.model, some)
    return 0 if met else 1


def calibrating(tokenizer: Tokenizer, count: int) -> list[Feed]:
    """Batches of texts to calibrate with, none of which judges."""
    judging = set(paragraphs("h", "z", JUDGED))
    texts = [text for text in paragraphs("a", "g", count, every=True) if text not in judging]
    # By length: texts that are batched together need little padding.
    return batches(tokenizer, sorted(texts, key=len))


def paragraphs(first: str, last: str, count: int, *, every: bool = False) -> list[str]:
    """Paragraphs of docstrings of modules from letter to letter, in a fixed order.

    Args:
        first: letter that names of modules begin with.
        last: the last such letter.
        count: how many at most.
        every: all paragraphs, and those of packages of any letter as well; else the first ones of
            the modules.
    """
    library = Path(os.__file__).parent
    found: set[str] = set()
    for file in sorted(library.rglob("*.py") if every else library.glob("*.py")):
        parts = file.relative_to(library).parts
        named = first <= parts[0][0].lower() <= last
        if not (named or len(parts) > 1) or OTHERS.intersection(parts):
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
                texts = (ast.get_docstring(node) or "").split("\n\n")
                for paragraph in texts if every else texts[:1]:
                    text = " ".join(paragraph.split())
                    if len(text) >= 40:
                        found.add(text)
    order = np.random.default_rng(0).permutation(len(found))[:count]
    known = sorted(found)
    return [known[index] for index in order]


def batches(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Feed]:
    """Feeds of BATCH texts each, padded to the longest of them, with ``attention_mask``."""
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding()
    feeds = []
    for start in range(0, len(texts), BATCH):
        encoded = tokenizer.encode_batch(list(texts[start : start + BATCH]))
        ids = np.array([item.ids for item in encoded], np.int64)
        mask = np.array([item.attention_mask for item in encoded], np.int64)
        feeds.append({"input_ids": ids, "attention_mask": mask})
    return feeds


def accuracy(
    path: Path,
    fit: Sequence[Feed],
    judge: Sequence[Feed],
    shares: Sequence[float],
    ways: Sequence[str],
    heal: int,
) -> bool:
    """Print the table of cosines; whether all its bars are met."""
    dense = embeddings(path, judge)
    count = sum(len(feed["input_ids"]) for feed in fit)
    print(f"cosine to the dense embeddings of {len(dense)} paragraphs; {count} calibrate")
    print(f"{'kept':<{NAME}}" + "".join(f"{share:<{CELL}g}" for share in shares), flush=True)
    met, before = True, dict.fromkeys(shares, 0.0)
    others = Others(path, fit)
    with tempfile.TemporaryDirectory() as name:
        # So that all others calibrate.
        np.savez(Path(name, "0.npz"), allow_pickle=False, **judge[0])
        for way in ways:
            print(f"{way:<{NAME}}", end="", flush=True)
            for share in shares:
                start = time.perf_counter()
                if way in OURS or way == HEALED:
                    model = ours(path, Path(name), fit, share, way, heal)
                else:
                    model = others.model(way, share)
                seconds = time.perf_counter() - start
                cosine = float((embeddings(model, judge) * dense).sum(axis=1).mean())
                least = BARS.get(share, {}).get(way)
                least = before[share] if least == 0.0 else least
                met &= least is None or cosine >= least
                aim = "" if least is None else f"(≥ {least:.3f})"
                print(f"{f'{cosine:.4f} {aim}':<{CELL}}", end="", flush=True)
                print(f"[{seconds:.0f} s]", file=sys.stderr, end="", flush=True)
                if way in OURS:
                    before[share] = cosine
            print(flush=True)
    return met


def ours(path: Path, held: Path, fit: Sequence[Feed], share: float, way: str, heal: int) -> bytes:
    """The model with factors of one of our rows."""
    own = {"fisher": True, "refit": True, "heal": heal} if way == HEALED else OURS[way]
    calibrate = own.get("calibrate", True)
    result = compress(
        path,
        keep=share,
        uniform=True,
        rank_multiple=1,
        min_gain=0.0,
        data=held,
        calibration=fit if calibrate else None,
        calibration_samples=len(fit),
        simplify=False,
        check=False,
        bench=False,
        **own,
    )
    found: bytes = ir.to_proto(result.model).SerializeToString()
    return found


class Others:
    """The ways of others, on the same samples; moments are gathered once."""

    def __init__(self, path: Path, fit: Sequence[Feed]) -> None:
        """Nothing is gathered yet."""
        self._path, self._fit = path, fit

    @cached_property
    def _known(self) -> tuple[ir.Model, tuple[Group, ...], dict[Group, Moments]]:
        """The model, its layers, and the moments of what is multiplied with them."""
        model, groups = layers(self._path)

        def opened(copy: ir.Model) -> Callable[[Any], dict[str, Array]]:
            return runner(ir.to_proto(copy).SerializeToString())

        found = gather(model, groups, opened, self._fit, (), "attention_mask", lambda _: None).whole
        fit = statistics_of(model, groups, found).fit
        return model, groups, {group: moments for group, (moments,) in fit.items()}

    def model(self, way: str, share: float) -> bytes:
        """The model with factors of one of their rows."""
        model, groups, moments = self._known
        ranks = {group: largest_rank(group.shape[1], group.shape[2], share) for group in groups}
        with tempfile.TemporaryDirectory() as name:
            if way == AA_SVD:
                pairs = aa_svd(
                    model,
                    ranks,
                    self._fit,
                    "attention_mask",
                    lambda proto: runner(proto.SerializeToString()),
                    Memory.of(None, Path(name)),
                )
            else:
                pairs = by_layer(WAYS[way], ranks, moments)
            copy, own = layers(self._path)
            with Spool(Path(name)) as spool:
                alike = zip(groups, own, strict=True)
                rewrite(copy, [(mine, pairs[group]) for group, mine in alike], spool)
                proto: bytes = ir.to_proto(copy).SerializeToString()
                return proto


def embeddings(model: Path | bytes, feeds: Sequence[Feed]) -> Array:
    """The embeddings of all feeds, at length 1."""
    session = open_session(model)
    found = [next(iter(run(session, feed, "the model").values())) for feed in feeds]
    joined = np.concatenate(found).astype(np.float64)
    return np.asarray(joined / np.linalg.norm(joined, axis=1, keepdims=True))


def gathering(path: Path, feeds: Sequence[Feed], repeats: int) -> bool:
    """Print the time of gathering the moments against that of running the same samples."""
    model, groups = layers(path)
    plain = runner(path)
    tapped: dict[int, Callable[[Feed], dict[str, Array]]] = {}

    def opened(copy: ir.Model) -> Callable[[Any], dict[str, Array]]:
        # Loading is part of the run, once; here only what every sample costs is compared.
        if not tapped:
            tapped[0] = runner(ir.to_proto(copy).SerializeToString())
        return tapped[0]

    times: list[tuple[float, float]] = []
    for repeat in range(repeats + 1):
        start = time.perf_counter()
        for feed in feeds:
            plain(feed)
        middle = time.perf_counter()
        gather(model, groups, opened, feeds, (), "attention_mask", lambda _: None)
        if repeat:  # the first one warms up
            times.append((middle - start, time.perf_counter() - middle))
    ratio = statistics.median(after / before for before, after in times)
    before, after = (statistics.median(part) for part in zip(*times, strict=True))
    print(
        f"{len(feeds)} batches, {default_threads()} threads: running {before:.2f} s, gathering "
        f"{after:.2f} s, ratio {ratio:.2f} (≤ 2)"
    )
    return ratio <= 2.0


def factoring(path: Path, feeds: Sequence[Feed]) -> bool:
    """Print the time of the spectra and the factors of all layers on one core."""
    model, groups = layers(path)

    def opened(copy: ir.Model) -> Callable[[Any], dict[str, Array]]:
        return runner(ir.to_proto(copy).SerializeToString())

    gathered = gather(model, groups, opened, feeds, (), "attention_mask", lambda _: None).whole
    moments = statistics_of(model, groups, gathered).fit
    with threadpool_limits(1, user_api="blas"):
        start = time.process_time()
        for group in groups:
            _, m, n = group.shape
            stack = group.matrix.numpy()
            squares(stack, moments[group])
            fitted_pair(stack, moments[group], largest_rank(m, n, max(BARS)), stack.dtype)
        seconds = time.process_time() - start
    print(f"spectra and factors of {len(groups)} layers on one core: {seconds:.2f} s (≤ 5)")
    return seconds <= 5.0


def layers(path: Path) -> tuple[ir.Model, tuple[Any, ...]]:
    """The model and the groups of its plain linear maps."""
    model = ir.load(path)
    return model, find(model, Constants(model, False), all_forms(), chosen_forms(None)).groups


def runner(model: Path | bytes) -> Callable[[Any], dict[str, Array]]:
    """A function from feeds to outputs."""
    session = open_session(model)
    wanted = {item.name for item in session.get_inputs()}
    return lambda feed: run(session, {k: v for k, v in feed.items() if k in wanted}, "the model")


if __name__ == "__main__":
    sys.exit(main())
