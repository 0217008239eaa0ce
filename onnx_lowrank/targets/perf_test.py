"""Time models with onnxruntime_perf_test: how it is called, and what it prints.

It runs one model in one process, so models take turns process by process: a few turns of several
runs each, the order changing from turn to turn.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np

from onnx_lowrank.errors import InputError
from onnx_lowrank.numerics.arrays import Feed
from onnx_lowrank.progress import Advance
from onnx_lowrank.targets.base import (
    Job,
    Outcome,
)

__all__ = ["PerfTest", "write_sample"]

_TURNS = 5
_LOAD = re.compile(r"Session creation time cost: *([0-9.e+-]+) s")
_FIRST = re.compile(r"First inference time cost: *([0-9.e+-]+) ms")
_PEAK = re.compile(r"Peak working set size: *(\d+)")
_WHY = re.compile("error|fail|exception", re.IGNORECASE)
# model, seconds, bytes of memory, percents of a CPU, number of the run
_RUN = re.compile(r"^[^,\n]*,([0-9.e+-]+),\d+,-?\d+,\d+\s*$", re.MULTILINE)


def write_sample(feed: Feed, folder: Path) -> list[Path]:
    """Write a sample as the ``input_N.pb`` of a test data set; the files.

    Raises:
        InputError: an input is of a type that ONNX has not.
    """
    import onnx.numpy_helper

    folder.mkdir(exist_ok=True)
    files = []
    for number, (name, array) in enumerate(feed.items()):
        try:
            tensor = onnx.numpy_helper.from_array(np.asarray(array, order="C"), name)
        except (ValueError, NotImplementedError, KeyError, TypeError) as error:
            raise InputError(f"input {name!r}: no tensor of {array.dtype}: {error}") from error
        path = folder / f"input_{number}.pb"
        path.write_bytes(tensor.SerializeToString())
        files.append(path)
    return files


@dataclass
class _Found:
    """What is known of one model."""

    times_ns: list[int] = field(default_factory=list)
    load_ns: int | None = None
    first_ns: int | None = None
    peak_bytes: int | None = None
    nodes: dict[str, tuple[str, ...]] | None = None
    error: str | None = None


@dataclass(frozen=True)
class PerfTest:
    """Several models, each in a folder ``model.onnx`` with its test data sets.

    Attributes:
        shell: runs a command where the models are; its status, and what it wrote.
        program: the path of onnxruntime_perf_test there.
        provider: what its ``-e`` gets.
        job: what is wanted.
        advance: called with the number of timed runs just done.
    """

    shell: Callable[[str], tuple[int, str]]
    program: str
    provider: str
    job: Job
    advance: Advance

    def run(self, places: Sequence[str]) -> tuple[Outcome, ...]:
        """Measure the models in these folders.

        Raises:
            InputError: the place where they are is gone.
        """
        found = [_Found() for _ in places]
        for place, model in zip(places, found, strict=True):
            self._try(place, model)
        wanted = self.job.iterations
        runs = math.ceil(wanted / _TURNS)
        turn = 0
        while wanted > 0:
            order = [index for index, model in enumerate(found) if model.error is None]
            if not order:
                break
            shift = (turn // 2) % len(order)
            order = order[shift:] + order[:shift]
            count = min(runs, wanted)
            for index in order if turn % 2 == 0 else reversed(order):
                self._turn(places[index], found[index], count)
            self.advance(count)
            wanted -= count
            turn += 1
        note = f"onnxruntime_perf_test: {turn} turns of at most {runs} runs" if turn else ""
        return tuple(
            Outcome(
                times_ns=() if model.error else tuple(model.times_ns),
                load_ns=model.load_ns,
                first_ns=model.first_ns,
                peak_bytes=model.peak_bytes,
                nodes=model.nodes,
                error=model.error,
                notes=(note,) if note else (),
            )
            for model in found
        )

    def _command(self, place: str, runs: int, *further: str) -> str:
        threads = [] if self.job.threads is None else ["-x", str(self.job.threads)]
        strict = []
        if self.job.strict and self.provider != "cpu":
            strict = ["-C", "session.disable_cpu_ep_fallback|1"]
        words = ["-e", self.provider, "-m", "times", "-r", str(runs), *threads, *strict, *further]
        library = f"LD_LIBRARY_PATH={shlex.quote(str(PurePosixPath(self.program).parent))}"
        arguments = shlex.join([self.program, *words, f"{place}/model.onnx", f"{place}/times"])
        return f"cd -- {shlex.quote(place)} && rm -f times && {library} {arguments}"

    def _try(self, place: str, model: _Found) -> None:
        """Run once: whether it runs at all, how long loading takes; then who takes which nodes."""
        code, said = self.shell(self._command(place, 1))
        if code != 0:
            lines = [line.strip() for line in said.splitlines() if line.strip()]
            why = next((line for line in reversed(lines) if _WHY.search(line)), "")
            model.error = f"status {code}: {why or (lines[-1] if lines else 'no message')}"[:400]
            return
        self._read(said, model)
        command = self._command(place, 1, "-p", f"{place}/profile")
        code, text = self.shell(f"{command} > output && cat profile*")
        if code == 0:
            model.nodes = _nodes(text)

    def _turn(self, place: str, model: _Found, runs: int) -> None:
        extra = max(0, self.job.warmup - 1)  # the program itself runs once before
        code, said = self.shell(f"{self._command(place, extra + runs)} && cat times")
        times = [round(float(seconds) * 1e9) for seconds in _RUN.findall(said)]
        if code != 0 or len(times) != extra + runs:
            model.error = f"status {code}: expected {extra + runs} times, got {len(times)}"
            return
        self._read(said, model)
        model.times_ns += times[extra:]

    def _read(self, said: str, model: _Found) -> None:
        if load := _LOAD.search(said):
            model.load_ns = round(float(load[1]) * 1e9)
        if first := _FIRST.search(said):
            model.first_ns = round(float(first[1]) * 1e6)
        if peak := _PEAK.search(said):
            model.peak_bytes = max(int(peak[1]), model.peak_bytes or 0)


def _nodes(profile: str) -> dict[str, tuple[str, ...]] | None:
    """Provider -> nodes, from a profile; a partition that a provider compiled is one node."""
    try:
        events = json.loads(profile)
    except ValueError:
        return None
    nodes: dict[str, dict[str, None]] = {}
    for event in events:
        provider = event.get("args", {}).get("provider")
        name = event.get("name", "")
        if provider and name.endswith("_kernel_time"):
            nodes.setdefault(provider, {})[name.removesuffix("_kernel_time")] = None
    return {provider: tuple(names) for provider, names in nodes.items()}
