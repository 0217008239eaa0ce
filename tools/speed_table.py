"""Print how fast spectra and factors are, against other ways to the same pairs, side by side.

    python tools/speed_table.py [--large] [--repeats 3] [--layers MODEL]
    python tools/speed_table.py --model MODEL [--data DATA.npz] [--keep 0.8] [--memory 1GB]
        [--threads 1] [--efforts]

Without a model three tables, each timed interleaved with one BLAS thread unless it says otherwise:

* layers of a transformer's sizes whose spectra decay (about rank 24 holds 0.95 of the energy), and
  layers with slowly falling spectra: our spectra and factors against a loop of
  ``numpy.linalg.svd``, ``torch.linalg.svd``, ``torch.svd_lowrank`` and scikit-learn's
  ``randomized_svd``, which are given our ranks, and against the two products that any method has
  to do at least, ``W·V`` and ``Uᵀ·W``; with the largest relative error of the pairs;
* the same for the weights of the products of a real model, ``--layers``;
* the same layers on one worker and on all cores, with user time against wall time;
* with ``--large`` single layers of an LLM's sizes against two reductions in float64, which is the
  plain way to a rank and then its pair, and the memory that both take.

torch and scikit-learn are left out where they are not installed.

With a model whole commands, each in a process of its own: ``--help``; what the weights alone are
asked for against loading, simplifying and saving the model; and with samples against plainly
running these: what they take, the stages in them, a step of healing against three forward passes,
user time against wall time, and the most memory that they hold, without a limit and with one.
Beside other work threads that wait for each other take processor time as well: ``--threads 1``
compares the work alone.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from threadpoolctl import threadpool_limits
from whole_commands import HEALED, by_weights, whole_commands

from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.numerics.components import Components
from onnx_lowrank.numerics.factors import relative_error
from onnx_lowrank.numerics.parallel import cores, map_layers, working_set
from onnx_lowrank.numerics.ranks import energy_rank
from onnx_lowrank.numerics.sketch import sketch
from onnx_lowrank.runtime.memory import growth

__all__ = ["main"]

ENERGY = 0.95
LAYERS = Path(__file__).parent.parent / "models" / "cache" / "minilm-l6.onnx"
SIDES = (768, 768, 768, 1024, 1024, 1536, 2048)
LARGE = ((2048, 2048), (4096, 4096), (4096, 11008))
Pair = tuple[Array, Array]
Way = Callable[[Array, int], Pair]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--large", action="store_true", help="also layers of an LLM's sizes")
    parser.add_argument("--repeats", type=int, default=3, help="the best of so many")
    parser.add_argument("--layers", type=Path, default=LAYERS, help="a model, with its weights")
    parser.add_argument("--model", type=Path, help="print whole commands on this model instead")
    parser.add_argument("--data", type=Path, help="its samples, .npz")
    parser.add_argument("--keep", default="0.8", help="the goal of the commands")
    parser.add_argument("--memory", default="1GB", help="the limit of the command that has one")
    parser.add_argument("--threads", type=int, help="of the commands; default: one for each core")
    parser.add_argument("--efforts", action="store_true", help="with samples two commands alone")
    options = parser.parse_args(arguments)
    if options.model is not None:
        if options.threads is not None:
            os.environ["OMP_NUM_THREADS"] = str(options.threads)  # of the commands that follow
        by_weights(options.model, ENERGY)
        if options.data is not None:
            efforts = {
                f"--keep {options.keep} --effort quick": ("--effort", "quick"),
                f"--keep {options.keep}": (),
            }
            more = {
                **{f"--keep {options.keep} --heal {n}": ("--heal", str(n)) for n in HEALED},
                f"--keep {options.keep} --memory {options.memory}": ("--memory", options.memory),
            }
            commands: dict[str, tuple[str, ...]] = efforts if options.efforts else efforts | more
            threads = () if options.threads is None else ("--threads", str(options.threads))
            same = "--keep", options.keep, "--no-bench", *threads
            whole_commands(options.model, options.data, commands, same, options.threads)
        return 0
    rng = np.random.default_rng(0)
    decaying = [drawn(side, side, lambda i: np.exp(-i / 16.0), rng) for side in SIDES]
    slow = [drawn(side, side, lambda i: (i + 1.0) ** -0.65, rng) for side in SIDES[:5]]
    with threadpool_limits(1):
        compared("decaying spectra", decaying, options.repeats)
        compared("slowly falling spectra", slow, options.repeats)
        if options.layers.exists():
            compared(f"weights of {options.layers.name}", weights(options.layers), options.repeats)
        parallel("decaying spectra", decaying, options.repeats)
        parallel("slowly falling spectra", slow, options.repeats)
        if options.large:
            large(rng)
    return 0


def drawn(m: int, n: int, values: Callable[[Array], Array], rng: np.random.Generator) -> Array:
    """A float32 matrix with about these singular values, between random orthonormal bases.

    The bases are products of random reflections, which cost less than an orthonormalization.
    """
    side = min(m, n)
    matrix = np.zeros((m, n), np.float32)
    matrix[np.arange(side), np.arange(side)] = values(np.arange(float(side)))
    for _ in range(3):
        for axis, size in enumerate((m, n)):
            normal = rng.standard_normal(size).astype(np.float32)
            normal /= np.linalg.norm(normal)
            if axis == 0:
                matrix -= 2.0 * np.outer(normal, normal @ matrix)
            else:
                matrix -= 2.0 * np.outer(matrix @ normal, normal)
    return matrix


def ours(matrix: Array, _rank: int) -> Pair:
    """Spectrum, rank and factors."""
    found = sketch(matrix, energy=ENERGY)
    if found is not None:
        rank = energy_rank(found.squares, ENERGY, found.rest)
        return found.basis.pair(matrix, rank, matrix.dtype)
    components = Components(matrix, energy=ENERGY)
    rank = energy_rank(components.squares, ENERGY)
    return components.basis(rank).narrow().pair(matrix, rank, matrix.dtype)


def truncated(u: Array, values: Array, vt: Array, rank: int) -> Pair:
    """The pair of a decomposition."""
    root = np.sqrt(values[:rank])
    return u[:, :rank] * root, root[:, None] * vt[:rank]


def others() -> dict[str, Way]:
    """The other ways that are installed here; each is given the rank."""

    def numpy_svd(matrix: Array, rank: int) -> Pair:
        u, values, vt = np.linalg.svd(matrix, full_matrices=False)
        return truncated(u, values, vt, rank)

    ways: dict[str, Way] = {"numpy.linalg.svd": numpy_svd}
    torch: Any = optional("torch")
    if torch is not None:
        torch.set_num_threads(1)

        def full(matrix: Array, rank: int) -> Pair:
            u, values, vt = torch.linalg.svd(torch.from_numpy(matrix), full_matrices=False)
            return truncated(u.numpy(), values.numpy(), vt.numpy(), rank)

        def low(matrix: Array, rank: int) -> Pair:
            torch.manual_seed(0)
            u, values, v = torch.svd_lowrank(torch.from_numpy(matrix), q=rank)
            return truncated(u.numpy(), values.numpy(), v.numpy().T, rank)

        ways |= {"torch.linalg.svd": full, "torch.svd_lowrank": low}
    extmath: Any = optional("sklearn.utils.extmath")
    if extmath is not None:

        def randomized(matrix: Array, rank: int) -> Pair:
            u, values, vt = extmath.randomized_svd(matrix, rank, random_state=0)
            return truncated(u, values, vt, rank)

        ways["randomized_svd"] = randomized
    return ways


def optional(name: str) -> Any:
    """A module, or None where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


