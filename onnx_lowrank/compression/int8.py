"""Int8 alone: what ONNX Runtime's dynamic quantization makes of the same model, beside a result."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from onnxruntime.quantization import QuantType, quantize_dynamic

from onnx_lowrank.compression.candidates import TIMED_PAIRS, Candidate
from onnx_lowrank.compression.context import Context
from onnx_lowrank.errors import InputError
from onnx_lowrank.evaluation.outputs import worst_error
from onnx_lowrank.graph.save import write, written_bytes
from onnx_lowrank.graph.walk import stored_bytes
from onnx_lowrank.measures import Check, Speedup
from onnx_lowrank.ranks.prepared import Prepared
from onnx_lowrank.runtime.providers import CPU

__all__ = ["Figured", "beside_int8", "said"]

# The quantizer holds the model as one protobuf.
_LARGEST = 1_500_000_000
# How much larger, or further off, counts as equal.
_EQUAL = 1.02


@dataclass(frozen=True)
class Figured:
    """Figures of one of the two models.

    Attributes:
        bytes: of the file.
        error: mean relative L2 error of the worst output.
        speedup: against IN.
    """

    bytes: int
    error: float
    speedup: Speedup

    def __str__(self) -> str:
        size = f"{self.bytes / 1e6:.3g} MB"
        return f"{size}, off by {self.error:.2g}, {self.speedup.median:.2f}× as fast"


def beside_int8(
    context: Context, prepared: Prepared, found: Candidate, check: Check | None
) -> str | None:
    """A result beside int8 alone, and whether that is the better choice; None where not compared.

    Compared are results whose formats were chosen, where they are checked and timed.

    Args:
        context: the run.
        prepared: the model as it was before.
        found: the result.
        check: its outputs against the original's.
    """
    own = found.measured.latency
    if prepared.quantized.single or own is None or check is None:
        return None
    if context.trial.provider is not CPU:
        return None
    if stored_bytes(prepared.model) > _LARGEST:
        return "not compared with int8 alone: the model is above 1.5 GB"
    trial = context.trial
    with context.stages("int8", TIMED_PAIRS + len(trial.samples.feeds)) as advance:
        try:
            plain = write(prepared.model.clone(), context.folder, "before-int8.onnx", "never")[-1]
            path = context.folder / "int8.onnx"
            with _quiet():
                quantize_dynamic(plain, path, per_channel=True, weight_type=QuantType.QUInt8)
            session = trial.open(path)
            other = trial.check(session, advance)
            latency = trial.time(session, TIMED_PAIRS, advance)
        except (InputError, OSError, ValueError, RuntimeError) as error:
            return f"not compared with int8 alone: {' '.join(str(error).split())[:200]}"
    if latency is None:
        return None
    theirs, ours = (worst_error(one.providers)[1] for one in (other, check))
    return said(
        Figured(written_bytes((path,)), theirs, latency.speedup),
        Figured(found.measured.bytes, ours, own.speedup),
    )


def said(int8: Figured, own: Figured) -> str:
    """Both beside each other, and whether int8 alone is the better choice.

    It is where it is no larger, no further off, and not certainly slower.

    Args:
        int8: the model by int8 alone.
        own: the result.
    """
    better = (
        int8.bytes <= _EQUAL * own.bytes
        and int8.error <= _EQUAL * own.error
        and int8.speedup.certain[1] >= own.speedup.certain[0]
    )
    text = f"int8 alone (quantize_dynamic, per channel, QUInt8): {int8}; this result: {own}"
    return f"{text}; int8 alone is the better choice here" if better else text


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
