"""The map of one node alone, as a model that can be timed."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.numerics.ranks import break_even
from onnx_lowrank.ranks.costs import plan_costs
from onnx_lowrank.ranks.times import CostKey
from tests.helpers.models import TEXT_TYPES, op_types, parse, run_ort, uniform
from tests.helpers.timed import F32, HEAD, groups_of, planned, product

NODES: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    # the node, its inputs (shapes, or values), its constants, and its operator
    "right": ("y = MatMul(x, W)", {"x": (2, 3, 24)}, {"W": (24, 20)}, "MatMul"),
    "left": ("y = MatMul(W, x)", {"x": (24, 3)}, {"W": (20, 24)}, "MatMul"),
    "batch": ("y = MatMul(x, W)", {"x": (4, 3, 24)}, {"W": (4, 24, 20)}, "MatMul"),
    "gemm": (
        "y = Gemm<alpha=0.5, transA=1, transB=1>(x, W, b)",
        {"x": (24, 3)},
        {"W": (20, 24), "b": (20,)},
        "Gemm",
    ),
    "computed bias": ("y = Gemm(x, W, c)", {"x": (3, 24), "c": (20,)}, {"W": (24, 20)}, "Gemm"),
    "einsum": ('y = Einsum<equation="bi,io->bo">(x, W)', {"x": (3, 24)}, {"W": (24, 20)}, "Einsum"),
    "fused": (
        "y = com.microsoft.FusedMatMul<transB=1>(x, W)",
        {"x": (3, 24)},
        {"W": (20, 24)},
        "FusedMatMul",
    ),
    "conv": ("y = Conv<pads=[1,1,1,1]>(x, W)", {"x": (1, 8, 6, 5)}, {"W": (9, 8, 3, 3)}, "Conv"),
    "lstm": (
        "y, _h, _c = LSTM<hidden_size=8>(x, W, R, , lengths)",
        {"x": (4, 2, 24), "lengths": np.array([4, 2], np.int32)},
        {"W": (1, 32, 24), "R": (1, 32, 8)},
        "LSTM",
    ),
    "gather": (
        "y = Gather(W, x)",
        {"x": np.array([[3, 39], [0, 7]])},
        {"W": (40, 24)},
        "Gather",
    ),
    "attention": (
        "y = com.microsoft.Attention<num_heads=2>(x, W, b, mask)",
        {"x": (1, 5, 24), "mask": np.ones((1, 5), np.int32)},
        {"W": (24, 48), "b": (48,)},
        "Attention",
    ),
}


def lone(case: str) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """A model in which the node stands behind others that hide types and sizes, and a sample."""
    rng = np.random.default_rng(1)
    node, inputs, weights, _ = NODES[case]
    feed = {
        f"in_{name}": uniform(size, rng) if isinstance(size, tuple) else size
        for name, size in inputs.items()
    }
    # Where forms need a rank or a size the model tells it, else it tells nothing.
    told = case in ("batch", "conv")
    declared = []
    for name, array in feed.items():
        sizes = [str(size) if told else f"{name}_{axis}" for axis, size in enumerate(array.shape)]
        kind = {"float32": "float"}.get(array.dtype.name, array.dtype.name)
        declared.append(f"{kind}[{', '.join(sizes)}] {name}")
    ahead = "\n".join(f"{name} = Identity(in_{name})" for name in inputs)
    proto = parse(
        f"{HEAD} g ({', '.join(declared)}) => (float[] y) {{ {ahead}\n{node} }}",
        {name: uniform(shape, rng) for name, shape in weights.items()},
    )
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    return proto, feed


@pytest.mark.parametrize("case", NODES)
def test_the_map_alone_is_the_models_node(case: str) -> None:
    proto, feed = lone(case)
    plan, groups = planned(proto, feed)
    assert not plan.unknown
    assert set(plan.keys) == {member.site for group in groups for member in group.members}
    whole = run_ort(proto, feed)["y"]
    for key, specimen in plan.specimens.items():
        dense = specimen.dense()
        assert op_types(dense) == [NODES[case][3]]
        given = specimen.feed()
        # What is no float comes from the run itself: lengths, masks, row numbers.
        for name, array in given.items():
            if array.dtype.kind == "i":
                np.testing.assert_array_equal(array, feed[f"in_{name}"])
            assert array.shape == feed[f"in_{name}"].shape
        before = run_ort(dense, given)
        assert before["y"].shape == whole.shape
        rank = max(1, int(break_even(*key.shape[1:])) // 2)
        pair = specimen.pair(rank)
        after = run_ort(pair, given)
        assert after["y"].shape == whole.shape
        assert len(op_types(pair)) > 1
        slices, m, n = key.shape
        kept = {"b", "R"}
        sizes = [
            int(np.prod(t.dims))
            for t in ir.to_proto(pair).graph.initializer
            if t.name not in kept and t.data_type == onnx.TensorProto.FLOAT
        ]
        assert sum(sizes) == slices * rank * (m + n)


def test_a_weight_behind_a_chain_is_an_initializer_of_the_map() -> None:
    proto = parse(
        f"""{HEAD} g (float[3, 24] x) => (float[3, 20] y) {{
            h = Cast<to=1>(W)
            t = Transpose<perm=[1, 0]>(h)
            y = MatMul(x, t)
        }}""",
        {"W": np.ones((20, 24), np.float16)},
    )
    plan, _ = planned(proto, {"x": np.ones((3, 24), F32)})
    (specimen,) = plan.specimens.values()
    dense = ir.to_proto(specimen.dense())
    assert [list(t.dims) for t in dense.graph.initializer] == [[24, 20]]
    assert dense.graph.initializer[0].data_type == onnx.TensorProto.FLOAT
    assert op_types(specimen.dense()) == ["MatMul"]


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16])
def test_other_float_types(dtype: Any) -> None:
    kind = TEXT_TYPES[np.dtype(dtype)]
    proto = parse(
        f"{HEAD} g ({kind}[N, 24] x) => ({kind}[N, 20] y) {{ y = MatMul(x, W) }}",
        {"W": np.ones((24, 20), dtype)},
    )
    model = ir.from_proto(proto)
    # ONNX Runtime's CPU has no bfloat16: the shapes that it would show, by hand.
    shapes = {"x": (3, 24), "y": (3, 20)}

    def run(copy: ir.Model) -> dict[str, Array]:
        return {
            output.name or "": np.array(shapes[node.inputs[0].name or ""])
            for node in copy.graph
            for output in node.outputs
            if node.op_type == "Shape" and node.inputs[0] is not None
        }

    plan = plan_costs(groups_of(model), model, run)
    (key,), (specimen,) = plan.specimens, plan.specimens.values()
    assert key.inputs[1] == f"{ir.DataType.from_numpy(np.dtype(dtype)).name.lower()}[24, 20] weight"
    assert specimen.feed()["x"].dtype == dtype
    for name, shape in (("A", (24, 4)), ("B", (4, 20))):
        factor = specimen.pair(4).graph.initializers[f"map.lowrank_{name}"].const_value
        assert factor is not None
        assert factor.numpy().shape == shape
        assert factor.numpy().dtype == dtype


def test_maps_that_look_the_same_are_one_key() -> None:
    plan, groups = planned(product(24, 24, layers=3), {"x": np.ones((5, 24), F32)})
    assert len(groups) == 3
    assert list(plan.specimens) == [
        CostKey("matmul-right", "MatMul", ("float[5, 24]", "float[24, 24] weight"), (1, 24, 24))
    ]
    other, _ = planned(product(24, 24), {"x": np.ones((6, 24), F32)})
    assert not set(other.specimens) & set(plan.specimens)


def test_attributes_and_constants_are_in_the_key() -> None:
    found = set()
    for node in ("Gemm(x, W)", "Gemm(x, W, b)", "Gemm<transB=1>(x, W)"):
        proto = parse(
            f"{HEAD} g (float[5, 24] x) => (float[5, 24] y) {{ y = {node} }}",
            {"W": np.ones((24, 24), F32), "b": np.ones(24, F32)},
        )
        found |= set(planned(proto, {"x": np.ones((5, 24), F32)})[0].specimens)
    assert len(found) == 3
