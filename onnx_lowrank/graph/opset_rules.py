"""How operators are written anew on the way to a newer opset, one rule for each change.

``Squeeze <axes>(x)  ->  Squeeze(x, axes)``          and others whose attribute is an input now
``Softmax(x)  ->  Reshape(Softmax(Flatten(x)), …)``  where the old one flattened its input
``Upsample(x, s)  ->  Resize(x, , s)``               with what it meant as attributes

The node keeps its name and its outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir

from onnx_lowrank.graph.edits import node_before
from onnx_lowrank.graph.names import Names
from onnx_lowrank.graph.walk import attribute, node_name
from onnx_lowrank.numerics.arrays import Array

__all__ = ["FLATTENED_BELOW", "FLATTENING", "RULES", "Editor", "Rule"]


class Editor:
    """Puts nodes and constants before a node, in whatever graph or function it stands."""

    def __init__(self, model: ir.Model) -> None:
        self._names = Names(model)

    def constant(self, node: ir.Node, array: Array, suffix: str) -> ir.Value:
        """A Constant node with these elements: a function has no initializers."""
        tensor = ir.Tensor(array, name=f"{node_name(node)}.{suffix}")
        held = ir.AttrTensor("value", tensor)
        value = self.before(node, "Constant", [], [held], suffix)
        value.dtype, value.shape = tensor.dtype, ir.Shape(array.shape)
        return value

    def integers(self, node: ir.Node, name: str, *, vector: bool = True) -> ir.Value | None:
        """An attribute of the node, which goes, as a constant of int64; None without."""
        found = node.attributes.pop(name, None)
        if found is None:
            return None
        numbers = found.as_ints() if vector else [found.as_int()]
        return self.constant(node, np.array(numbers, np.int64), name)

    def before(
        self,
        node: ir.Node,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Sequence[ir.Attr] = (),
        suffix: str = "",
    ) -> ir.Value:
        """The output of a new node before another one."""
        new_name = self._names.new
        return node_before(node, op_type, inputs, new_name, suffix, attributes=attributes).outputs[
            0
        ]


@dataclass(frozen=True)
class Rule:
    """One change of an operator.

    Attributes:
        since: the opset from which on the new way of writing holds.
        apply: writes a node the new way, in place.
        attributes: of the node that go.
        refused: why a node cannot be written the new way, as the end of a sentence; None where it
            can.
        becomes: the operator that the node is then; None where it stays the same one.
    """

    since: int
    apply: Callable[[ir.Node, Editor], None]
    attributes: tuple[str, ...] = ()
    refused: Callable[[ir.Node], str | None] = lambda _: None
    becomes: str | None = None


def _set_inputs(node: ir.Node, inputs: Sequence[ir.Value | None]) -> None:
    """Inputs behind those that the node has."""
    known = len(node.inputs)
    while inputs and inputs[-1] is None:
        inputs = inputs[:-1]
    node.resize_inputs(known + len(inputs))
    for index, value in enumerate(inputs, known):
        node.replace_input_with(index, value)


def _move(names: Sequence[str], node: ir.Node, edit: Editor) -> None:
    """Vectors of integers that became inputs."""
    _set_inputs(node, [edit.integers(node, name) for name in names])


def _moved(since: int, *names: str) -> Rule:
    return Rule(since, partial(_move, names), names)


def _top_k(node: ir.Node, edit: Editor) -> None:
    _set_inputs(node, [edit.integers(node, "k", vector=False)])


def _typed(names: Sequence[str], node: ir.Node) -> str | None:
    """Why numbers in the type of the input cannot be written down."""
    x = node.inputs[0]
    known = x is not None and x.dtype is not None
    if known or not any(name in node.attributes for name in names):
        return None
    return "has an input whose type is not known"


def _scalar(node: ir.Node, name: str, edit: Editor) -> ir.Value | None:
    """A float attribute, which goes, in the type of the node's input; None without."""
    if name not in node.attributes:
        return None
    number = node.attributes.pop(name).as_float()
    x = node.inputs[0]
    assert x is not None
    assert x.dtype is not None
    return edit.constant(node, np.array(number).astype(x.dtype.numpy()), name)


def _clip(node: ir.Node, edit: Editor) -> None:
    _set_inputs(node, [_scalar(node, name, edit) for name in ("min", "max")])


def _pad(node: ir.Node, edit: Editor) -> None:
    pads = edit.integers(node, "pads")
    _set_inputs(node, [pads, _scalar(node, "value", edit)])


def _flattened(node: ir.Node, edit: Editor) -> None:
    """Softmax and its like: from opset 13 on they see one axis, before all from one on."""
    axis, x = attribute(node, "axis", 1), node.inputs[0]
    rank = None if x is None or x.shape is None else len(x.shape)
    if axis == -1 or (rank is not None and axis == rank - 1):
        node.attributes["axis"] = ir.AttrInt64("axis", -1)
        return
    shape = edit.before(node, "Shape", [x])
    flat = edit.before(node, "Flatten", [x], [ir.AttrInt64("axis", axis)])
    result = edit.before(node, node.op_type, [flat], [ir.AttrInt64("axis", -1)])
    shape.dtype = ir.DataType.INT64
    if x is not None and x.dtype is not None:
        flat.dtype = result.dtype = x.dtype
    node.op_type = "Reshape"
    node.attributes.clear()
    node.resize_inputs(2)
    node.replace_input_with(0, result)
    node.replace_input_with(1, shape)


