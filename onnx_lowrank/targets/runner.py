"""Runs models where this package is not installed: on a board, under an emulator.

One file that needs Python 3.8 or newer, numpy and onnxruntime, and nothing of this package.  It is
copied beside the models and started in one of three ways::

    runner.py run FOLDER          runs the job in FOLDER
    runner.py serve [TEMPORARY]   receives a job on standard input, sends the result back
    runner.py child FOLDER …      what the two above start for each model, and for the timing

FOLDER holds ``job.json``::

    models, feeds    model files; [{"file": npz, "inputs": [{"name", "type"}]}], arrays "0", "1", …
    outputs, iterations, warmup, threads, strict, seconds     as in `onnx_lowrank.targets.base.Job`
    provider         execution provider, "cpu" or "CPUExecutionProvider"; options in "options"
    python           words that start a Python for the children; null for this one
    isolate          whether each model is loaded in a process of its own
    repeats          runs between marks, of which an emulator counts the instructions; 0 for none

and gets a folder ``result`` with ``result.json``::

    fault            why nothing could be run, in one line, or null
    machine, onnxruntime, half       architecture, version, and as in `Outcome`
    models           for each of them, in their order, what of `Outcome` is known:
                     "notes"; "load_ns", "first_ns", "peak_bytes", "times_ns", "nodes", "error"
                     where there are any; "outputs" [{"file": npz, "outputs": [{"name", "type"}]}],
                     one entry for each sample, arrays "0", "1", …

A model that crashes costs its own result and no other's.  Models are timed in turns, as in
`onnx_lowrank.runtime.timing`, by a loop of this file: that module stays at home.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import platform
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Emit = Callable[[dict[str, Any]], None]

MARK = b"onnx-lowrank: "
"""Begins every event on standard output; what a login shell prints there does not."""
SILENCE = 60.0
"""Seconds without a sign of life from the other side after which it is taken for dead."""
MOST_FEEDS = 8
"""Samples that the timing takes in turns."""
COUNTED = 77  # no kind of priority that a kernel knows: the call fails, and the emulator sees it

# Types that ONNX Runtime does not hand over as numpy arrays: number in ONNX, bytes of an element.
SMALL_TYPES = {
    "tensor(bfloat16)": (16, 2),
    "tensor(float8e4m3fn)": (17, 1),
    "tensor(float8e4m3fnuz)": (18, 1),
    "tensor(float8e5m2)": (19, 1),
    "tensor(float8e5m2fnuz)": (20, 1),
}


class Fault(Exception):  # noqa: N818 - as the events call it
    """Why nothing can be run here, in one line."""


# --- a child: one process that loads models and runs them


class Model:
    """A model and what is known of it."""

    def __init__(self, folder: Path, job: dict[str, Any], index: int) -> None:
        self.folder, self.job, self.index = folder, job, index
        self.path = str(folder / job["models"][index])
        self.found: dict[str, Any] = {"notes": [], "outputs": []}

    def load(self, **config: str) -> Any:
        """Open a session with the given entries of its configuration."""
        import onnxruntime as ort

        job = self.job
        provider = _provider(job["provider"])
        options = ort.SessionOptions()
        options.log_severity_level = 4
        if job["threads"]:
            options.intra_op_num_threads = job["threads"]
        options.inter_op_num_threads = 1
        config["session.force_spinning_stop"] = "1"
        if job["strict"] and provider != "CPUExecutionProvider":
            config["session.disable_cpu_ep_fallback"] = "1"
        for key, value in config.items():
            options.add_session_config_entry(key, value)
        if config.get("profile"):
            options.enable_profiling = True
            options.profile_file_prefix = config["profile"]
        chosen = (provider, job.get("options") or {})
        extra = {"enable_fallback": 0} if _version(ort) >= (1, 11) else {}
        self.session = ort.InferenceSession(self.path, options, providers=[chosen], **extra)
        if provider not in self.session.get_providers():  # older versions only warn
            raise RuntimeError(f"the session did not take {provider}")
        return self.session

    def prepare(self, feed: dict[str, Any]) -> Callable[[], Any]:
        """A call that runs the model, and nothing else."""
        import onnxruntime as ort

        session = self.session
        kinds = {item.name: item.type for item in session.get_inputs()}
        outputs = [item.type for item in session.get_outputs()]
        if not any(kind in SMALL_TYPES for kind in (*kinds.values(), *outputs)):
            return lambda: session.run(None, feed)
        values = {}
        for name, array in feed.items():
            small = SMALL_TYPES.get(kinds.get(name, ""))
            values[name] = (
                ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, small[0])
                if small
                else ort.OrtValue.ortvalue_from_numpy(array)
            )
        return lambda: session.run_with_ort_values(None, values)

    def solo(self, advance: Callable[[], None]) -> None:
        """Load, run every sample, keep the outputs, and see how much memory that took."""
        start = time.perf_counter_ns()
        self.load(**{"session.record_ep_graph_assignment_info": "1"})
        self.found["load_ns"] = time.perf_counter_ns() - start
        with contextlib.suppress(AttributeError):  # an older version does not tell
            nodes: dict[str, list[str]] = {}
            for part in self.session.get_provider_graph_assignment_info():
                names = nodes.setdefault(part.ep_name, [])
                names.extend(node.name or node.op_type for node in part.get_nodes())
            self.found["nodes"] = nodes
        everything = len(self.job["feeds"])
        for number in range(everything if self.job["outputs"] else min(everything, MOST_FEEDS)):
            call = self.prepare(feed_of(self.folder, self.job, number))
            start = time.perf_counter_ns()
            raw = call()
            self.found.setdefault("first_ns", time.perf_counter_ns() - start)
            self._keep(raw, number)
            advance()
        if self.job["repeats"]:
            self._count()
        self.found["peak_bytes"] = _peak_bytes()
        if "nodes" not in self.found:
            del self.session
            self._nodes_of_a_profile()

    def _keep(self, raw: list[Any], number: int) -> None:
        import numpy as np

        arrays: dict[str, Any] = {}
        entry: list[dict[str, str]] = []
        for item, value in zip(self.session.get_outputs(), raw):  # noqa: B905 - Python 3.8
            array = _array(value, item.type)
            if array.dtype.kind in "fc" and not np.isfinite(array).all():
                note = f"output {item.name!r} holds NaN or Inf"
                if note not in self.found["notes"]:
                    self.found["notes"].append(note)
            arrays[str(len(entry))] = array
            entry.append({"name": item.name, "type": item.type})
        if self.job["outputs"]:
            file = f"model{self.index}-{number}.npz"
            np.savez(str(self.folder / "result" / file), **arrays)
            self.found["outputs"].append({"file": file, "outputs": entry})

    def _count(self) -> None:
        """Runs between marks, of which an emulator counts the instructions; empty ones first."""
        call = self.prepare(feed_of(self.folder, self.job, 0))
        for _ in range(2):
            call()
        gc.disable()  # collecting would add instructions to some of the runs
        for work in (_nothing, call):
            for _ in range(self.job["repeats"]):
                _mark(2 * self.index)
                work()
                _mark(2 * self.index + 1)
        gc.enable()

    def _nodes_of_a_profile(self) -> None:
        """Who ran which node, for versions that tell it in a profile only."""
        prefix = str(self.folder / f"profile{self.index}")
        with contextlib.suppress(Exception):
            self.load(profile=prefix)
            self.prepare(feed_of(self.folder, self.job, 0))()
            nodes: dict[str, list[str]] = {}
            for event in json.loads(Path(self.session.end_profiling()).read_text("utf-8")):
                provider = event.get("args", {}).get("provider")
                name = event.get("name", "")
                if provider and name.endswith("_kernel_time"):
                    nodes.setdefault(provider, []).append(name[: -len("_kernel_time")])
            self.found["nodes"] = nodes


def child_solo(folder: Path, job: dict[str, Any], indexes: list[int]) -> None:
    """Load and run some models, one after another."""
    for index in indexes:
        model = Model(folder, job, index)
        try:
            model.solo(lambda: print("advance", flush=True))
        except Fault:
            raise
        except OSError as error:  # the disk, not the model
            raise Fault(f"cannot write the outputs: {error.strerror or error}") from error
        except Exception as error:  # its exceptions have no common base but this
            model.found["error"] = _reason(error)
        _write(folder / "result" / f"model{index}.json", model.found)


def child_timing(folder: Path, job: dict[str, Any], indexes: list[int]) -> None:
    """Time the models in turns; the order flips and turns, so that none is always second."""
    feeds = [feed_of(folder, job, number) for number in range(min(len(job["feeds"]), MOST_FEEDS))]
    calls = []  # [feed][model]
    models = [Model(folder, job, index) for index in indexes]
    for model in models:
        model.load()
    for feed in feeds:
        calls.append([model.prepare(feed) for model in models])
        for call in calls[-1]:  # the first run of a shape allocates
            call()
    for number in range(job["warmup"]):
        for call in calls[number % len(calls)]:
            call()
    times: list[list[int]] = [[] for _ in models]
    for number in range(job["iterations"]):
        order = list(range(len(models)))
        turn = (number // 2) % len(models)
        order = order[turn:] + order[:turn]
        for place in order if number % 2 == 0 else reversed(order):
            call = calls[number % len(calls)][place]
            start = time.perf_counter_ns()
            call()
            times[place].append(time.perf_counter_ns() - start)
        print("advance", flush=True)
    keyed = {str(index): times[place] for place, index in enumerate(indexes)}
    _write(folder / "result" / "timing.json", keyed)


def child(folder: Path, words: list[str]) -> int:
    """Do what the words say, "solo" or "timing" and numbers of models; returns the exit status."""
    _watch(0, math.inf, lambda: os._exit(4))
    try:
        try:
            import numpy  # noqa: F401
            import onnxruntime as ort
        except ImportError as error:
            raise Fault(
                f"{sys.executable} (Python {platform.python_version()}) has no onnxruntime: {error}"
            ) from error
        job = json.loads((folder / "job.json").read_text("utf-8"))
        machine = {"machine": platform.machine(), "onnxruntime": ort.__version__, "half": None}
        if _provider(job["provider"]) == "CPUExecutionProvider":
            machine["half"] = _half()
        _write(folder / "result" / "machine.json", machine)
        work = child_solo if words[0] == "solo" else child_timing
        work(folder, job, [int(word) for word in words[1:]])
    except Fault as error:
        with contextlib.suppress(OSError):
            _write(folder / "fault.json", str(error))
        print(MARK.decode() + str(error), file=sys.stderr)
        return 3
    except Exception as error:
        print(MARK.decode() + _reason(error), file=sys.stderr)
        return 2
    sys.stdout.flush()
    os._exit(0)  # some providers crash while Python takes them down, with everything done


def _provider(name: str) -> str:
    import onnxruntime as ort

    available = ort.get_available_providers()
    for provider in available:
        if name.lower() in (provider.lower(), provider.lower().replace("executionprovider", "")):
            return str(provider)
    shown = ", ".join(provider.replace("ExecutionProvider", "").lower() for provider in available)
    raise Fault(f"onnxruntime {ort.__version__} has no provider {name!r}; it has {shown}")


def _version(ort: Any) -> tuple[int, ...]:
    return tuple(int(part) for part in ort.__version__.split(".")[:2])


def feed_of(folder: Path, job: dict[str, Any], number: int) -> dict[str, Any]:
    """A sample of the job: input -> array."""
    import numpy as np

    feed = job["feeds"][number]
    with np.load(str(folder / feed["file"]), allow_pickle=False) as data:
        arrays = [data[str(place)] for place in range(len(feed["inputs"]))]
    return {
        item["name"]: array.astype(object) if array.dtype.kind == "U" else array
        for item, array in zip(feed["inputs"], arrays)  # noqa: B905 - Python 3.8
    }


def _array(value: Any, kind: str) -> Any:
    """An output as an array that a file holds: strings fixed in width, small floats as bits."""
    import ctypes

    import numpy as np

    if hasattr(value, "data_ptr"):
        if kind not in SMALL_TYPES:
            return value.numpy()
        width = SMALL_TYPES[kind][1]
        count = int(np.prod(value.shape(), dtype=np.int64))
        data = ctypes.string_at(value.data_ptr(), count * width)
        return np.frombuffer(data, np.uint16 if width == 2 else np.uint8).reshape(value.shape())
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return np.array([[item[key] for key in sorted(item)] for item in value])
    if isinstance(value, dict):
        return np.array([value[key] for key in sorted(value)])
    if isinstance(value, list) and all(isinstance(item, np.ndarray) for item in value):
        return np.concatenate([item.reshape(-1) for item in value]) if value else np.empty(0)
    array = np.asarray(value)
    return array.astype(np.str_) if array.dtype.kind == "O" else array


def _nothing() -> None:
    pass


def _mark(number: int) -> None:
    with contextlib.suppress(OSError):
        os.getpriority(COUNTED, number)


def _peak_bytes() -> int | None:
    """Largest resident memory of this process.

    Not of `getrusage` on Linux: that starts from what the process had before it became this
    program, which is the memory of the one that started it.
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    with contextlib.suppress(ImportError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else None
    return None


def _half() -> bool | None:
    """Whether the processor computes in float16; x86 kernels turn it into float32."""
    machine = platform.machine().lower()
    if machine in ("x86_64", "amd64"):
        return False
    if machine == "arm64" and sys.platform == "darwin":
        return True
    try:
        return machine == "aarch64" and "asimdhp" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return None


def _reason(error: BaseException) -> str:
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : [A-Z_]+ : ", "", str(error))
    text = " ".join(text.split()) or type(error).__name__
    return text if len(text) <= 400 else text[:399] + "…"


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), "utf-8")


