"""Which outputs of a model look like a classifier's: rows of logits, scores or probabilities.

An output does if it is a float [..., classes] with at least two classes that is computed, through
operators that leave its last axis alone, by

    Softmax or LogSoftmax along the last axis, or Exp(x) / ReduceSum(Exp(x)), which is the same
    Gemm, or MatMul with a constant on the right, with or without a bias
    a classifier of ai.onnx.ml

or if its name tells so.  An embedding does not: a norm, a mean or an activation gives it, or its
name tells so.
"""

from __future__ import annotations

import re

import onnx_ir as ir

__all__ = ["classifier_outputs"]

_YES = re.compile(r"logit|prob|score|softmax|label", re.IGNORECASE)
_NO = re.compile(r"embed|hidden|feature|box|coord|offset|regress|pooler|proj", re.IGNORECASE)
_FLOATS = frozenset(
    {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE}
)
_PASSING = frozenset(
    {"Cast", "Dropout", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
)
_ML_CLASSIFIERS = frozenset({"LinearClassifier", "SVMClassifier", "TreeEnsembleClassifier"})


def classifier_outputs(model: ir.Model) -> frozenset[str]:
    """Names of the outputs for which the place of the largest element is the answer."""
    opset = model.graph.opset_imports.get("", 0)
    return frozenset(
        output.name
        for output in model.graph.outputs
        if output.name and _is_classifier(output, output.name, opset)
    )


def _is_classifier(output: ir.Value, name: str, opset: int) -> bool:
    if output.dtype is not None and output.dtype not in _FLOATS:
        return False
    if not isinstance(output.type, ir.TensorType):
        return bool(_YES.search(name))
    # Some exporters declare a scalar where they mean a shape that they do not know.
    shape = output.shape if output.shape is not None and len(output.shape) else None
    classes = shape[-1] if shape is not None else None
    if (shape is not None and len(shape) < 2) or (isinstance(classes, int) and classes < 2):
        return False
    if _YES.search(name):
        return True
    if _NO.search(name):
        return False
    width = _made_by_classifier(output, opset)
    if width is None or width == 1:
        return False
    # The widths differ where a Reshape on the way split or merged the last axis.
    return not (isinstance(classes, int) and width > 0 and width != classes)


def _made_by_classifier(value: ir.Value, opset: int) -> int | None:
    """Size of the last axis where a classifier's head makes it, 0 if not known; None: no head."""
    node = value.producer()
    while node is not None and node.op_type in _PASSING:
        source = node.inputs[0]
        if source is None or not _keeps_last_axis(node, source):
            return None
        value, node = source, source.producer()
    if node is None:
        return None
    if node.op_type in ("Softmax", "LogSoftmax"):
        return _last(value) if _along_last_axis(node, value, opset) else None
    if node.op_type == "Div":
        return _last(value) if _is_softmax_in_parts(node) else None
    if node.op_type in _ML_CLASSIFIERS:
        return _last(value) if value is node.outputs[-1] else None
    if node.op_type == "Add":
        # Only a bias: the sum of two computed values is a residual.
        for source, other in (node.inputs, node.inputs[::-1]):
            head = source.producer() if source is not None else None
            if head is not None and head.op_type == "MatMul" and _is_constant(other):
                node = head
                break
    if node.op_type == "Gemm":
        return _weight_width(node.inputs[1], 0 if node.attributes.get_int("transB", 0) else -1)
    if node.op_type == "MatMul" and _is_constant(node.inputs[1]):
        return _weight_width(node.inputs[1], -1)
    return None


def _keeps_last_axis(node: ir.Node, source: ir.Value) -> bool:
    if node.op_type != "Transpose":
        return True  # the widths are compared at the end
    perm = node.attributes.get_ints("perm", None) if "perm" in node.attributes else None
    if perm is None:
        return source.shape is not None and len(source.shape) < 2
    return perm[-1] == len(perm) - 1


def _along_last_axis(node: ir.Node, value: ir.Value, opset: int) -> bool:
    axis = node.attributes.get_int("axis", -1 if opset >= 13 else 1)
    if axis == -1:
        return True
    if value.shape is not None and len(value.shape):  # a declared scalar is no known shape
        return axis == len(value.shape) - 1
    # Before opset 13 the default, 1, means the last axis of the usual [rows, classes].
    return opset < 13


def _is_softmax_in_parts(node: ir.Node) -> bool:
    """Whether a Div is Exp(x) / ReduceSum(Exp(x), axis), as tf2onnx and JAX write a softmax."""
    numerator, total = node.inputs
    exp = numerator.producer() if numerator is not None else None
    if exp is None or exp.op_type != "Exp":
        return False
    reduce = total.producer() if total is not None else None
    while reduce is not None and reduce.op_type in ("Expand", "Reshape", "Unsqueeze"):
        total = reduce.inputs[0]
        reduce = total.producer() if total is not None else None
    if reduce is None or reduce.op_type != "ReduceSum" or reduce.inputs[0] is not numerator:
        return False
    if "axes" in reduce.attributes:
        axes = list(reduce.attributes.get_ints("axes"))
    else:
        given = reduce.inputs[1] if len(reduce.inputs) > 1 else None
        tensor = ir.convenience.get_const_tensor(given) if given is not None else None
        axes = tensor.numpy().reshape(-1).tolist() if tensor is not None else []
    if len(axes) != 1:
        return False
    shape = numerator.shape if numerator is not None else None
    # Where the rank is not known, any axis but the batch's may be the last.
    return axes[0] in (-1, len(shape) - 1) if shape is not None else axes[0] != 0


def _is_constant(value: ir.Value | None) -> bool:
    while value is not None and value.const_value is None and not value.is_initializer():
        node = value.producer()
        if node is None or node.op_type == "Constant":
            return node is not None
        # A Transpose, Cast or dequantization of a constant is one, a sum of constants rarely.
        if node.op_type not in ("Cast", "DequantizeLinear", "Identity", "Reshape", "Transpose"):
            return False
        value = node.inputs[0]
    return value is not None


def _weight_width(weight: ir.Value | None, axis: int) -> int:
    shape = weight.shape if weight is not None else None
    size = shape[axis] if shape is not None and len(shape) > 1 else 0
    return size if isinstance(size, int) else 0


def _last(value: ir.Value) -> int:
    size = value.shape[-1] if value.shape is not None and len(value.shape) else 0
    return size if isinstance(size, int) and size > 0 else 0
