"""Peak memory of one model: a process that loads it, runs it once and reports.

``python -m onnx_lowrank.targets.memory MODEL PROVIDER THREADS`` reads a feed and the libraries of
custom operators, pickled, from standard input and writes one line of JSON.  A process of its own
also survives a provider that crashes.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnx_lowrank.numerics.arrays import Feed

__all__ = ["Peak", "measure_peak"]


@dataclass(frozen=True)
class Peak:
    """What a process that loads and runs one model tells.

    Attributes:
        bytes: its largest resident memory; None where it is not known.
        crash: how it died, where it did, as the end of a sentence.
    """

    bytes: int | None = None
    crash: str | None = None


def measure_peak(
    model: Path, provider: str, feed: Feed, threads: int, seconds: float | None = None
) -> Peak:
    """Load and run a model once in a process of its own.

    Args:
        model: the model's file.
        provider: name of the execution provider.
        feed: the sample.
        threads: intra-op threads.
        seconds: longest time; None for no limit.

    Returns:
        An error that is no crash is left to the caller, who meets it too: nothing is known then.
    """
    from onnx_lowrank.runtime.custom_ops import libraries

    command = [sys.executable, "-P", "-m", __name__, str(model), provider, str(threads)]
    folders = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, folders))}
    try:
        done = subprocess.run(
            command,
            input=pickle.dumps((dict(feed), libraries())),
            capture_output=True,
            check=False,
            timeout=seconds,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        return Peak(crash=f"loading and running it once took longer than {seconds:g} s")
    if done.returncode < 0:
        number = -done.returncode
        names = {item.value: item.name for item in signal.Signals}
        return Peak(crash=f"the process crashed with {names.get(number, f'signal {number}')}")
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return Peak()
    return Peak(bytes=answer.get("peak_bytes"))


def _own_peak() -> int | None:
    """Largest resident memory of this process in bytes."""
    try:
        # Of this program alone: getrusage still counts the process that it was forked from.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)


def _main(arguments: list[str]) -> int:
    from onnx_lowrank.errors import InputError
    from onnx_lowrank.runtime.custom_ops import known
    from onnx_lowrank.runtime.providers import resolve_provider
    from onnx_lowrank.runtime.session import open_session, run

    model, provider, threads = arguments
    feed: dict[str, Any]
    feed, libraries = pickle.load(sys.stdin.buffer)
    answer: dict[str, object] = {}
    try:
        with known(libraries):
            session = open_session(
                Path(model), provider=resolve_provider(provider), threads=int(threads)
            )
        run(session, feed, model)
        answer["peak_bytes"] = _own_peak()
    except InputError as error:
        answer["error"] = str(error)
    print(json.dumps(answer), flush=True)
    # Some plugins fail in their own clean-up; what was to be said has been said.
    os._exit(0)


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