# --- the supervisor, which needs the standard library only


class Supervisor:
    """Runs the job of a folder in children, and outlives them."""

    def __init__(self, folder: Path, emit: Emit) -> None:
        self.folder, self.emit = folder, emit
        self.job = json.loads((folder / "job.json").read_text("utf-8"))
        self.end = time.monotonic() + (self.job["seconds"] or math.inf)
        self.running: subprocess.Popen[bytes] | None = None

    def run(self) -> None:
        """Run everything and write ``result.json``.

        Raises:
            Fault: nothing can be run here, or the time is up.
        """
        result = self.folder / "result"
        result.mkdir(exist_ok=True)
        indexes = list(range(len(self.job["models"])))
        models = {}
        groups = [[index] for index in indexes] if self.job["isolate"] else [indexes]
        while groups:
            group = groups.pop(0)
            ended = self._child("solo", group)
            for index in group:
                file = result / f"model{index}.json"
                if file.exists():
                    models[index] = json.loads(file.read_text("utf-8"))
                elif len(group) > 1:
                    groups.append([index])
                else:
                    models[index] = {"notes": [], "outputs": [], "error": ended}
        timed = [index for index in indexes if "error" not in models[index]]
        if self.job["iterations"] and timed:
            ended = self._child("timing", timed)
            times = result / "timing.json"
            found = json.loads(times.read_text("utf-8")) if times.exists() else {}
            for index in timed:
                if found:
                    models[index]["times_ns"] = found[str(index)]
                else:
                    models[index]["error"] = f"timing: {ended}"
        machine = json.loads((result / "machine.json").read_text("utf-8"))
        ordered = [models[index] for index in indexes]
        _write(result / "result.json", {"fault": None, "models": ordered, **machine})

    def stop(self) -> None:
        """Kill the child that is running."""
        if self.running is not None and self.running.poll() is None:
            with contextlib.suppress(OSError):
                os.killpg(self.running.pid, signal.SIGKILL)

    def _child(self, *words: Any) -> str:
        """Run a child; how it ended.  A fault of the place, not of a model, is raised."""
        flat = [words[0], *map(str, words[1])]
        python = self.job["python"] or [sys.executable]
        command = [*python, str(self.folder / "runner.py"), "child", str(self.folder), *flat]
        with tempfile.TemporaryFile(dir=str(self.folder)) as errors:
            pipe = subprocess.PIPE
            try:
                self.running = process = subprocess.Popen(
                    command, stdin=pipe, stdout=pipe, stderr=errors, start_new_session=True
                )
            except OSError as error:
                raise Fault(f"cannot start {command[0]}: {error.strerror}") from error
            timer = None
            if self.end < math.inf:
                timer = threading.Timer(max(0.0, self.end - time.monotonic()), self.stop)
                timer.start()
            try:
                assert process.stdout is not None
                for line in process.stdout:
                    if line.strip() == b"advance":
                        self.emit({"event": "advance"})
                code = process.wait()
            finally:
                if timer is not None:
                    timer.cancel()
                self.stop()
                process.wait()
                for stream in (process.stdin, process.stdout):
                    if stream is not None:
                        stream.close()
            errors.seek(0)
            lines = errors.read()[-20000:].decode("utf-8", "replace").strip().splitlines()
        if time.monotonic() >= self.end:
            raise Fault(f"not done within {self.job['seconds']:g} s")
        said = [line[len(MARK) :] for line in lines if line.startswith(MARK.decode())]
        fault = self.folder / "fault.json"
        if code == 3 and (fault.exists() or said):
            raise Fault(said[-1] if said else json.loads(fault.read_text("utf-8")))
        if code != 0 and not said and not (self.folder / "result" / "machine.json").exists():
            why = lines[-1] if lines else _ending(code)
            raise Fault(f"onnxruntime does not start with {command[0]}: {_ending(code)}: {why}")
        return said[-1] if said else _ending(code)


