"""ONNX Runtime: sessions and runs, with this package's errors.

Nothing falls back silently: a provider that is not there is an error, and so is a run that the
provider refuses.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from onnx_lowrank.errors import InputError, named
from onnx_lowrank.numerics.arrays import flat
from onnx_lowrank.runtime import custom_ops
from onnx_lowrank.runtime.assignment import RECORD
from onnx_lowrank.runtime.log import LogLine, OrtLog, quiet_stdout
from onnx_lowrank.runtime.providers import CPU, Provider

__all__ = [
    "NO_FALLBACK",
    "LogLine",
    "OrtLog",
    "default_threads",
    "open_session",
    "prepare",
    "run",
]

NO_FALLBACK = "session.disable_cpu_ep_fallback"
"""The session's option that makes a node on the CPU an error."""

_STATUS = re.compile(r"^\[ONNXRuntimeError\] : \d+ : [A-Z_]+ : ")
_LONGEST = 400
_UNKNOWN = "is not a registered function/op"
# Types that ONNX Runtime holds but does not hand over as numpy arrays.
_SMALL_TYPES: dict[str, tuple[int, type]] = {
    "tensor(bfloat16)": (16, ml_dtypes.bfloat16),
    "tensor(float8e4m3fn)": (17, ml_dtypes.float8_e4m3fn),
    "tensor(float8e4m3fnuz)": (18, ml_dtypes.float8_e4m3fnuz),
    "tensor(float8e5m2)": (19, ml_dtypes.float8_e5m2),
    "tensor(float8e5m2fnuz)": (20, ml_dtypes.float8_e5m2fnuz),
}
# Those that it does not even take as the bytes of one.
_NOT_HANDED_OVER = frozenset({"float4e2m1", "float8e8m0", "int2", "int4", "uint2", "uint4"})


