"""Int8 alone: what ONNX Runtime's dynamic quantization makes of the same model, beside a result."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from onnxruntime.quantization import QuantType, quantize_dynamic

from onnx_lowrank.compression.candidates import TIMED_PAIRS, Candidate
from onnx_lowrank.compression.context import Context
from onnx_lowrank.errors import InputError, named
from onnx_lowrank.evaluation.inside import taken_back
from onnx_lowrank.evaluation.outputs import worst_error
from onnx_lowrank.graph.save import write, written_bytes
from onnx_lowrank.graph.walk import all_nodes, stored_bytes, tensors
from onnx_lowrank.graph.wishes import WISHES
from onnx_lowrank.phrases import size
from onnx_lowrank.ranks.prepared import Prepared
from onnx_lowrank.runtime.providers import CPU
from onnx_lowrank.runtime.saturation import saturates
from onnx_lowrank.schema.measures import Check, Speedup

__all__ = ["LARGEST", "TIMES", "Figured", "beside_int8", "kinds_for", "quantized_alone", "said"]

LARGEST = 1_900_000_000
"""Bytes of weights that fit in the one file that the quantizer is given."""
TIMES = 5
"""Memory that quantizing (3.1 times 539 MB) and running both models takes, by bytes of weights."""
# Float32 weights become no smaller than this share.
_SMALLEST = 0.25
# How much larger, or further off, counts as equal where speed counts too.
_EQUAL = 1.02
# The quantizer is another program, which need not take every model.
_FAILS = (
    *(ArithmeticError, AssertionError, AttributeError, InputError, LookupError, OSError),
    *(RuntimeError, TypeError, ValueError),
)
# What it writes in place of a layer.
_INTEGER = frozenset({"ConvInteger", "DynamicQuantizeLSTM", "MatMulInteger", "QAttention"})


@dataclass(frozen=True)
class Figured:
    """Figures of one of the two models.

    Attributes:
        bytes: of the file.
        error: mean relative L2 error of the worst output, or the loss by the metric.
        speedup: against IN; None where it is not compared.
        metric: what the error is by; None for the relative L2 error.
    """

    bytes: int
    error: float
    speedup: Speedup | None = None
    metric: str | None = None

    def __str__(self) -> str:
        by = "" if self.metric is None else f" by {self.metric}"
        text = f"{self.bytes / 1e6:.3g} MB, off by {self.error:.2g}{by}"
        return text if self.speedup is None else f"{text}, {self.speedup.median:.2f}× as fast"


def beside_int8(
    context: Context, prepared: Prepared, found: Candidate, check: Check | None
) -> str | None:
    """A result beside int8 alone, where it is checked on samples of the user on the CPU.

    Where formats were chosen and timed both stand beside each other.  A result of floats is only
    told where int8 alone is smaller and nearer to the original, and nothing is timed.

    Args:
        context: the run.
        prepared: the model as it was before.
        found: the result.
        check: its outputs against the original's.

    Returns:
        The line, or why the two could not be compared; None where there is nothing to say.
    """
    settings, trial, latency = context.settings, context.trial, found.measured.latency
    real = settings.data is not None or settings.calibration is not None
    if settings.requantize:
        return None  # IN is int8 already
    if check is None or not real or trial.provider is not CPU:
        return None
    if settings.shape_for is not None and not WISHES[settings.shape_for].dynamic_int8:
        return None
    before, after = stored_bytes(prepared.model), found.measured.bytes
    chosen = not prepared.quantized.single
    if chosen:
        if latency is None:
            return None
    elif prepared.quantized.wanted or after <= _SMALLEST * before:
        return None
    other = _other_type(prepared.model)
    if other is not None:
        if after <= before / other.itemsize:
            return None
        return (
            f"not compared with int8 alone: quantize_dynamic takes weights of float32, got "
            f"{other.name.lower()}; on the model in float32 it may do better than this result"
        )
    if before > LARGEST:
        return f"not compared with int8 alone: the model is above {LARGEST // 10**6} MB"
    room = trial.memory.room()
    if room is not None and room < TIMES * before:
        return (
            f"not compared with int8 alone: it takes about {size(TIMES * before)} of memory, "
            f"{size(room)} are left ({named('memory')})"
        )
    judged = None if chosen else found.measured.judged
    kinds = kinds_for(prepared.model) if chosen else kinds_for(prepared.model)[:1]
    known = dict(trial.notes)  # what is noted of the other model is not said of the result
    speedup = None
    steps = TIMED_PAIRS * len(kinds) * chosen + len(trial.samples.feeds)
    with context.stages("int8", steps) as advance:
        try:
            plain = prepared.model.clone()
            taken_back(plain, context.at, context.source.model)
            made = {kind: quantized_alone(plain, context.folder, kind) for kind in kinds}
            files = {kind: path for kind, path in made.items() if path is not None}
            if not files or (not chosen and written_bytes((files[kinds[0]],)) >= after):
                return None
            opened = {kind: trial.open(path) for kind, path in files.items()}
            kind = next(iter(files))
            if chosen:
                times = {k: trial.time(own, TIMED_PAIRS, advance) for k, own in opened.items()}
                speeds = {k: time.speedup for k, time in times.items() if time is not None}
                kind = max(speeds, key=lambda k: speeds[k].median, default=kind)
                speedup = speeds.get(kind)
            path = files[kind]
            session = trial.judged(ir.load(path), opened[kind])
            if judged is not None:
                own, error = judged.loss, trial.judge(session, settings.metric_used).loss
            else:
                own = worst_error(check.providers)[1]
                error = worst_error(trial.check(session, advance).providers)[1]
        except _FAILS as failure:
            why = " ".join(str(failure).split()).replace(f"{context.folder}/", "")
            return f"not compared with int8 alone: {why[:200]}"
        finally:
            trial.notes.clear()
            trial.notes.update(known)
    if not chosen and not error < own:
        return None
    metric = None if judged is None else judged.metric
    return said(
        Figured(written_bytes((path,)), error, speedup, metric),
        Figured(
            after, own, None if speedup is None or latency is None else latency.speedup, metric
        ),
        kind,
    )


def _other_type(model: ir.Model) -> ir.DataType | None:
    """The type of a model's matrices of floats where none of them is of float32; else None."""
    found = [own.dtype for own in tensors(model) if len(own.shape) > 1]
    floats = [kind for kind in found if kind.is_floating_point()]
    return floats[0] if floats and ir.DataType.FLOAT not in floats else None