def _upsample_scales(node: ir.Node, edit: Editor) -> None:
    scales = node.attributes.pop("scales").as_floats()
    _set_inputs(node, [edit.constant(node, np.array(scales, np.float32), "scales")])


def _renamed(op_type: str, node: ir.Node, _edit: Editor) -> None:
    node.op_type = op_type


def _resized(node: ir.Node, _edit: Editor) -> None:
    """What a Resize of opset 10 meant, in the words of later ones."""
    scales = node.inputs[1]
    node.resize_inputs(3)
    node.replace_input_with(1, None)
    node.replace_input_with(2, scales)
    means = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    for name, value in means.items():
        node.attributes[name] = ir.AttrString(name, value)


def _shrinks(node: ir.Node) -> str | None:
    """A Resize of opset 10 rounds up where it shrinks, which no later mode does."""
    mode = node.attributes.get("mode")
    if node.op_type == "Upsample" or (mode is not None and mode.as_string() != "nearest"):
        return None
    scales = node.inputs[1]
    tensor = None if scales is None else ir.convenience.get_const_tensor(scales)
    if tensor is None or (tensor.numpy() < 1.0).any():
        return "may shrink its input, which later opsets do otherwise"
    return None


def _nothing(_node: ir.Node, _edit: Editor) -> None:
    """The new way is the old one."""


def _dropped(name: str, node: ir.Node, _edit: Editor) -> None:
    node.attributes.pop(name, None)


def _more_outputs(node: ir.Node) -> str | None:
    more = any(v.name and (v.uses() or v.is_graph_output()) for v in node.outputs[1:])
    return "gives more than its first output, which is other then" if more else None


def _first_only(node: ir.Node, _edit: Editor) -> None:
    node.resize_outputs(1)


def _per_element(node: ir.Node) -> str | None:
    spatial = attribute(node, "spatial", 1)
    return None if spatial else "has statistics of each element, which later ones cannot have"


def _same_size(node: ir.Node) -> str | None:
    auto = node.attributes.get("auto_pad")
    same = auto is not None and auto.as_string().startswith("SAME")
    return "has an auto_pad that means something else then" if same else None


def _old_corner(node: ir.Node) -> str | None:
    mode = node.attributes.get("coordinate_transformation_mode")
    gone = mode is not None and mode.as_string() == "tf_half_pixel_for_nn"
    return (
        "has coordinate_transformation_mode tf_half_pixel_for_nn, which is gone" if gone else None
    )


def _regions(node: ir.Node, _edit: Editor) -> None:
    name = "coordinate_transformation_mode"
    node.attributes[name] = ir.AttrString(name, "output_half_pixel")


def _split_count(node: ir.Node, _edit: Editor) -> None:
    """Where the sizes of its parts are not given it says how many there are."""
    if len(node.inputs) < 2 or node.inputs[1] is None:
        node.attributes["num_outputs"] = ir.AttrInt64("num_outputs", len(node.outputs))


FLATTENING, FLATTENED_BELOW = frozenset({"Hardmax", "LogSoftmax", "Softmax"}), 13
"""Operators that saw their input as two axes, before and from one on, and the first opset in which
they do not."""

_REDUCES = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")

RULES: Mapping[str, tuple[Rule, ...]] = {
    "BatchNormalization": (
        Rule(9, partial(_dropped, "spatial"), ("spatial",), _per_element),
        Rule(14, _first_only, (), _more_outputs),
    ),
    "Clip": (Rule(11, _clip, ("min", "max"), partial(_typed, ("min", "max"))),),
    "ConvTranspose": (Rule(11, _nothing, (), _same_size),),
    "Dropout": (
        Rule(10, _nothing, (), _more_outputs),
        Rule(12, partial(_dropped, "ratio"), ("ratio",)),
    ),
    "Pad": (Rule(11, _pad, ("pads", "value"), partial(_typed, ("value",))),),
    "ReduceSum": (_moved(13, "axes"),),
    "Resize": (
        Rule(11, _resized, (), _shrinks),
        Rule(13, _nothing, (), _old_corner),
    ),
    "RoiAlign": (Rule(16, _regions),),
    "Scatter": (Rule(11, partial(_renamed, "ScatterElements"), becomes="ScatterElements"),),
    "Slice": (Rule(10, partial(_move, ("starts", "ends", "axes")), ("starts", "ends", "axes")),),
    "Split": (_moved(13, "split"), Rule(18, _split_count)),
    "Squeeze": (_moved(13, "axes"),),
    "TopK": (Rule(10, _top_k, ("k",)),),
    "Unsqueeze": (_moved(13, "axes"),),
    "Upsample": (
        Rule(9, _upsample_scales, ("scales",)),
        Rule(10, partial(_renamed, "Resize"), becomes="Resize"),
    ),
    **{name: (Rule(FLATTENED_BELOW, _flattened),) for name in sorted(FLATTENING)},
    **{f"Reduce{name}": (_moved(18, "axes"),) for name in _REDUCES},
}
"""The changes of each operator, the oldest first."""
