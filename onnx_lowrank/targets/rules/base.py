"""What the rules of one execution provider are: which nodes it takes, and why not the others.

A provider's rules are one module of this package with one class that derives from `Rules`; it is
found by itself.  The rules are those of ONNX Runtime's source for the operators that this package
writes (MatMul, Gemm, Conv) and lists of operator names for the rest: what is said of the rest is
an upper limit.  Fusions that ONNX Runtime makes before it asks a provider are not foreseen.
"""

from __future__ import annotations

import abc
import importlib.resources
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import onnx_ir as ir

from onnx_lowrank.graph.walk import attribute, float_attribute, operator, static_shape

__all__ = ["Graph", "Rules", "listed_operators"]

Shape = tuple[int | None, ...]
_QUANTIZERS = frozenset({"DequantizeLinear", "QuantizeLinear"})
# Nodes whose weight may have a scale for each channel.
_PRODUCTS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})


class Graph:
    """What rules ask of a graph.

    Args:
        model: the model, with the shapes of its values inferred.
    """

    def __init__(self, model: ir.Model) -> None:
        self.model = model

    @cached_property
    def nodes(self) -> tuple[ir.Node, ...]:
        """The nodes of the main graph; Constant nodes, which no provider has to run, left out."""
        return tuple(node for node in self.model.graph if node.op_type != "Constant")

    def rank(self, value: ir.Value | None) -> int | None:
        """Number of axes; None where it is not known."""
        return None if value is None or value.shape is None else len(value.shape)

    def dims(self, value: ir.Value | None) -> Shape | None:
        """Sizes, None for those that are not known."""
        if value is None or value.shape is None:
            return None
        return tuple(dim if isinstance(dim, int) else None for dim in value.shape)

    def constant(self, value: ir.Value | None) -> bool:
        """Whether a value is an initializer that no caller can override, or a Constant's output."""
        if value is None or value.is_graph_input():
            return False
        producer = value.producer()
        return value.is_initializer() or (producer is not None and producer.op_type == "Constant")

    def dynamic(self, node: ir.Node) -> str | None:
        """Name of an input or output whose size is not known; None if all are."""
        for value in (*node.inputs, *node.outputs):
            if value is None or (value.is_initializer() and not value.is_graph_input()):
                continue
            if static_shape(value.shape) is None:
                return value.name or "a value"
        return None

    def dtype(self, value: ir.Value | None) -> ir.DataType | None:
        """Element type; None where it is not known."""
        return None if value is None else value.dtype

    def dequantizer(self, value: ir.Value | None) -> ir.Node | None:
        """The DequantizeLinear that a value comes out of; None where there is none."""
        node = None if value is None else value.producer()
        return node if node is not None and node.op_type == "DequantizeLinear" else None

    def coded(self, value: ir.Value) -> ir.Value | None:
        """What a value is made of by a DequantizeLinear; itself where there is none."""
        node = self.dequantizer(value)
        return value if node is None else node.inputs[0]

    def in_integers(self, node: ir.Node) -> bool:
        """Whether a product or a convolution is one of integers.

        That is how ONNX Runtime sees it where both factors come out of a DequantizeLinear and the
        result goes into one QuantizeLinear and nowhere else.
        """
        if node.op_type not in _PRODUCTS or not all(map(self.dequantizer, node.inputs[:2])):
            return False
        output = node.outputs[0]
        readers = [use.node.op_type for use in output.uses()]
        return readers == ["QuantizeLinear"] and not output.is_graph_output()

    def serves_integers(self, node: ir.Node) -> bool:
        """Whether all that reads what a DequantizeLinear gives are products of integers."""
        uses = node.outputs[0].uses()
        return bool(uses) and all(self.in_integers(use.node) for use in uses)

    def scales(self, node: ir.Node) -> int | None:
        """How many scales a QuantizeLinear or DequantizeLinear has; None where not known."""
        shape = static_shape(node.inputs[1].shape) if node.inputs[1] is not None else None
        return None if shape is None else math.prod(shape)


@dataclass(frozen=True)
class Gemm:
    """The attributes of a Gemm, and of a MatMul as one."""

    alpha: float = 1.0
    beta: float = 1.0
    trans_a: bool = False
    trans_b: bool = False

    @classmethod
    def of(cls, node: ir.Node) -> Gemm:
        """Of a node."""
        if node.op_type == "MatMul":
            return cls()
        return cls(
            float_attribute(node, "alpha", 1.0),
            float_attribute(node, "beta", 1.0),
            bool(attribute(node, "transA", 0)),
            bool(attribute(node, "transB", 0)),
        )

    def scaled(self) -> str | None:
        """Why a provider that takes only plain products refuses it."""
        if self.alpha != 1.0 or self.beta != 1.0:
            return f"alpha and beta must be 1, they are {self.alpha:g} and {self.beta:g}"
        return "transA must be 0" if self.trans_a else None


