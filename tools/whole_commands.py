"""What whole commands take, each in a process of its own, against what any of them has to do."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onnx_lowrank.data.mask import find_mask
from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.runtime.session import open_session, prepare

__all__ = ["HEALED", "by_weights", "whole_commands"]

STAGES = ("simplify", "calibrate", "fisher", "damage", "effort", "refit", "heal")
HEALED = (20, 60)
FITTED, JUDGED = 256, 16

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


def by_weights(model: Path, energy: float) -> None:
    """Print what commands without samples take against the least that they can.

    Args:
        model: the model.
        energy: the share that the command keeps.
    """
    with tempfile.TemporaryDirectory() as folder:
        unchecked = "--no-check", "--no-bench", "--quiet"
        ways = {
            "--help": ["-m", "onnx_lowrank", "--help"],
            "load, simplify, save": ["-c", LEAST, str(model), folder],
            f"--energy {energy} --no-check --no-bench": [
                *("-m", "onnx_lowrank", str(model), f"{folder}/small.onnx"),
                *("--energy", str(energy), *unchecked),
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
