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
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from threadpoolctl import threadpool_limits

from onnx_lowrank.data.mask import find_mask
from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.numerics.components import Components
from onnx_lowrank.numerics.factors import relative_error
from onnx_lowrank.numerics.parallel import cores, map_layers, working_set
from onnx_lowrank.numerics.ranks import energy_rank
from onnx_lowrank.numerics.sketch import sketch
from onnx_lowrank.runtime.memory import growth
from onnx_lowrank.runtime.session import open_session, prepare

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
        by_weights(options.model)
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


# What any run on a file has to do.
LEAST = """
import sys
from pathlib import Path
from onnx_lowrank.graph.load import load
from onnx_lowrank.graph.save import write
from onnx_lowrank.graph.simplify import simplify
source, folder = load(sys.argv[1]), Path(sys.argv[2])
write(simplify(source, folder, lambda _: None).model or source.model, folder, "out.onnx", "auto")
"""


def by_weights(model: Path) -> None:
    """Print what commands without samples take against the least that they can."""
    with tempfile.TemporaryDirectory() as folder:
        unchecked = "--no-check", "--no-bench", "--quiet"
        ways = {
            "--help": ["-m", "onnx_lowrank", "--help"],
            "load, simplify, save": ["-c", LEAST, str(model), folder],
            f"--energy {ENERGY} --no-check --no-bench": [
                *("-m", "onnx_lowrank", str(model), f"{folder}/small.onnx"),
                *("--energy", str(ENERGY), *unchecked),
            ],
        }
        least = 0.0
        for title, command in ways.items():
            before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
            subprocess.run([sys.executable, *command], stdout=subprocess.DEVNULL, check=True)
            wall = time.perf_counter() - start
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            user = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            share = f": {user / least:.1f}×" if least else ""
            print(f"{title}: {wall:.2f} s, {user:.2f} s of processor time{share}", flush=True)
            least = user if title.startswith("load") else least


STAGES = ("simplify", "calibrate", "fisher", "damage", "effort", "refit", "heal")
HEALED = (20, 60)
FITTED, JUDGED = 256, 16


def whole_commands(
    model: Path,
    data: Path,
    commands: Mapping[str, Sequence[str]],
    same: Sequence[str],
    threads: int | None,
) -> None:
    """Print what whole commands take, against plainly running the samples that they fit to.

    Args:
        model: the model.
        data: its samples.
        commands: what is printed of each -> its options.
        same: options of all.
        threads: of the samples' runs; None for one for each core.
    """
    with np.load(data) as archive:
        names = {item.name for item in open_session(model).get_inputs()}
        arrays = {name: archive[name] for name in archive.files if name in names}
    count = min(FITTED, len(next(iter(arrays.values()))) - JUDGED)
    feeds = [{name: array[i : i + 1] for name, array in arrays.items()} for i in range(count)]
    plainly, used = plain_run(model, feeds, threads)
    batch = {name: array[:JUDGED] for name, array in arrays.items()}
    forward, _ = plain_run(model, [batch] * 3, threads)
    mask = find_mask(feeds[0])
    full = 1.0 if mask is None else np.mean([feed[mask] != 0 for feed in feeds])
    print(
        f"{count} samples, {100 * (1 - full):.0f} % padding, run one by one: {plainly:.1f} s, "
        f"{used:.1f} s of processor time; "
        f"{JUDGED} at once: {forward / 3:.2f} s (load here {os.getloadavg()[0]:.1f})"
    )
    healed: dict[int, float] = {}
    stages = "  ".join(f"{stage:>9}" for stage in STAGES)
    print(f"{'command':<34} {'wall':>7} {'user':>7} {'× samples':>9} {'held GB':>8}  {stages}")
    for title, options in commands.items():
        ran = run_command(model, data, (*same, *options))
        shares = "  ".join(f"{ran.seconds.get(stage, 0.0) / plainly:8.1f}×" for stage in STAGES)
        print(
            f"{title:<34} {ran.wall:7.1f} {ran.user:7.1f} {ran.user / used:8.1f}× "
            f"{ran.held / 1e9:8.2f}  {shares}"
        )
        print(f"{'':<34} user time {ran.user / ran.wall:.2f} × wall; damage {ran.damage:.3g}")
        if ran.healed:
            healed[ran.healed] = ran.seconds["heal"]
    if len(healed) == len(HEALED):  # what is done once is in both
        few, many = sorted(healed)
        step = (healed[many] - healed[few]) / (many - few)
        print(f"a step of healing: {step / forward:.1f} × three forward passes of {JUDGED} samples")


def plain_run(
    model: Path, feeds: Sequence[dict[str, Array]], threads: int | None
) -> tuple[float, float]:
    """Wall and processor time of running samples, each once before."""
    session = open_session(model, threads=threads)
    prepare(session, feeds[0])()
    start, used = time.perf_counter(), time.process_time()
    for feed in feeds:
        prepare(session, feed)()
    return time.perf_counter() - start, time.process_time() - used


@dataclass
class Ran:
    """What a command took: seconds, the most bytes that it held without files, steps of healing."""

    wall: float
    user: float
    held: int
    seconds: dict[str, float]
    damage: float
    healed: int


def run_command(model: Path, data: Path, options: Sequence[str]) -> Ran:
    """Run a command on a model in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "onnx_lowrank", str(model), f"{folder}/out.onnx"]
        command += ["--data", str(data), "--report", str(report), *options]
        before, start, held = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter(), 0
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            while process.poll() is None:
                held = max(held, anonymous(process.pid))
                time.sleep(0.01)
        wall = time.perf_counter() - start
        if process.returncode:
            raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        found = json.loads(report.read_text(encoding="utf-8"))
    healing = found["healing"]
    return Ran(
        wall=wall,
        user=after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        held=held,
        seconds=found["seconds"],
        damage=found["check"]["damage"],
        healed=0 if healing is None else healing["steps"],
    )


def anonymous(process: int) -> int:
    """Bytes of a process that no file stands behind; 0 where the system does not tell."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)


if __name__ == "__main__":
    sys.exit(main())