class Rules(abc.ABC):
    """Which nodes an execution provider takes."""

    name: ClassVar[str]
    """How it is called on the command line and in tables."""
    static: ClassVar[bool] = False
    """Whether it takes only nodes all of whose sizes are known."""
    max_rank: ClassVar[int | None] = None
    """Largest number of axes."""
    blocks: ClassVar[bool] = False
    """Whether it takes QuantizeLinear and DequantizeLinear with scales of blocks (opset 21)."""
    asked: ClassVar[bool] = True
    """Whether it has rules at all; without, it took whatever was tried."""

    @abc.abstractmethod
    def operators(self) -> frozenset[str] | None:
        """Names of the operators it knows, others' domains in front (``com.microsoft:Gelu``).

        None where it takes all of them.
        """

    def refusal(self, graph: Graph, node: ir.Node) -> str | None:
        """The rule that leaves a node to the CPU; None if the provider takes it."""
        domain = f"{operator(node)[0]}:".lstrip(":")
        known = self.operators()
        if known is not None and f"{domain}{node.op_type}" not in known:
            return f"{domain}{node.op_type} is not among its operators"
        if not domain:
            rule = {"MatMul": self.product, "Gemm": self.product, "Conv": self.convolution}.get(
                node.op_type
            )
            why = None if rule is None else rule(graph, node)
            if why is not None:
                return why
        if node.op_type in _QUANTIZERS:
            why = self.quantizer(graph, node)
            if why is not None:
                return why
        if self.static:
            dynamic = graph.dynamic(node)
            if dynamic is not None:
                return f"static shapes only, {dynamic} has a size that is not known"
        if self.max_rank is not None:
            for value in (*node.inputs, *node.outputs):
                rank = graph.rank(value)
                if rank is not None and rank > self.max_rank:
                    return f"at most {self.max_rank} axes, one value has {rank}"
        return None

    def product(self, graph: Graph, node: ir.Node) -> str | None:
        """The rule that refuses a MatMul or Gemm; None if none does."""
        del graph, node
        return None

    def convolution(self, graph: Graph, node: ir.Node) -> str | None:
        """The rule that refuses a Conv; None if none does."""
        del graph, node
        return None

    def quantizer(self, graph: Graph, node: ir.Node) -> str | None:
        """The rule that refuses a QuantizeLinear or DequantizeLinear; None if none does."""
        del graph
        block = attribute(node, "block_size", 0)
        if block and not self.blocks:
            return f"a scale for a tensor or a channel only, not for blocks of {block}"
        return None


def bias_is_vector(graph: Graph, node: ir.Node) -> bool | None:
    """Whether C of a Gemm is a vector of N; None where there is no C."""
    c = node.inputs[2] if len(node.inputs) > 2 else None
    if c is None:
        return None
    shape, output = graph.dims(c), graph.dims(node.outputs[0])
    return shape is not None and len(shape) == 1 and (output is None or shape[0] == output[-1])


def only_floats(graph: Graph, node: ir.Node) -> str | None:
    """Why A is no float32 or float16."""
    dtype = graph.dtype(node.inputs[0])
    if dtype in (None, ir.DataType.FLOAT, ir.DataType.FLOAT16):
        return None
    return f"float32 and float16 only, A is {dtype.name.lower()}"


def two_dimensional(graph: Graph, node: ir.Node) -> str | None:
    """Why a provider that takes only matrices refuses a product."""
    for label, value in zip("AB", node.inputs, strict=False):
        rank = graph.rank(value)
        if rank is None:
            return f"2-D only, the rank of {label} is not known"
        if rank != 2:
            return f"2-D only, {label} has {rank} axes"
    return None


def spatial_axes(graph: Graph, node: ir.Node) -> int | None:
    """Number of spatial axes of a Conv; None where it is not known."""
    rank = graph.rank(node.inputs[1]) if len(node.inputs) > 1 else None
    return None if rank is None else rank - 2


def constant_weights(graph: Graph, node: ir.Node, what: Mapping[int, str]) -> str | None:
    """Why a provider refuses a node some of whose inputs are not constant."""
    for index, label in what.items():
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is not None and not graph.constant(value):
            return f"{label} must be constant"
    return None


def listed_operators(file: str) -> frozenset[str]:
    """The operators of a list in ONNX Runtime's package, see its mobile usability checker.

    Raises:
        FileNotFoundError: this ONNX Runtime has no such list.
    """
    folder: Any = importlib.resources.files("onnxruntime.tools.mobile_helpers")
    names: list[str] = []
    for line in folder.joinpath(file).read_text(encoding="utf-8").splitlines():
        cells: Sequence[str] = line.strip().split("|")
        if len(cells) < 4 or not line.startswith("|"):
            continue
        # One list has a dot where the others have a colon, and another writes Argmax.
        name = cells[1].strip().replace("ai.onnx.R", "ai.onnx:R").replace("Argmax", "ArgMax")
        if ":" in name:
            names.append(name.removeprefix("ai.onnx:"))
    return frozenset(names)
