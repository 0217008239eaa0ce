"""The values whose shares of classes a run compares, where its metric is of classes."""

from __future__ import annotations

import onnx_ir as ir

from onnx_lowrank.compression.context import Context
from onnx_lowrank.errors import named
from onnx_lowrank.evaluation.top1 import rows_of_classes

__all__ = ["logits_of"]

_SHARES = ("Softmax", "LogSoftmax")


def logits_of(context: Context, model: ir.Model) -> tuple[str, ...]:
    """The logits of a model: its outputs of classes, or what their softmax reads.

    Args:
        context: the run.
        model: the model, prepared.

    Returns:
        Names of values; none where the metric is not of classes.

    Raises:
        InputError: no output, or more than one, could be the classes.
    """
    metric = context.settings.metric_used
    if not metric.of_classes:
        return ()
    given = context.trial.outputs(model)
    names, _ = rows_of_classes(given, context.trial.reading, metric.text, named("metric"))
    found = {value.name: value for value in model.graph.outputs}
    return tuple(_before_softmax(found[name]) for name in names)


def _before_softmax(output: ir.Value) -> str:
    producer, name = output.producer(), output.name or ""
    if producer is None or producer.op_type not in _SHARES:
        return name
    read = producer.inputs[0]
    return name if read is None or read.producer() is None else read.name or name