@dataclass
class Row:
    """What one way took."""

    seconds: float = float("inf")
    error: float = 0.0


def compared(title: str, matrices: Sequence[Array], repeats: int) -> None:
    """Print all ways on the same layers."""
    ranks = [ours(matrix, 0)[0].shape[1] for matrix in matrices]
    print(f"\n{title}: {len(matrices)} layers, ranks {min(ranks)} to {max(ranks)}, one thread")
    ways: dict[str, Way] = {"ours, spectrum and rank too": ours, **others()}
    rows = {name: Row() for name in ways}
    products = float("inf")
    for _ in range(repeats):
        for name, way in ways.items():
            start = time.process_time()
            pairs = [way(matrix, rank) for matrix, rank in zip(matrices, ranks, strict=True)]
            rows[name].seconds = min(rows[name].seconds, time.process_time() - start)
            rows[name].error = max(
                relative_error(matrix[None], first[None], second[None])
                for matrix, (first, second) in zip(matrices, pairs, strict=True)
            )
        start = time.process_time()
        for matrix, rank in zip(matrices, ranks, strict=True):
            two_products(matrix, rank)
        products = min(products, time.process_time() - start)
    own = rows["ours, spectrum and rank too"].seconds
    for name, row in rows.items():
        print(f"  {name:<28} {row.seconds:8.3f} s  {row.seconds / own:6.1f}×  {row.error:.5f}")
    print(
        f"  {'two products of that rank':<28} {products:8.3f} s; ours takes {own / products:.1f}×"
    )