def _ending(code: int) -> str:
    if code in (-9, 137):
        return "the process was killed (out of memory?)"
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"the process died of {signal.Signals(-code).name}"
    return f"the process ended with status {code}"


def run(folder: Path, emit: Emit) -> None:
    """Run the job of a folder; whatever happens, ``result/result.json`` says it."""
    supervisor = Supervisor(folder, emit)
    try:
        supervisor.run()
    except Fault as error:
        _write(folder / "result" / "result.json", {"fault": str(error), "models": []})
    finally:
        supervisor.stop()


# --- the other end of a connection


def _watch(descriptor: int, silence: float, dead: Callable[[], None]) -> None:
    """Call ``dead`` when the other end of a pipe closes it or gives no sign of life."""

    def look() -> None:
        wait = None if silence == math.inf else silence
        while True:
            readable, _, _ = select.select([descriptor], [], [], wait)
            try:
                if not readable or not os.read(descriptor, 4096):
                    break
            except OSError:
                break
        dead()

    threading.Thread(target=look, daemon=True).start()


def serve(temporary: str | None) -> int:
    """Receive a job, run it, send the result, and leave nothing behind.

    Events are lines of JSON after `MARK`: ready (what there is here), advance, fault, result
    (followed by the files).  The job is one line, {"files": [[name, bytes], …]}, and the files;
    anything after it is a sign of life, and its end means that nobody waits any more.
    """
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever else writes to standard output does not get between the events

    def emit(event: dict[str, Any]) -> None:
        out.write(MARK + json.dumps(event).encode() + b"\n")
        out.flush()

    def leave(*_: Any) -> None:
        raise SystemExit(1)

    for name in ("SIGTERM", "SIGHUP", "SIGINT"):
        signal.signal(getattr(signal, name), leave)
    supervisor = None
    try:
        folder = Path(tempfile.mkdtemp(prefix="onnx-lowrank-", dir=temporary))
    except OSError as error:
        emit({"event": "fault", "text": f"no folder for temporary files: {error}"})
        return 1
    try:
        try:
            emit({"event": "ready", "folder": str(folder), **_here(folder)})
            _receive(sys.stdin.buffer, folder)
            supervisor = Supervisor(folder, emit)

            def dead() -> None:
                supervisor.stop()
                shutil.rmtree(str(folder), ignore_errors=True)
                os._exit(1)

            _watch(0, SILENCE, dead)
            supervisor.run()
            _send(out, emit, folder / "result")
        except Fault as error:
            emit({"event": "fault", "text": str(error)})
        except BrokenPipeError:
            return 1
        except OSError as error:
            emit({"event": "fault", "text": f"{folder}: {error.strerror or error}"})
        return 0
    finally:
        if supervisor is not None:
            supervisor.stop()
        shutil.rmtree(str(folder), ignore_errors=True)


