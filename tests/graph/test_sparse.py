"""Constants that are stored sparse go through as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import pytest

from onnx_lowrank import compress, inspect
from onnx_lowrank.errors import InputError
from onnx_lowrank.graph.load import load
from onnx_lowrank.graph.serialize import to_proto
from onnx_lowrank.graph.sparse import SparseTensor
from onnx_lowrank.numerics.arrays import Array
from tests.helpers.models import known_rank, parse, run_ort

HEAD = '<ir_version: 8, opset_import: ["": 17]>'
BESIDE = f"""{HEAD} g (float[n, 48] x) => (float[n, 40] y) {{
    a = MatMul (x, S)
    b = MatMul (a, W)
    y = Add (b, t)
}}"""
INSIDE = f"""{HEAD} g (float[n, 48] x, bool c) => (float[n, 40] y) {{
    a = MatMul (x, W)
    y = If (c) <
        then_branch = t () => (float[n, 40] p) {{ p = MatMul (a, S) }},
        else_branch = e () => (float[n, 40] q) {{ q = Identity (a) }}
    >
}}"""


def matrix(m: int, n: int) -> Array:
    array = np.zeros((m, n), np.float32)
    rng = np.random.default_rng(3)
    array[rng.integers(0, m, 9), rng.integers(0, n, 9)] = rng.standard_normal(9)
    return array


def sparse(array: Array, name: str, *, flat: bool = True) -> onnx.SparseTensorProto:
    places = np.flatnonzero(array) if flat else np.argwhere(array)
    values = array.reshape(-1)[np.flatnonzero(array)]
    return onnx.helper.make_sparse_tensor(
        onnx.numpy_helper.from_array(values, name),
        onnx.numpy_helper.from_array(places.astype(np.int64), f"{name}_places"),
        array.shape,
    )


def beside(*, flat: bool = True) -> onnx.ModelProto:
    """A sparse weight, a sparse bias, and a dense weight that can be factored."""
    model = parse(BESIDE, {"W": known_rank(48, 40, 4, np.random.default_rng(0))})
    model.graph.sparse_initializer.append(sparse(matrix(48, 48), "S", flat=flat))
    model.graph.sparse_initializer.append(sparse(matrix(1, 40), "t", flat=flat))
    return model


def written(model: onnx.ModelProto) -> onnx.ModelProto:
    """As a load and a save leave it."""
    return to_proto(load(model).model)


@pytest.mark.parametrize("flat", [True, False])
def test_what_is_not_factored_stays_sparse(flat: bool, tmp_path: Path) -> None:
    model = beside(flat=flat)
    path = tmp_path / "in.onnx"
    onnx.save(model, path)
    result = compress(path, energy=1.0, bench=False, samples=2, threads=1)
    status = {layer.weight: (layer.status, layer.reason) for layer in result.report.layers}
    assert status["W"][0] == "factored"
    assert status["S"][0] == "dense"
    assert "is stored sparse, 9 of 2304 elements" in status["S"][1]
    assert any("not simplified: it has constants that are stored sparse" in n
               for n in result.report.notes)  # fmt: skip
    result.save(tmp_path / "out.onnx")
    out = onnx.load(tmp_path / "out.onnx")
    assert list(out.graph.sparse_initializer) == list(model.graph.sparse_initializer)
    assert "S" not in [tensor.name for tensor in out.graph.initializer]
    x = {"x": np.random.default_rng(1).standard_normal((3, 48)).astype(np.float32)}
    np.testing.assert_allclose(run_ort(out, x)["y"], run_ort(model, x)["y"], atol=1e-3)
    assert result.report.output.bytes < result.report.input.bytes


def test_a_load_and_a_save_change_nothing(tmp_path: Path) -> None:
    model = beside()
    before = model.SerializeToString(deterministic=True)
    assert written(model).SerializeToString(deterministic=True) == before
    assert model.SerializeToString(deterministic=True) == before
    result = compress(model, energy=1.0, exclude=["*"], simplify=False, check=False, bench=False)
    result.save(tmp_path / "out.onnx", external_data="always")
    out = onnx.load(tmp_path / "out.onnx")
    assert list(out.graph.sparse_initializer) == list(model.graph.sparse_initializer)


def test_a_sparse_constant_in_a_branch(tmp_path: Path) -> None:
    model = parse(INSIDE, {"W": known_rank(48, 40, 4, np.random.default_rng(0))})
    branch = model.graph.node[1].attribute[0].g
    branch.sparse_initializer.append(sparse(matrix(40, 40), "S"))
    assert written(model) == model
    onnx.save(model, tmp_path / "in.onnx")
    result = compress(tmp_path / "in.onnx", energy=1.0, bench=False, samples=2, threads=1)
    assert [layer.status for layer in result.report.layers] == ["factored", "dense"]


def test_a_node_with_a_sparse_value(tmp_path: Path) -> None:
    model = parse(BESIDE, {"W": known_rank(48, 40, 4, np.random.default_rng(0))})
    for name, shape in (("t", (1, 40)), ("S", (48, 48))):
        value = sparse(matrix(*shape), "")
        node = onnx.helper.make_node("Constant", [], [name], sparse_value=value)
        model.graph.node.insert(0, node)
    assert written(model) == model
    onnx.save(model, tmp_path / "in.onnx")
    found = {entry.weight: entry for entry in inspect(tmp_path / "in.onnx").entries}
    assert "is stored sparse" in (found["S"].reason or "")
    result = compress(tmp_path / "in.onnx", energy=1.0, bench=False, samples=2, threads=1)
    assert sum(layer.status == "factored" for layer in result.report.layers) == 1
    kinds = [node.attribute[0].name for node in to_proto(result.model).graph.node[:2]]
    assert kinds == ["sparse_value", "sparse_value"]


def test_its_size_is_that_of_what_is_stored() -> None:
    model = load(beside()).model
    tensor = model.graph.initializers["S"].const_value
    assert isinstance(tensor, SparseTensor)
    assert tensor.kept == 9
    assert tensor.nbytes < 300
    assert np.array_equal(tensor.numpy(), matrix(48, 48))
    assert model.clone().graph.initializers["S"].const_value is tensor


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.indices.CopyFrom(onnx.numpy_helper.from_array(np.arange(3))), "9 elements"),
        (lambda s: s.dims.__setitem__(0, 2), "expected places within shape"),
        (lambda s: s.dims.__setitem__(0, 2**40), "expected a sparse tensor of at most"),
        (lambda s: s.dims.__setitem__(0, -1), "expected a sparse tensor of at most"),
        (lambda s: s.values.ClearField("raw_data"), "damaged"),
        (lambda s: setattr(s.values, "data_location", 1), "external data"),
    ],
)
def test_damage_is_one_line(change: object, message: str) -> None:
    model = beside()
    change(model.graph.sparse_initializer[0])  # type: ignore[operator]
    with pytest.raises(InputError, match=message) as caught:
        load(model)
    assert "'S'" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_branches_may_call_other_values_alike() -> None:
    """A dense and two sparse constants of one name, each in a branch of its own."""

    def branch(kind: str, *, dense: bool) -> onnx.GraphProto:
        array = np.zeros(4, np.float32)
        array[2] = len(kind)
        given: dict[str, Any] = (
            {"value": onnx.numpy_helper.from_array(array)}
            if dense
            else {"sparse_value": sparse(array, "")}
        )
        constant = onnx.helper.make_node("Constant", [], ["w"], **given)
        answer = onnx.helper.make_node("Identity", ["w"], [kind])
        output = onnx.helper.make_tensor_value_info(kind, onnx.TensorProto.FLOAT, [4])
        return onnx.helper.make_graph([constant, answer], kind, [], [output])

    model = parse(
        """<ir_version: 8, opset_import: ["": 17]>
        g (bool c, bool d) => (float[4] p, float[4] q) {
            p = Identity(c)
            q = Identity(d)
        }""",
        {},
    )
    for node, kinds, dense in zip(
        model.graph.node, (("a", "bb"), ("ccc", "dddd")), (True, False), strict=True
    ):
        node.op_type = "If"
        for name, kind, own in zip(
            ("then_branch", "else_branch"), kinds, (False, dense), strict=True
        ):
            node.attribute.append(onnx.helper.make_attribute(name, branch(kind, dense=own)))
    for first in (True, False):
        feed = {"c": np.array(first), "d": np.array(first)}
        before, after = run_ort(model, feed), run_ort(written(model), feed)
        assert {name: array.tolist() for name, array in before.items()} == {
            name: array.tolist() for name, array in after.items()
        }
    assert before["p"][2] == 2
    assert before["q"][2] == 4