def kinds_for(model: ir.Model) -> tuple[QuantType, ...]:
    """The kinds of weights to compare with, of those whose products are exact here.

    Signed ones are faster in products; convolutions may be several times slower with them, so that
    a model with some is tried with both.

    Args:
        model: to be quantized.
    """
    if saturates():
        return (QuantType.QUInt8,)
    convolves = any(node.op_type == "Conv" for node in all_nodes(model))
    return (QuantType.QInt8, QuantType.QUInt8) if convolves else (QuantType.QInt8,)


def quantized_alone(model: ir.Model, folder: Path, kind: QuantType) -> Path | None:
    """A model after one call of ``quantize_dynamic``, per channel.

    Args:
        model: whose weights are initializers.
        folder: where the file goes.
        kind: of the weights.

    Returns:
        The file; None if no layer of it was quantized.
    """
    plain = write(model, folder, "before-int8.onnx", "never")[-1]
    path = folder / f"int8-{kind.name}.onnx"
    with _quiet():
        quantize_dynamic(plain, path, per_channel=True, weight_type=kind)
    plain.unlink()
    done = any(node.op_type in _INTEGER for node in all_nodes(ir.load(path)))
    return path if done else None


def said(int8: Figured, own: Figured, kind: QuantType) -> str:
    """Both beside each other, and whether int8 alone is the better choice.

    It is where it is no larger, no further off, and not certainly slower.  Without speeds it has to
    be smaller and nearer.

    Args:
        int8: the model by int8 alone.
        own: the result.
        kind: of the weights of int8 alone.
    """
    how = f"quantize_dynamic, per channel, {kind.name}"
    text = f"int8 alone ({how}): {int8}; this result: {own}"
    verdict = f"{text}; int8 alone is the better choice here"
    if int8.speedup is None or own.speedup is None:
        better = int8.bytes < own.bytes and int8.error < own.error
        return f"{verdict}, but speed was not compared" if better else text
    better = (
        int8.bytes <= _EQUAL * own.bytes
        and int8.error <= _EQUAL * own.error
        and int8.speedup.certain[1] >= own.speedup.certain[0]
    )
    return verdict if better else text


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the quantizer's advice to run its own pre-processing."""
    logger = logging.getLogger()
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before
