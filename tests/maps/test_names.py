"""Every name that ``inspect`` shows chooses its node in a run, simplified or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from onnx import TensorProto

import onnx_lowrank
from onnx_lowrank import compress
from onnx_lowrank.compression.result import Result
from onnx_lowrank.graph.constant import Constant
from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.graph.load import load
from onnx_lowrank.graph.walk import all_nodes, node_name
from onnx_lowrank.numerics.arrays import Array
from tests.helpers.models import uniform
from tests.helpers.onnxsim_here import onnxsim_here

__all__ = ["onnxsim_here"]

D = 12
SCOPES = "pkg.torch.onnx.name_scopes"
make_node = onnx.helper.make_node


class Drawn:
    """A graph that grows by what exporters write, each with names that onnxsim likes to change."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.last, self.count = "x", 0

    def weight(self, *shape: int) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(onnx.numpy_helper.from_array(uniform(shape, self.rng), name))
        return name

    def node(self, op_type: str, inputs: list[str], named: bool, **attributes: Any) -> str:
        self.count += 1
        output = f"v{self.count}"
        name = f"block{self.count}/{op_type}" if named else ""
        self.nodes.append(make_node(op_type, inputs, [output], name=name, **attributes))
        if named and self.count % 2:
            entry = self.nodes[-1].metadata_props.add()
            entry.key, entry.value = SCOPES, f"['', 'block{self.count}']"
        return output

    def grow(self, kind: str, named: bool) -> None:
        x = self.last
        if kind == "linear":
            product = self.node("MatMul", [x, self.weight(D, D)], named)
            self.last = self.node("Add", [product, self.weight(D)], named)
        elif kind == "gemm":
            turned = self.node("Transpose", [self.weight(D, D)], named, perm=[1, 0])
            self.last = self.node("Gemm", [x, turned, self.weight(D)], named)
        elif kind == "attention":
            q, k, v = (self.node("MatMul", [x, self.weight(D, D)], named) for _ in range(3))
            self.last = self.node("Mul", [self.node("Add", [q, k], named), v], named)
        elif kind == "twins":
            shared = self.weight(D, D)
            pair = [self.node("MatMul", [x, shared], named) for _ in range(2)]
            self.last = self.node("Add", pair, named)
        elif kind == "convolution":
            self.nodes.append(make_node("Constant", [], [f"s{self.count}"], value_ints=[-1, D, 1]))
            image = self.node("Reshape", [x, f"s{self.count}"], named)
            mapped = self.node("Conv", [image, self.weight(D, D, 1)], named)
            rest = [self.weight(D) for _ in range(3)]
            self.weights.append(
                onnx.numpy_helper.from_array(np.full(D, 2, np.float32), f"var{self.count}")
            )
            normal = self.node("BatchNormalization", [mapped, *rest, f"var{self.count}"], named)
            self.last = self.node("Squeeze", [normal, self.axes()], named)
        elif kind == "constant":
            tensor = onnx.numpy_helper.from_array(uniform((D, D), self.rng), "")
            self.nodes.append(make_node("Constant", [], [f"k{self.count}"], value=tensor))
            self.last = self.node("MatMul", [x, f"k{self.count}"], named)
        elif kind == "scaled":
            scaled = self.node("Mul", [self.weight(D, D), self.weight(1)], named)
            self.last = self.node("MatMul", [x, scaled], named)
        self.last = self.node("Tanh", [self.node("Identity", [self.last], named)], named)

    def axes(self) -> str:
        name = f"axes{self.count}"
        self.weights.append(onnx.numpy_helper.from_array(np.array([2]), name))
        return name

    def model(self) -> onnx.ModelProto:
        self.nodes.append(make_node("Identity", [self.last], ["y"]))
        graph = onnx.helper.make_graph(
            self.nodes,
            "drawn",
            [onnx.helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, D])],
            [onnx.helper.make_tensor_value_info("y", TensorProto.FLOAT, [3, D])],
            self.weights,
        )
        return onnx.helper.make_model(
            graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8
        )


KINDS = ("linear", "gemm", "attention", "twins", "convolution", "constant", "scaled")
blocks = st.lists(st.tuples(st.sampled_from(KINDS), st.booleans()), min_size=1, max_size=4)


def drawn(parts: list[tuple[str, bool]], seed: int = 0) -> onnx.ModelProto:
    grown = Drawn(seed)
    for kind, named in parts:
        grown.grow(kind, named)
    return grown.model()


def shown(model: onnx.ModelProto, folder: Path) -> list[str]:
    """The names that ``inspect`` shows."""
    onnx.save(model, folder / "in.onnx")
    found = onnx_lowrank.inspect(folder / "in.onnx")
    return [entry.name for entry in found.entries]


def constants(model: Any, name: str) -> list[Array]:
    """The matrices that the node of this name reads."""
    loaded = model if not isinstance(model, onnx.ModelProto) else load(model).model
    resolver = Constants(loaded)
    (node,) = [node for node in all_nodes(loaded) if node_name(node) == name]
    found = [resolver.resolve(value) for value in node.inputs]
    return [c.numpy() for c in found if isinstance(c, Constant) and len(c.shape) > 1]


def run(model: onnx.ModelProto, **options: Any) -> Result:
    return compress(model, rank=2, min_gain=-1, bench=False, samples=1, ops=["all"], **options)


@pytest.mark.usefixtures("onnxsim_here")
@settings(
    max_examples=12,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(parts=blocks, data=st.data())
def test_what_is_shown_can_be_excluded(
    parts: list[tuple[str, bool]], data: st.DataObject, tmp_path_factory: Any
) -> None:
    model = drawn(parts)
    names = shown(model, tmp_path_factory.mktemp("drawn"))
    assume(names)
    name = data.draw(st.sampled_from(names))
    result = run(model, exclude=[name])
    layers = {layer.name: layer for layer in result.report.layers}
    if name in layers:
        assert layers[name].rank is None
        assert repr(name) in layers[name].reason
        before, after = constants(model, name), constants(result.model, name)
        for array, kept in zip(before, after, strict=True):
            turned = array.shape == kept.T.shape and (array == kept.T).all()
            assert turned or np.array_equal(array, kept)
    else:  # a twin: what it was merged into stays for its sake
        assert any(f"{name!r} is merged into it" in layer.reason for layer in layers.values())
    assert set(layers) <= set(names) | {n for n in layers if "scaled" in dict(parts)}


@pytest.mark.usefixtures("onnxsim_here")
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_shown_can_be_included(kind: str, tmp_path: Path) -> None:
    model = drawn([("linear", True), (kind, True)], seed=3)
    for name in shown(model, tmp_path)[1:2]:
        result = run(model, include=[name])
        factored = [layer.name for layer in result.report.layers if layer.rank is not None]
        assert factored in ([name], []), result.report.notes
        assert factored or kind == "twins"