def default_threads() -> int:
    """Physical cores that this process may use: ONNX Runtime gains nothing from hyper-threads."""
    try:
        cpus = sorted(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        cpus = list(range(os.cpu_count() or 1))
    cores = {_core(cpu) for cpu in cpus}
    return max(1, min(len(cores), _quota()))


def _core(cpu: int) -> tuple[str, ...]:
    topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
    try:
        return tuple(
            (topology / file).read_text().strip() for file in ("physical_package_id", "core_id")
        )
    except OSError:
        return (str(cpu),)


def _quota() -> int:
    """Whole CPUs that the container may use; a huge number where it is not limited."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return math.ceil(int(quota) / int(period))
    except (OSError, ValueError, ZeroDivisionError):  # no cgroup v2, or "max"
        return 2**31


def open_session(
    model: Path | bytes,
    *,
    provider: Provider = CPU,
    threads: int | None = None,
    optimize: bool = True,
    planned: bool = True,
    packed: bool = True,
    spinning: bool = True,
    strict: bool = False,
    entries: Mapping[str, str] | None = None,
    log: OrtLog | None = None,
) -> ort.InferenceSession:
    """Load a model on one execution provider, with the custom operators that are in force.

    Which node went where can be read back with `onnx_lowrank.runtime.assignment.assignment`.

    Args:
        model: a file, or a serialized model.
        provider: see `onnx_lowrank.runtime.providers.resolve_provider`.
        threads: intra-op threads; None for `default_threads`.
        optimize: ONNX Runtime's own graph optimizations.
        planned: whether a second run of one shape gets all its memory in one piece, beside what
            the first one took.
        packed: whether weights are copied into the order in which products read them; else they
            stay in the file beside the model, and products of some ten rows and more take about a
            tenth longer.
        spinning: whether threads that wait for work keep their cores busy meanwhile: an operator
            begins some microseconds earlier, and half of the processor time may go into waiting.
        strict: whether a node that the provider leaves to the CPU is an error.
        entries: further entries of the session's configuration.
        log: collects the log; without it, it goes to standard error.

    Raises:
        InputError: ONNX Runtime does not load the model, or a library of custom operators, with
            its reason.
    """
    what = str(model) if isinstance(model, Path) else "the model in memory"
    options = ort.SessionOptions()
    options.intra_op_num_threads = default_threads() if threads is None else threads
    options.inter_op_num_threads = 1
    options.enable_mem_pattern = planned
    # Idle threads of one session would spin on the cores that another one is timed on.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry(RECORD, "1")
    if not spinning:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not packed:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if strict and provider is not CPU:  # ONNX Runtime refuses it where the CPU is asked for
        options.add_session_config_entry(NO_FALLBACK, "1")
    for key, value in (entries or {}).items():
        options.add_session_config_entry(key, value)
    custom_ops.register(options)
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    source = str(model) if isinstance(model, Path) else model
    # Without enable_fallback=0 ONNX Runtime answers errors of a provider by using the CPU.
    with log.capture(f"loading {what}") if log is not None else contextlib.nullcontext():
        try:
            if provider.device is not None:
                options.add_provider_for_devices([provider.device], dict(provider.options))
                with quiet_stdout():  # where QNN's libraries announce themselves
                    return ort.InferenceSession(source, options, enable_fallback=0)
            wanted = [(provider.full, dict(provider.options))]
            return ort.InferenceSession(source, options, providers=wanted, enable_fallback=0)
        except Exception as error:  # its exceptions have no common base but this
            raise InputError(
                f"{what}: ONNX Runtime does not load it on {provider.full}: "
                f"{_reason(error)}{_hint(error)}"
            ) from error


def prepare(
    session: ort.InferenceSession, feeds: Mapping[str, npt.NDArray[Any]]
) -> Callable[[], list[Any]]:
    """A call that runs the model on these feeds and returns the raw outputs, nothing else.

    What can be done once is done here, so that the call can be timed.  The outputs are numpy
    arrays, or OrtValue objects where the model has a bfloat16 or 8-bit float in or out.
    """
    inputs = {item.name: item.type for item in session.get_inputs()}
    outputs = [item.type for item in session.get_outputs()]
    if not any(kind in _SMALL_TYPES for kind in (*inputs.values(), *outputs)):
        plain = {name: _plain(array, inputs.get(name, "")) for name, array in feeds.items()}
        return lambda: list(session.run(None, plain))
    values = {}
    for name, array in feeds.items():
        kind = _SMALL_TYPES.get(inputs.get(name, ""))
        array = np.asarray(array, order="C")
        values[name] = (
            ort.OrtValue.ortvalue_from_numpy(array)
            if kind is None
            else ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, kind[0])
        )
    return lambda: list(session.run_with_ort_values(None, values))


def run(
    session: ort.InferenceSession, feeds: Mapping[str, npt.NDArray[Any]], what: str
) -> dict[str, npt.NDArray[Any]]:
    """Run the model once.

    Args:
        session: from `open_session`.
        feeds: input name -> array; for a sequence of tensors an array of arrays.
        what: names the model in an error.

    Returns:
        Output name -> array.  A sequence of tensors becomes one vector; a sequence of maps
        (scikit-learn's ZipMap) becomes an array [rows, keys] with sorted keys; strings are an
        object array.

    Raises:
        InputError: ONNX Runtime refuses the feeds or fails, or an output is of a kind that is
            not handled.
    """
    _check_types(session, what)
    try:
        raw = prepare(session, feeds)()
        return {
            item.name: _array(value) for item, value in zip(session.get_outputs(), raw, strict=True)
        }
    except InputError:
        raise
    except Exception as error:  # its exceptions have no common base but this
        raise InputError(f"{what}: ONNX Runtime does not run it: {_reason(error)}") from error


def _plain(array: npt.NDArray[Any], kind: str) -> Any:
    """What ONNX Runtime takes for an input of a type."""
    if kind.startswith(("seq(", "optional(seq(")):
        return list(array)
    return np.asarray(array, order="C")


def _check_types(session: ort.InferenceSession, what: str) -> None:
    """Raise InputError where a model takes or gives what no array can hold."""
    for place, items in (("input", session.get_inputs()), ("output", session.get_outputs())):
        for item in items:
            kind = item.type.partition("(")[2].rstrip(")")
            if kind in _NOT_HANDED_OVER:
                raise InputError(
                    f"{what}: {place} {item.name!r} is {kind}, which ONNX Runtime takes and gives "
                    f"in no array; {named('check', False)} {named('bench', False)} converts the "
                    "model without a run"
                )


def _array(value: Any) -> npt.NDArray[Any]:
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, ort.OrtValue):
        small = _SMALL_TYPES.get(value.data_type())
        return value.numpy() if small is None else _small_array(value, np.dtype(small[1]))
    if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        return np.array([[item[key] for key in sorted(item)] for item in value])
    if isinstance(value, Mapping):
        return np.array([value[key] for key in sorted(value)])
    if isinstance(value, list) and all(isinstance(item, np.ndarray) for item in value):
        return flat(value)
    return np.asarray(value)


def _small_array(value: ort.OrtValue, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    shape = tuple(value.shape())
    data = ctypes.string_at(value.data_ptr(), math.prod(shape) * dtype.itemsize)
    return np.frombuffer(data, dtype).reshape(shape)


def _hint(error: Exception) -> str:
    """Where an operator is not known, that a library may know it."""
    if _UNKNOWN not in str(error):
        return ""
    return f"; {named('custom_ops')} names a library that has it"


def _reason(error: Exception) -> str:
    """ONNX Runtime's message as one line of bearable length."""
    text = " ".join(_STATUS.sub("", str(error)).split()) or type(error).__name__
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