def two_products(matrix: Array, rank: int) -> Array:
    """``W V`` and ``Uᵀ W`` with some V and U of this rank, which any method has to compute."""
    made = matrix @ np.ascontiguousarray(matrix[:rank].T)
    return np.asarray(made.T @ matrix)


def parallel(title: str, matrices: Sequence[Array], repeats: int) -> None:
    """Print one worker against all cores."""
    ordered = sorted(matrices, key=lambda matrix: -matrix.size)
    best = {1: (float("inf"), 0.0), cores(): (float("inf"), 0.0)}
    for _ in range(repeats):
        for workers in best:
            start, used = time.perf_counter(), time.process_time()
            for _, _ in map_layers(
                lambda matrix: ours(matrix, 0),
                ordered,
                lambda matrix: working_set(*matrix.shape),
                workers=workers,
            ):
                pass
            wall = time.perf_counter() - start
            best[workers] = min(best[workers], (wall, time.process_time() - used))
    one, (wall, used) = best[1][0], best[cores()]
    print(
        f"\n{title}: {one:.2f} s on one worker, {wall:.2f} s on {cores()}: {one / wall:.2f}×, "
        f"user time {used / wall:.2f} × wall (load here {os.getloadavg()[0]:.1f})"
    )


def weights(path: Path) -> list[Array]:
    """The constant matrices that a model multiplies with, where both sides are 128 or more."""
    model = onnx.load(path)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    read = {node.input[1] for node in model.graph.node if node.op_type in ("MatMul", "Gemm")}
    found = [
        onnx.numpy_helper.to_array(constants[name]).copy() for name in sorted(read & {*constants})
    ]
    return [own for own in found if own.ndim == 2 and min(own.shape) >= 128]


def large(rng: np.random.Generator) -> None:
    """Print our way against two reductions in float64 on single layers."""
    print(f"\nsingle layers with slowly falling spectra, {ENERGY} of the energy, one thread")

    def plainly(matrix: Array) -> Pair:
        tall = matrix if min(matrix.shape) == matrix.shape[1] else matrix.T
        exact = tall.astype(np.float64)
        squares = np.maximum(np.linalg.eigvalsh(exact.T @ exact)[::-1], 0.0)
        rank = energy_rank(squares, ENERGY)
        vectors = np.linalg.eigh(exact.T @ exact)[1][:, : -rank - 1 : -1]
        pair = (exact @ vectors).astype(np.float32), vectors.T.astype(np.float32)
        return pair if tall is matrix else (pair[1].T, pair[0].T)

    for m, n in LARGE:
        matrix = drawn(m, n, lambda i: (i + 1.0) ** -0.65, rng)
        took, peaks, ranks = [], [], []
        for way in (partial(ours, matrix, 0), partial(plainly, matrix)):
            start = time.process_time()
            pair, peak = growth(way)
            took.append(time.process_time() - start)
            peaks.append((peak or 0) / 1e9)
            ranks.append(pair[0].shape[1])
        start = time.process_time()
        two_products(matrix, ranks[0])
        products = time.process_time() - start
        assert ranks[0] == ranks[1], ranks
        print(
            f"  {m}×{n}, rank {ranks[0]}: {took[0]:.1f} s and {peaks[0]:.2f} GB, plainly "
            f"{took[1]:.1f} s and {peaks[1]:.2f} GB: {took[1] / took[0]:.1f}×; two products "
            f"{products:.2f} s: {took[0] / products:.1f}×",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