def _here(folder: Path) -> dict[str, Any]:
    import importlib.util

    # Started with -c, a Python also looks into the current folder, where the children do not.
    sys.path[:] = [path for path in sys.path if path]
    return {
        "python": platform.python_version(),
        "executable": sys.executable,
        "machine": platform.machine(),
        "free": shutil.disk_usage(str(folder)).free,
        "onnxruntime": importlib.util.find_spec("onnxruntime") is not None,
    }


def _receive(source: IO[bytes], folder: Path) -> None:
    line = source.readline()
    if not line.endswith(b"\n"):
        raise BrokenPipeError
    files = json.loads(line)["files"]
    for name, size in files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with path.open("wb") as file:
                for data in _pieces(source, size):
                    file.write(data)
        except BrokenPipeError:
            raise
        except OSError as error:
            for _ in _pieces(source, 0):
                pass
            raise Fault(f"cannot write {name} ({size:,} bytes): {error.strerror}") from error


def _pieces(source: IO[bytes], size: int) -> Iterator[bytes]:
    while size:
        data = source.read(min(size, 1 << 20))
        if not data:
            raise BrokenPipeError
        size -= len(data)
        yield data


def _send(out: IO[bytes], emit: Emit, folder: Path) -> None:
    files = sorted(path for path in folder.iterdir() if path.is_file())
    emit({"event": "result", "files": [[path.name, path.stat().st_size] for path in files]})
    for path in files:
        with path.open("rb") as file:
            shutil.copyfileobj(file, out)
    out.flush()


def main(words: list[str]) -> int:
    """What the words after the program's name ask for."""
    if words[:1] == ["child"]:
        return child(Path(words[1]), words[2:])
    if words[:1] == ["serve"]:
        return serve(words[1] if len(words) > 1 else None)
    if words[:1] == ["run"] and len(words) == 2:
        run(Path(words[1]), lambda _: None)
        return 0
    print("usage: runner.py run FOLDER | serve [TEMPORARY]", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
