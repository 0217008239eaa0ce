"""`compress`: the library's face, with the names and defaults of the command."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import onnx
import onnx_ir as ir

from onnx_lowrank.compression.result import Result
from onnx_lowrank.compression.run import execute
from onnx_lowrank.compression.settings import DEFAULT_CALIBRATION_SAMPLES, DEFAULT_SAMPLES, Settings
from onnx_lowrank.data.sources import SampleSource
from onnx_lowrank.progress import Progress, Silent
from onnx_lowrank.runtime.session import OrtLog

__all__ = ["compress"]


def compress(
    model: str | os.PathLike[str] | onnx.ModelProto | ir.Model,
    *,
    energy: float | None = None,
    rank: int | None = None,
    keep: float | None = None,
    uniform: bool = False,
    max_size: int | str | None = None,
    tolerance: float | None = None,
    speedup: float | None = None,
    max_latency: float | str | None = None,
    metric: str = "relative-l2",
    objective: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    ops: Sequence[str] | None = None,
    constant_inputs: bool = False,
    min_gain: float = 0.1,
    rank_multiple: int | str | None = None,
    shape_for: str | None = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    dims: Mapping[str, int] | None = None,
    data: str | os.PathLike[str] | None = None,
    labels: str | os.PathLike[str] | None = None,
    samples: int = DEFAULT_SAMPLES,
    calibration: SampleSource | None = None,
    calibration_samples: int = DEFAULT_CALIBRATION_SAMPLES,
    calibrate: bool = True,
    mask: str | None = None,
    fisher: bool = False,
    refit: bool = False,
    save_stats: str | os.PathLike[str] | None = None,
    load_stats: str | os.PathLike[str] | None = None,
    save_costs: str | os.PathLike[str] | None = None,
    load_costs: str | os.PathLike[str] | None = None,
    allow_slower: bool = False,
    heal: int = 0,
    heal_at: Sequence[str] = (),
    seed: int = 0,
    max_error: float | None = None,
    simplify: bool = True,
    check: bool = True,
    bench: bool = True,
    threads: int | None = None,
    ep: str = "cpu",
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Replace the constant linear maps of a model by pairs of smaller ones.

    Names and defaults are those of the command ``onnx-lowrank``.

    Args:
        model: a path, a protobuf or an `onnx_ir.Model`; it is not changed.
        energy: smallest rank whose squared singular values hold this share of their sum, in
            (0, 1]; 0.95 unless a rank or a share to keep is given.
        rank: a fixed rank, taken as it is.
        keep: share of the linear layers' parameters to keep over the whole model, in (0, 1],
            spread where it hurts least.
        uniform: keep that share of every layer instead.
        max_size: bytes of the result, such as 20_000_000 or "20MB", external data included.
        tolerance: the smallest (or fastest) model whose loss by ``metric`` stays within this.
        speedup: how many times as fast as the original the result has to be.
        max_latency: milliseconds of one inference, such as 5.0 or "5ms".
        metric: what a tolerance means: "relative-l2", "cosine", "top1", "file.py:function".
        objective: what is made small within a tolerance: "latency" (default), "size", "macs".
        include: globs on node names and torch scopes; only these are factored.
        exclude: the same; these are left dense.
        ops: which forms to factor, such as ("matmul", "gemm") or ("all",).
        constant_inputs: treat initializers that are also graph inputs as constants.
        min_gain: a pair has at most this share of parameters less than its weight, in [-1, 1).
        rank_multiple: chosen ranks are rounded to a multiple of this, "auto": of what is measured
            to suit each layer here; default: what the target of
            ``shape_for`` likes, else 8.
        shape_for: shape the result for "cpu", "arm", "qnn", "nnapi", "coreml", "webgpu" or
            "xnnpack" (``--for``); default: a portable one.
        input_shapes: input -> concrete sizes, for check and timing.
        dims: symbolic dimension -> size, for check and timing.
        data: samples for check and timing, a file or a folder; random input without it.
        labels: a file of the samples' labels, for a metric; default: a key of the data.
        samples: how many samples to check with.
        calibration: samples to fit the factors to: as ``data``, or ``module:callable``,
            ``file.py:callable``, an iterable of feeds, or a CalibrationDataReader.  Without it
            a part of ``data`` is used, and the rest judges.
        calibration_samples: how many samples to fit to.
        calibrate: False fits to the weights alone, whatever data there are.
        mask: input whose zeros mark rows of padding; one with the usual name is found by itself.
        fisher: weigh what each layer loses by what the model's outputs feel of it (Fisher
            information, by derivatives); what has none is fitted to its own outputs, said.
        refit: fit each layer again to what the compressed model gives it.
        save_stats: write the moments of the layers' inputs here, for later runs.
        load_stats: take them from such a file; no samples are run to fit to.
        save_costs: write the latencies measured of single layers here, for later runs.
        load_costs: take them from such a file, also one of another machine.
        allow_slower: keep pairs that make the model slower than the original.
        heal: steps of gradient descent on the factors against the original's outputs, on the
            samples to fit to; a held-out part of them says which step is kept.
        heal_at: values inside, known to both models, that the descent compares beside the
            outputs; by default some that it finds itself.
        seed: of random input, and of the choice among more samples.
        max_error: gate on the mean relative L2 error of every output.
        simplify: run onnxsim first.
        check: compare the outputs with the original's.
        bench: time the result against the original.
        threads: intra-op threads of check and timing; default: one for each physical core.
        ep: execution provider of check and timing.
        dry_run: decide, and change nothing: no rewriting, check or timing.
        progress: shows the stages; default: nothing is shown.

    Returns:
        The compressed model and the report.

    Raises:
        InputError: the model or the data are not what they should be.
        UsageError: an option is out of its range.
        GateError: ``max_error`` or another goal was missed; the report is attached.
    """
    settings = Settings(
        energy=energy,
        rank=rank,
        keep=keep,
        uniform=uniform,
        max_size=max_size,
        tolerance=tolerance,
        speedup=speedup,
        max_latency=max_latency,
        metric=metric,
        objective=objective,
        include=tuple(include),
        exclude=tuple(exclude),
        ops=None if ops is None else tuple(ops),
        constant_inputs=constant_inputs,
        min_gain=min_gain,
        rank_multiple=rank_multiple,
        shape_for=shape_for,
        input_shapes={name: tuple(sizes) for name, sizes in (input_shapes or {}).items()},
        dims=dict(dims or {}),
        data=data,
        labels=labels,
        samples=samples,
        calibration=calibration,
        calibration_samples=calibration_samples,
        calibrate=calibrate,
        mask=mask,
        fisher=fisher,
        refit=refit,
        save_stats=save_stats,
        load_stats=load_stats,
        save_costs=save_costs,
        load_costs=load_costs,
        allow_slower=allow_slower,
        heal=heal,
        heal_at=tuple(heal_at),
        seed=seed,
        max_error=max_error,
        simplify=simplify,
        check=check,
        bench=bench,
        threads=threads,
        ep=ep,
        dry_run=dry_run,
    )
    return execute(model, settings, None, progress or Silent(), OrtLog())
