"""Which values of a graph are constants, and how a node reads them.

A weight is an initializer or the output of a Constant node.  A node may read it directly or
through a chain of Transpose, Reshape, Squeeze, Unsqueeze, Flatten, Identity and Cast nodes.
`Constants.resolve` follows that chain and answers with a `Constant`: the root, the layout in
which it is read, and the type it is cast to.  For a constant that cannot be used, the answer is an
`Unusable` with its reason.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_lowrank.errors import named
from onnx_lowrank.graph.constant import FLOAT_FIRST, FLOATS, Constant, Unusable
from onnx_lowrank.graph.layout import Layout
from onnx_lowrank.graph.references import unresolved
from onnx_lowrank.graph.sparse import SparseTensor
from onnx_lowrank.graph.walk import all_nodes, attribute, static_shape

__all__ = ["Constants", "in_chain", "requantized"]


def requantized() -> str:
    """The advice `FLOAT_FIRST` where the weight can also be made floats for the time of a run."""
    return f"{FLOAT_FIRST}, or see {named('requantize', True)}"


# Operators that only move or relabel the elements of their first input.
_CHAIN = frozenset({"Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})

# Types of the codes of a quantized weight.
_CODES = frozenset({ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT4, ir.DataType.UINT4})

_DEQUANTIZERS = frozenset({"DequantizeLinear", "DequantizeBFP", "DequantizeWithOrder"})


def in_chain(node: ir.Node, index: int) -> bool:
    """Whether a node only moves or relabels the elements of the input at this index."""
    return index == 0 and node.op_type in _CHAIN and node.domain in ("", "ai.onnx")


@dataclass
class Constants:
    """Resolver of the constants of one model.

    Attributes:
        model: the model.
        force_inputs: treat initializers that are also graph inputs as constants.
    """

    model: ir.Model
    force_inputs: bool = False
    _function_inputs: dict[ir.Value, str] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        for function in self.model.functions.values():
            for value in function.inputs:
                self._function_inputs[value] = function.name

    def resolve(self, value: ir.Value | None) -> Constant | Unusable | None:
        """What the value is: a constant, one that cannot be used, or (None) computed."""
        if value is None:
            return None
        if value in self._function_inputs:
            return self._argument(value)
        if value.is_initializer():
            return self._initializer(value)
        node = value.producer()
        if node is None or node.domain not in ("", "ai.onnx", "com.microsoft"):
            return None
        if node.op_type == "Constant":
            return self._given(node) if unresolved(node) else _constant_node(node, value)
        if node.op_type in _DEQUANTIZERS:
            return self._dequantized(node)
        if node.op_type == "Mul":
            return self._scaled(node)
        if node.op_type == "Add":
            return self._shifted(node)
        if in_chain(node, 0):
            source = self.resolve(node.inputs[0] if node.inputs else None)
            if isinstance(source, Constant) and (open_ := unresolved(node)):
                return source.unusable(
                    f"is read through {node.op_type}, whose {', '.join(open_)} depends on the call "
                    "of the function around it"
                )
            if isinstance(source, Constant):
                return self._step(node, source)
            return source
        return None

    def literal(self, value: ir.Value | None) -> npt.NDArray[Any] | None:
        """The elements of a small constant such as axes or a shape; None if it is computed."""
        constant = self.resolve(value)
        return constant.numpy() if isinstance(constant, Constant) else None

    def readers(self, root: ir.Value) -> Iterator[tuple[ir.Node | None, int]]:
        """Every (node, input index) that reads the root in the end, through chains.

        A graph output among them is (None, 0).
        """
        if root.is_graph_output():
            yield None, 0
        for use in root.uses():
            node = use.node
            if in_chain(node, use.idx):
                for output in node.outputs:
                    yield from self.readers(output)
            else:
                yield node, use.idx

    def _initializer(self, value: ir.Value) -> Constant | Unusable:
        tensor = value.const_value
        shape = static_shape(tensor.shape if tensor is not None else value.shape)
        size = math.prod(shape) if shape is not None else 0
        name = value.name or ""
        if tensor is None or shape is None:
            return Unusable(name, size, shape, "has no data")
        if value.is_graph_input() and not self.force_inputs:
            return Unusable(
                name,
                size,
                shape,
                "is also a graph input that a caller may override; "
                f"{named('constant_inputs', True)} treats it "
                "as a constant",
            )
        if isinstance(tensor, SparseTensor):
            return _stored_sparse(name, tensor, shape)
        return Constant(value, tensor, Layout.of(shape), tensor.dtype)

    def _argument(self, value: ir.Value) -> Unusable | None:
        """A function's argument: has a reason only if some call passes a constant."""
        function = self._function_inputs[value]
        for node in all_nodes(self.model):
            if node.op_type != function or node.op_identifier() not in self.model.functions:
                continue
            body = self.model.functions[node.op_identifier()]
            index = next((i for i, v in enumerate(body.inputs) if v is value), None)
            if index is None or index >= len(node.inputs):
                continue
            passed = self.resolve(node.inputs[index])
            if isinstance(passed, Constant):
                return passed.unusable(
                    f"is passed as argument {value.name!r} of function {function!r}, whose other "
                    "calls may pass another weight; inline the function first"
                )
        return None

    def _given(self, node: ir.Node) -> Unusable | None:
        """A Constant node in a function whose tensor is an attribute of the function's call."""
        name = unresolved(node)[0]
        source = node.attributes[name].ref_attr_name
        owner = next((f for f in self.model.functions.values() if f.graph is node.graph), None)
        if source is None or owner is None:
            return None
        for call in all_nodes(self.model):
            given = call.attributes.get(source)
            if call.op_identifier() != owner.identifier() or given is None or given.is_ref():
                continue
            if given.type == ir.AttributeType.TENSOR:
                tensor = given.as_tensor()
                return Unusable(
                    node.outputs[0].name or source,
                    tensor.size,
                    static_shape(tensor.shape),
                    f"is attribute {source!r} of a call of function {owner.name!r}; inline the "
                    "function first",
                )
        return None

    def _dequantized(self, node: ir.Node) -> Unusable | None:
        source = self.resolve(node.inputs[0])
        before = None if node.inputs[0] is None else node.inputs[0].producer()
        if source is None and before is not None and before.op_type == "QuantizeLinear":
            trained = self.resolve(before.inputs[0])
            if trained is None:
                return None
            return trained.unusable(
                "is rounded by QuantizeLinear and DequantizeLinear, as quantization-aware "
                f"training leaves it; {FLOAT_FIRST}"
            )
        if source is None:
            return None
        return source.unusable(f"is quantized ({node.op_type}); {requantized()}")

    def _scaled(self, node: ir.Node) -> Unusable | None:
        """Integers, less their zero points or not, and their scales, all of them constant.

        `onnx_lowrank.maps.folded` writes them.
        """
        for value, other in (node.inputs, reversed(node.inputs)):
            cast = None if value is None else value.producer()
            if cast is not None and cast.op_type == "Sub" and self._known(cast.inputs[1]):
                cast = None if cast.inputs[0] is None else cast.inputs[0].producer()
            if cast is None or cast.op_type != "Cast":
                continue
            source = self.resolve(cast.inputs[0])
            if isinstance(source, Constant) and source.dtype in _CODES and self._known(other):
                return source.unusable(f"is quantized (Cast and Mul); {requantized()}")
        return None

    def _shifted(self, node: ir.Node) -> Unusable | None:
        """Integers, their scales and what is added to them, all constant."""
        for value, other in (node.inputs, reversed(node.inputs)):
            product = None if value is None else value.producer()
            if product is not None and product.op_type == "Mul" and self._known(other):
                found = self._scaled(product)
                if found is not None:
                    return found
        return None

    def _known(self, value: ir.Value | None, depth: int = 6) -> bool:
        """Whether a value is computed of constants alone."""
        if value is None or self.resolve(value) is not None:
            return True
        node = value.producer()
        if node is None or not node.inputs or not depth:
            return False
        return all(self._known(own, depth - 1) for own in node.inputs)

    def _step(self, node: ir.Node, source: Constant) -> Constant | Unusable | None:
        """The constant after one more node of its chain."""
        shape = source.shape
        if node.op_type == "Identity":
            return source
        if node.op_type == "Cast":
            number = attribute(node, "to", 0)
            if number not in {kind.value for kind in ir.DataType}:
                return source.unusable(f"is cast to type {number}, which is none")
            to = ir.DataType(number)
            if source.dtype in FLOATS and to in FLOATS:
                return Constant(source.root, source.tensor, source.layout, to)
            return source.unusable(
                f"is stored as {source.dtype.name.lower()} and cast to {to.name.lower()}"
            )
        if node.op_type == "Transpose":
            perm = (
                node.attributes["perm"].as_ints()
                if "perm" in node.attributes
                else tuple(reversed(range(len(shape))))
            )
            if sorted(perm) != list(range(len(shape))):
                return source.unusable(
                    f"has {len(shape)} axes, which a Transpose puts in the order {list(perm)}"
                )
            return source.transpose(*perm)
        new_shape = self._new_shape(node, shape)
        if new_shape is None:
            return None
        if math.prod(new_shape) != source.size:
            return source.unusable(
                f"has shape {shape}, which {node.op_type} cannot make {new_shape}"
            )
        return source.reshape(*new_shape)

    def _new_shape(self, node: ir.Node, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """What Reshape, Flatten, Squeeze or Unsqueeze makes of a shape; None if not constant."""
        if node.op_type == "Flatten":
            axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
            axis = axis + len(shape) if axis < 0 else axis
            return math.prod(shape[:axis]), math.prod(shape[axis:])
        if node.op_type == "Reshape":
            target = self._integers(node, "shape")
            if target is None:
                return None
            keep_zero = "allowzero" in node.attributes and node.attributes["allowzero"].as_int()
            dims = [
                shape[i] if d == 0 and not keep_zero and i < len(shape) else d
                for i, d in enumerate(target)
            ]
            if -1 in dims:
                rest = math.prod(d for d in dims if d != -1)
                dims[dims.index(-1)] = math.prod(shape) // rest if rest else 0
            return tuple(dims)
        axes = self._integers(node, "axes")
        if node.op_type == "Squeeze":
            if axes is None:
                if len(node.inputs) > 1 and node.inputs[1] is not None:
                    return None
                return tuple(d for d in shape if d != 1)
            dropped = {a % len(shape) for a in axes}
            return tuple(d for i, d in enumerate(shape) if i not in dropped)
        if axes is None:
            return None
        rank = len(shape) + len(axes)
        added = {a % rank for a in axes}
        rest_dims = iter(shape)
        return tuple(1 if i in added else next(rest_dims) for i in range(rank))

    def _integers(self, node: ir.Node, name: str) -> tuple[int, ...] | None:
        """Axes or a shape: an attribute in old opsets, the second input in newer ones."""
        if name in node.attributes:
            return tuple(node.attributes[name].as_ints())
        if len(node.inputs) < 2 or node.inputs[1] is None:
            return None
        array = self.literal(node.inputs[1])
        return None if array is None else tuple(int(d) for d in np.atleast_1d(array))


def _constant_node(node: ir.Node, value: ir.Value) -> Constant | Unusable | None:
    if any(attribute.is_ref() for attribute in node.attributes.values()):
        return None  # an attribute of the function around it: not known here
    attribute = node.attributes.get("value")
    if attribute is not None and attribute.type == ir.AttributeType.TENSOR:
        tensor = attribute.as_tensor()
        shape = static_shape(tensor.shape)
        assert shape is not None
        if isinstance(tensor, SparseTensor):
            return _stored_sparse(value.name or "", tensor, shape)
        return Constant(value, tensor, Layout.of(shape), tensor.dtype)
    for name, dtype in (("value_ints", np.int64), ("value_int", np.int64)):
        if name in node.attributes:
            tensor = ir.tensor(np.asarray(node.attributes[name].value, dtype))
            return Constant(value, tensor, Layout.of(tensor.shape.numpy()), tensor.dtype)
    return None


def _stored_sparse(name: str, tensor: SparseTensor, shape: tuple[int, ...]) -> Unusable:
    size = math.prod(shape)
    return Unusable(
        name,
        size,
        shape,
        f"is stored sparse, {tensor.kept} of {size} elements, than which a dense pair may be "
        "larger; store it dense to have it factored",
    )
