"""One linear map alone: a model of its node, dense or as a pair, as floats or in a format.

A `Specimen` is the model's own node with its attributes, its weight and other constants as
initializers and everything else as an input of the shape that a run of the whole model showed.  The
pair is what finding and rewriting make of that little model, so no form needs code here.  The
weight is random: times do not depend on its numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnx_lowrank.graph.constant import Constant
from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.graph.elements import constant_value
from onnx_lowrank.graph.names import Names
from onnx_lowrank.graph.opset import raise_opset
from onnx_lowrank.graph.spool import Spool
from onnx_lowrank.maps.emit import Storage, StoredFactor
from onnx_lowrank.maps.find import find
from onnx_lowrank.maps.format_writer import FormatWriter
from onnx_lowrank.maps.formats import SMALLEST, Format
from onnx_lowrank.maps.forms.base import Site
from onnx_lowrank.maps.rewrite import put_pair, remove_unread
from onnx_lowrank.maps.static import ByteStep, rounded_values
from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.numerics.blocks import Blocks
from onnx_lowrank.runtime.taps import Seen

__all__ = ["Specimen"]

# ONNX Runtime knows the type of everything from this version on without inputs for initializers.
_IR_VERSION = 4


@dataclass(frozen=True, eq=False)
class Specimen:
    """What is needed to run one linear map alone.

    Attributes:
        site: the map, in the whole model.
        model: the whole model.
        seen: shapes of the values of its main graph, and contents of those that are no floats.
    """

    site: Site
    model: ir.Model
    seen: Seen

    def dense(self) -> ir.Model:
        """The node alone."""
        operand = self.site.operand
        return self._alone(_random(operand.shape, operand.dtype, self.site.m))

    def pair(self, rank: int) -> ir.Model:
        """The node as a pair of this rank, at most full rank."""
        site = self.site
        # The weight is replaced by a random pair: only the shapes matter.
        nothing = np.zeros((), site.operand.dtype.numpy())
        model = self._alone(np.broadcast_to(nothing, site.operand.shape))
        groups = find(model, Constants(model), [site.form]).groups
        group = next(g for g in groups if g.members[0].site.index == site.index)
        slices, m, n = group.shape
        rank = min(rank, m, n)
        first = _random((slices, m, rank), group.matrix.dtype, m)
        second = _random((slices, rank, n), group.matrix.dtype, rank)
        with Spool() as spool:
            stored = StoredFactor(first, first.shape, "lowrank_A")
            put_pair(model, group, stored, second, Storage(model, Names(model), spool))
        remove_unread(group.matrix.root)
        return model

    def quantized(self, form: Format, rank: int | None = None) -> ir.Model:
        """The node, or its pair of a rank, with weights in a format; of codes that are random.

        Raises:
            InputError: the node means something else in the opset that formats need.
        """
        model = self.dense() if rank is None else self.pair(rank)
        raise_opset(model, form.opset)
        with Spool() as spool:
            writer = FormatWriter(model, spool)
            products = [node for node in model.graph if node.op_type in ("MatMul", "Gemm")]
            written = []
            for node in products:
                m, n = writer.weight(node).shape
                if m >= SMALLEST or rank is None:
                    writer.put([node], _codes(m, n, form), form)
                    written.append(node)
            if form.static:  # how long it takes does not depend on the steps
                steps = dict.fromkeys(rounded_values(written), ByteStep(1.0 / 16.0, 128))
                writer.surround(written, steps)
        return model

    def feed(self) -> dict[str, Array]:
        """One sample: what was seen, or random numbers of the type and shape."""
        given = {}
        for value in self._split()[0]:
            name = value.name or ""
            seen = self.seen.contents.get(name)
            if seen is None:
                assert value.dtype is not None
                seen = _random(self.seen.shapes[name], value.dtype, 1)
            given[name] = seen
        return given

    def _split(self) -> tuple[list[ir.Value], dict[ir.Value, Constant]]:
        """What the node reads beside its weight: what is computed, and the constants."""
        constants = Constants(self.model, force_inputs=True)
        computed: dict[ir.Value, None] = {}
        known: dict[ir.Value, Constant] = {}
        for index, value in enumerate(self.site.node.inputs):
            if value is not None and index != self.site.index:
                constant = constants.resolve(value)
                if isinstance(constant, Constant):
                    known[value] = constant
                else:
                    computed[value] = None
        return list(computed), known

    def _alone(self, weight: Array) -> ir.Model:
        """A model of the node with this weight."""
        node, weight_value = self.site.node, self.site.node.inputs[self.site.index]
        assert weight_value is not None
        computed, known = self._split()
        made = {value: self._value(value) for value in computed}
        held = {
            value: _held(value, constant.numpy().astype(constant.dtype.numpy()))
            for value, constant in known.items()
        }
        held[weight_value] = _held(weight_value, weight)
        made |= held
        copy = ir.Node(
            node.domain,
            node.op_type,
            [None if value is None else made[value] for value in node.inputs],
            list(node.attributes.values()),
            overload=node.overload,
            num_outputs=len(node.outputs),
            name="map",
        )
        outputs = []
        for old, new in zip(node.outputs, copy.outputs, strict=True):
            new.name, new.type = old.name, old.type
            shape = self.seen.shapes.get(old.name or "")
            if old.type is not None and shape is not None:
                new.shape = ir.Shape(shape)
            if old.name and (old.uses() or old.is_graph_output()):
                outputs.append(new)
        graph = ir.Graph(
            [made[value] for value in computed],
            outputs or [copy.outputs[0]],
            nodes=[copy],
            initializers=list(held.values()),
            opset_imports=dict(self.model.opset_imports),
            name="map",
        )
        return ir.Model(graph, ir_version=max(self.model.ir_version, _IR_VERSION))

    def _value(self, value: ir.Value) -> ir.Value:
        name = value.name or ""
        seen = self.seen.contents.get(name)
        dtype = ir.DataType.from_numpy(seen.dtype) if seen is not None else value.dtype
        assert dtype is not None
        return ir.Value(
            name=name, type=ir.TensorType(dtype), shape=ir.Shape(self.seen.shapes[name])
        )


def _held(value: ir.Value, array: Array) -> ir.Value:
    """A constant in place of a value."""
    return constant_value(ir.Tensor(array, name=value.name))


def _random(shape: Sequence[int], dtype: ir.DataType, terms: int) -> Array:
    """Normal numbers, scaled so that sums of so many products stay near 1 in any type."""
    generator = np.random.default_rng(0)
    values = generator.standard_normal(tuple(shape), dtype=np.float32)
    values /= math.sqrt(max(terms, 1))
    return values.astype(dtype.numpy())


def _codes(m: int, n: int, form: Format) -> Blocks:
    """Random codes of a matrix."""
    block = form.rows(m)
    generator = np.random.default_rng(0)
    most = 1 << form.bits - 1
    codes = generator.integers(-most, most, (m, n), np.int8)
    scales = np.full((-(-m // block), n), 1.0 / (most * math.sqrt(m)), np.float16)
    if not form.zeros:
        return Blocks(codes, scales, None, form.bits, block)
    zeros = np.full(scales.shape, most, np.uint8)
    return Blocks((codes + most).astype(np.uint8), scales, zeros, form.bits, block)
