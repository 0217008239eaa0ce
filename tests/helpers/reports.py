"""Reports that were not run: as large and as odd as a test wants them."""

from __future__ import annotations

import numpy as np

from onnx_lowrank.compression.figures import shown_spectrum
from onnx_lowrank.compression.inspection import Inspected, Inspection
from onnx_lowrank.compression.outlook import Outlook
from onnx_lowrank.compression.sweep_report import Point, SweepReport
from onnx_lowrank.evaluation.bench import BenchReport, ModelBench, Noise, Ratio, TargetBench
from onnx_lowrank.evaluation.check import CheckReport, ModelOnTarget, TargetCheck
from onnx_lowrank.maps.choice import Spectrum
from onnx_lowrank.schema.json_report import File, Origin
from onnx_lowrank.schema.layer import Layer
from onnx_lowrank.schema.measures import (
    Check,
    Latency,
    Milliseconds,
    OutputCheck,
    ProviderCheck,
    Speedup,
)
from onnx_lowrank.schema.report import REPORT_VERSION, Calibration, Report, Totals

__all__ = [
    "HOSTILE",
    "bench_report",
    "check_report",
    "inspection",
    "latency",
    "run_report",
    "sweep_report",
]

HOSTILE = (
    "</script><script>window.hit=1</script>",
    "<img src=x onerror=window.hit=1>",
    '"><svg onload=window.hit=1>',
    "' onmouseover='window.hit=1",
    "\u202egnp.exe\u202c",
    "a|b `c` *d* _e_ [f](g) @someone #1",
    "line\nbreak\ttab\x00nul",
    "&lt;b&gt; &amp; 日本語 שלום",
)
"""Names that a page must show and never run."""

_ORIGIN = Origin(
    "onnx-lowrank in.onnx out.onnx --keep 0.6 --data 'my data.npz'",
    {"python": "3.11.7", "onnxruntime": "1.32.0"},
    "A processor",
)


def _runs(median: float, seed: int) -> Milliseconds:
    rng = np.random.default_rng(seed)
    times = np.sort(median * (1.0 + 0.05 * rng.gamma(1.0, 1.0, 40)))
    middle = float(np.median(times))
    return Milliseconds(
        middle, float(times[36]), (0.98 * middle, 1.02 * middle), tuple(times.tolist())
    )


def latency(median: float = 1.5, low: float = 1.4, high: float = 1.6) -> Latency:
    """Of a pair of models."""
    return Latency(
        "CPUExecutionProvider",
        2,
        40,
        _runs(2.0 * median, 0),
        _runs(2.0, 1),
        Speedup(median, low, high, (low, high)),
    )


def _layer(number: int, name: str) -> Layer:
    m, n = 64 * (1 + number % 7), 256
    full = min(m, n)
    squares = np.exp(-np.arange(full) / (4.0 + number % 40)) ** 2
    dense = number % 4 == 3
    rank = None if dense else 8 * (1 + number % 5)
    after = m * n if rank is None else rank * (m + n)
    error = float(np.sqrt(squares[rank or 0 :].sum() / squares.sum()))
    return Layer(
        name=name,
        op_type="MatMul",
        form="matmul-right" if number % 3 else "gemm-right",
        weight=f"w{number}",
        shape=(m, n),
        slices=1,
        status="dense" if dense else "factored",
        rank=rank,
        reason="dense: rank 90 of the energy is above the break-even" if dense else "rank",
        parameters_before=m * n,
        parameters_after=after,
        energy=None if dense else 1.0 - error**2,
        energy_of="output",
        predicted_error=None if dense else error,
        output_error=None if dense else 1.1 * error,
        weight_error=None if dense else 0.5,
        macs_before=m * n,
        macs_after=after,
        scope=f"encoder.layers.{number}.linear",
        spectrum=shown_spectrum(Spectrum(squares, True, "output"), (m, n), rank),
        bytes_before=4 * m * n,
        bytes_after=4 * after,
        ms_before=m * n / 1e6,
        ms_after=after / 1e6,
    )


def run_report(layers: int, names: tuple[str, ...] = ()) -> Report:
    """A run with so many layers, the first ones with these names."""
    given = dict(enumerate(names))
    rows = tuple(_layer(n, given.get(n, f"node_MatMul_{n}")) for n in range(layers))
    before = sum(row.parameters_before for row in rows)
    after = sum(row.parameters_after for row in rows)
    outputs = (
        OutputCheck("logits", 0.1, 0.009, 0.9999, 0.99),
        OutputCheck("hidden", 0.2, 0.02, None, None),
    )
    return Report(
        version=REPORT_VERSION,
        tool="onnx-lowrank 0.1.0",
        input=File("in.onnx", 4 * before + 1000, before + 10, "ab" * 32),
        output=File("out.onnx", 4 * after + 1000, after + 10),
        layers=rows,
        totals=Totals(before + 10, after + 10, before, after, before, after),
        calibration=Calibration("my data.npz", 64, 16, None, layers, {}),
        goal=None,
        healing=None,
        check=Check("my data.npz", 16, (ProviderCheck("CPUExecutionProvider", outputs),), 0.001),
        latency=(latency(),),
        settings={"keep": 0.6, "ep": "cpu", "data": "my data.npz", "energy": None},
        seconds={"load": 0.1, "measure": 1.5},
        notes=("64 samples calibrate, 16 others judge",),
        summary="40 % smaller, 1.50× as fast on cpu, outputs off by 2 %",
        origin=_ORIGIN,
    )


