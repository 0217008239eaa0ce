"""Writing new nodes and factors into a graph: the machinery that all forms share.

A form asks for the factors in the shape in which its node wants them.  The first request decides
how a factor is stored; a node that reads the same factor another way gets a Transpose or Reshape
of what is stored, so that a constant which several nodes share is never stored twice.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_lowrank.graph.constant import Constant
from onnx_lowrank.graph.edits import become, node_before
from onnx_lowrank.graph.elements import constant_value
from onnx_lowrank.graph.layout import Layout
from onnx_lowrank.graph.names import Names
from onnx_lowrank.graph.spool import Spool
from onnx_lowrank.graph.walk import node_name

__all__ = ["PAIR", "Emitter", "Factor", "Pair", "Storage", "StoredFactor"]


PAIR = "onnx_lowrank.pair"
"""Metadata of the nodes before a pair's second one: the name of that node."""


@dataclass(eq=False)
class StoredFactor:
    """One factor of a constant: its array until it is stored, then the values that read it."""

    array: npt.NDArray[Any] | None
    shape: tuple[int, ...]
    suffix: str
    _values: dict[Hashable, ir.Value] = field(default_factory=dict)
    _stored: Layout | None = None


@dataclass(frozen=True, eq=False)
class Factor:
    """A factor as a form wants to read it."""

    source: StoredFactor
    layout: Layout

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape as it is read."""
        return self.layout.shape

    def transpose(self, *perm: int) -> Factor:
        """The same factor, transposed further."""
        return Factor(self.source, self.layout.transpose(*perm))

    def reshape(self, *shape: int) -> Factor:
        """The same factor, reshaped further."""
        return Factor(self.source, self.layout.reshape(*shape))


@dataclass(frozen=True, eq=False)
class Pair:
    """The pair of one site: ``first`` is ``A[e, m, k]`` and ``second`` is ``B[e, k, n]``."""

    first: Factor
    second: Factor
    rank: int

    @classmethod
    def of(cls, first: StoredFactor, second: StoredFactor, *, transposed: bool) -> Pair:
        """The pair of a site that reads the constant as it was factored, or transposed."""
        a = Factor(first, Layout.of(first.shape))
        b = Factor(second, Layout.of(second.shape))
        rank = first.shape[2]
        if transposed:  # (A·B)ᵀ = Bᵀ·Aᵀ
            return cls(b.transpose(0, 2, 1), a.transpose(0, 2, 1), rank)
        return cls(a, b, rank)


@dataclass(frozen=True)
class TypedShape:
    """Type and shape of a value that has no tensor."""

    dtype: ir.DataType
    shape: tuple[int, ...]


class Storage:
    """Puts constants, and what is derived from them alone, where a model can keep them.

    They belong to the graph that owns the constant they replace, and have its kind: an initializer
    or a Constant node, so that other tools treat all weights alike.  A function body has no
    initializers, and before IR version 4 every initializer is an input that a caller may override:
    Constant nodes there.
    """

    def __init__(self, model: ir.Model, names: Names, spool: Spool) -> None:
        self.names = names
        self._spool = spool
        self._bodies = {id(function.graph) for function in model.functions.values()}
        self._old = model.ir_version < 4
        self._last: dict[int, ir.Node] = {}

    def store(
        self, graph: ir.Graph, array: npt.NDArray[Any], name: str, *, in_node: bool
    ) -> ir.Value:
        """A new constant of the graph; ``in_node`` asks for a Constant node."""
        name = self.names.new(name)
        tensor = self._spool.store(array, name)
        if not (in_node or self._old or id(graph) in self._bodies):
            value = constant_value(tensor)
            graph.register_initializer(value)
            return value
        return self.derive(
            graph,
            "Constant",
            [],
            [ir.AttrTensor("value", tensor)],
            name,
            TypedShape(tensor.dtype, array.shape),
        )

    def derive(
        self,
        graph: ir.Graph,
        op_type: str,
        inputs: Sequence[ir.Value],
        attributes: Sequence[ir.Attr],
        name: str,
        like: TypedShape,
    ) -> ir.Value:
        """A value at the head of the graph that depends on constants only."""
        node = ir.Node("", op_type, list(inputs), attributes, name=name)
        value = node.outputs[0]
        value.name, value.dtype, value.shape = name, like.dtype, ir.Shape(like.shape)
        last, first = self._last.get(id(graph)), next(iter(graph), None)
        if last is not None and last.graph is graph:  # else something has removed it
            graph.insert_after(last, node)
        elif first is not None:
            graph.insert_before(first, node)
        else:
            graph.append(node)
        self._last[id(graph)] = node
        return value

    def new_name(self, wanted: str) -> str:
        """A name that nothing has yet."""
        return self.names.new(wanted)


class Emitter:
    """Writes the nodes of one site's chain, just before the site's node, marked as its pair."""

    def __init__(self, node: ir.Node, operand: Constant, storage: Storage) -> None:
        self._node, self._operand = node, operand
        self._storage = storage
        self._base = node_name(node)
        owner = _owner(operand)
        assert owner is not None
        self._owner: ir.Graph = owner
        self._in_node = operand.root.producer() is not None

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        *,
        shape: ir.Shape | None,
        attributes: Sequence[ir.Attr] = (),
        dtype: ir.DataType | None = None,
        domain: str = "",
        suffix: str = "lowrank",
    ) -> ir.Value:
        """A new node before the site's, with the site's metadata; its output."""
        new = node_before(
            self._node,
            op_type,
            inputs,
            self._storage.new_name,
            suffix,
            domain=domain,
            attributes=attributes,
            dtype=dtype or self._operand.dtype,
            shape=shape,
            metadata={**self._node.metadata_props, PAIR: self._base},
        )
        return new.outputs[0]

    def factor(self, factor: Factor) -> ir.Value:
        """The value that holds a factor in the wanted layout and the weight's type."""
        stored = self._stored(factor)
        wanted = self._operand.dtype
        if stored.dtype == wanted:
            return stored
        key = (factor.layout.key, wanted)
        values = factor.source._values
        if key not in values:
            values[key] = self._storage.derive(
                self._owner,
                "Cast",
                [stored],
                [ir.AttrInt64("to", int(wanted))],
                self._storage.new_name(f"{stored.name}_cast"),
                TypedShape(wanted, factor.shape),
            )
        return values[key]

    def transposed(self, value: ir.Value | None, transpose: int) -> ir.Value:
        """The matrix, or a Transpose of it where asked for."""
        assert value is not None
        if not transpose:
            return value
        shape = None if value.shape is None else ir.Shape(list(reversed(list(value.shape))))
        return self.node(
            "Transpose",
            [value],
            shape=shape,
            attributes=[ir.AttrInt64s("perm", [1, 0])],
            suffix="lowrank_transpose",
        )

    def integers(self, values: Sequence[int], suffix: str) -> ir.Value:
        """A constant vector of int64, such as a shape."""
        return self._storage.store(
            self._owner,
            np.array(values, np.int64),
            f"{self._base}.{suffix}",
            in_node=self._in_node,
        )

    def replace(self, index: int, value: ir.Value) -> None:
        """Let the site's node read another value."""
        self._node.replace_input_with(index, value)

    def become(self, op_type: str, inputs: Sequence[ir.Value]) -> None:
        """Turn the site's node into another of ONNX's own operators, without attributes."""
        become(self._node, op_type, inputs)

    def reset(self, name: str) -> None:
        """Set an integer attribute of the site's node to 0 where it is not."""
        attributes = self._node.attributes
        if name in attributes and attributes[name].as_int():
            attributes[name] = ir.AttrInt64(name, 0)

    def _stored(self, factor: Factor) -> ir.Value:
        source, key = factor.source, factor.layout.key
        if source._stored is None:
            assert source.array is not None
            array = np.ascontiguousarray(factor.layout.apply(source.array))
            source._values[key] = self._storage.store(
                self._owner, array, f"{self._base}.{source.suffix}", in_node=self._in_node
            )
            source._stored, source.array = factor.layout, None
        if key not in source._values:
            source._values[key] = self._derived(factor)
        return source._values[key]

    def _derived(self, factor: Factor) -> ir.Value:
        """Transpose and Reshape nodes from the stored layout to the wanted one."""
        source = factor.source
        assert source._stored is not None
        value = source._values[source._stored.key]
        assert value.dtype is not None
        shape = source._stored.shape
        for step in source._stored.inverse().then(factor.layout).shortest().steps:
            if step.kind == "transpose":
                shape = tuple(shape[axis] for axis in step.argument)
                op_type, inputs = "Transpose", [value]
                attributes = [ir.AttrInt64s("perm", step.argument)]
            else:
                shape = step.argument
                op_type, attributes = "Reshape", []
                inputs = [value, self.integers(shape, "lowrank_shape")]
            name = self._storage.new_name(f"{value.name}_{op_type.lower()}")
            value = self._storage.derive(
                self._owner, op_type, inputs, attributes, name, TypedShape(value.dtype, shape)
            )
        return value


def _owner(constant: Constant) -> ir.Graph | None:
    producer = constant.root.producer()
    return constant.root.graph if producer is None else producer.graph