def check_report(name: str = "logits") -> CheckReport:
    """Of two models on two targets, on one of which the second does not run."""
    near = (OutputCheck(name, 0.1, 0.009, 0.9999, 0.99),)
    models = tuple(
        ModelOnTarget(file, None, None, "all on the CPU", {"instructions": 12345.0}, ())
        for file in ("in.onnx", "out.onnx")
    )
    failed = (models[0], ModelOnTarget("out.onnx", "no kernel for <Gemm>", None, "", {}, ()))
    return CheckReport(
        "onnx-lowrank 0.1.0",
        ("in.onnx", "out.onnx"),
        "my data.npz",
        16,
        (TargetCheck("cpu", False, near, models), TargetCheck("openvino", False, (), failed)),
        0.005,
        "cpu: output 'logits' differs by 0.009 (mean relative L2), more than --max-error 0.005",
        ("a note",),
        (File("in.onnx", 4000, 1000, "ab" * 32), File("out.onnx", 2000, 500, "cd" * 32)),
        _ORIGIN,
    )


def bench_report() -> BenchReport:
    """Of two models with one and with two threads."""

    def entry(threads: int) -> TargetBench:
        models = []
        for number, name in enumerate(("in.onnx", "out.onnx")):
            runs = _runs((3.0 - number) / threads, number)
            models.append(
                ModelBench(
                    name, None, 40, runs.median, runs.p90, 2.0 * runs.median, 5.0, 4.0, 10**7,
                    None, "all on the CPU", 0, {"instructions": 1e6}, runs.certain, runs.runs,
                )
            )  # fmt: skip
        ratio = Ratio("in.onnx", "out.onnx", 1.5, 1.4, 1.6)
        return TargetBench("cpu", False, threads, tuple(models), (ratio,))

    return BenchReport(
        "onnx-lowrank 0.1.0",
        "random",
        {"x": (1, 64)},
        (entry(1), entry(2)),
        Noise(0.03, 0.5, 2),
        ("a note",),
        (File("in.onnx", 4000, 1000, "ab" * 32), File("out.onnx", 2000, 500, "cd" * 32)),
        _ORIGIN,
    )


def sweep_report() -> SweepReport:
    """Of six budgets and the model without pairs."""
    points = [Point(1.0, 4000, 1000, 900, 900, 1.0, (0.99, 1.01), "as fast", 0.0, 0.0, 0.0,
                    0.0, 1.0, None, None)]  # fmt: skip
    for number, keep in enumerate((0.9, 0.8, 0.7, 0.6, 0.5, 0.4), 1):
        speedup, error = 1.0 + 0.15 * number, 0.002 * 2.0**number
        points.append(
            Point(
                keep, 4000 - 400 * number, 1000 - 100 * number, int(900 * keep), int(900 * keep),
                speedup, (0.95 * speedup, 1.05 * speedup), "faster", error**2, error**2, error**2,
                error, 1.0 - error, None, None,
                f"onnx-lowrank in.onnx keep-{keep:.2f}.onnx --keep {keep} --allow-slower",
            )
        )  # fmt: skip
    return SweepReport(
        "onnx-lowrank 0.1.0", "in.onnx", None, "my data.npz", 16, "CPUExecutionProvider", 2,
        tuple(points), ("--keep 0.3: cannot be had",), ("a note",),
        File("in.onnx", 4000, 1000, "ab" * 32), {"ep": "cpu"}, _ORIGIN,
    )  # fmt: skip


def inspection(maps: int = 12, names: tuple[str, ...] = ()) -> Inspection:
    """Of a model with so many linear maps, the first ones with these names."""
    entries = []
    for layer in run_report(maps, names).layers:
        shape, spectrum = layer.shape, layer.spectrum
        assert shape is not None
        assert spectrum is not None
        entries.append(
            Inspected(
                layer.name, layer.form, "matmul", layer.weight, (1, *shape),
                layer.parameters_before, spectrum.break_even, (5, 9, 14, 30), "", "MatMul",
                layer.scope, "output", 0.98, spectrum,
            )
        )  # fmt: skip
    other = Inspected("", "", "", "table", (1000, 64), 64000, None, (), "read by Gather")
    return Inspection(
        "onnx-lowrank 0.1.0", "in.onnx", File("in.onnx", 4_000_000, 1_000_000, "ab" * 32),
        1_000_000, (0.8, 0.9, 0.95, 0.99), tuple(entries), (other,),
        Calibration("my data.npz", 64, 16, None, maps, {}),
        (Outlook(0.5, 9, 400_000, 500_000, 2_000_000, 9_000, 0.01),),
        ("--keep 0.1: cannot be had",), ("a note",), _ORIGIN,
    )  # fmt: skip
