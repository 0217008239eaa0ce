"""Every form of MatMul and Gemm: the nodes that it becomes, and the same outputs.

The weights are exactly of rank 4, so a pair of rank 4 is the same map.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.defs
import onnxruntime as ort
import pytest

from onnx_lowrank import UsageError
from onnx_lowrank.maps.forms import all_forms, chosen_forms
from tests.helpers.models import (
    as_proto,
    assert_same,
    assert_valid,
    factored,
    known_rank,
    linear_model,
    op_types,
    parameters,
    parse,
    run_ort,
    uniform,
)
from tests.helpers.products import GEMM, MATMUL, RANK, Case, M, N

NEWEST = onnx.defs.onnx_opset_version()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(11)


def check_rewritten(
    case: Case, model: onnx.ModelProto, rng: np.random.Generator, **judges: Any
) -> onnx.ModelProto:
    """Factor it at its rank and compare everything that can be; the result."""
    dtype = onnx.helper.tensor_dtype_to_np_dtype(model.graph.initializer[0].data_type)
    # A type that ONNX Runtime cannot run leaves the check out, with a note.
    result = factored(model, rank=RANK, check=True, samples=1)
    (layer,) = result.report.layers
    assert (layer.status, layer.form, layer.rank) == ("factored", case.form, RANK)
    assert layer.shape == (M, N)
    after = as_proto(result.model)
    assert tuple(op_types(after)) == case.ops
    slices = int(np.prod(case.batch, dtype=int))
    assert layer.slices == slices
    assert layer.parameters_before == slices * M * N
    assert layer.parameters_after == slices * RANK * (M + N)
    assert parameters(model) - parameters(after) == slices * (M * N - RANK * (M + N))
    assert "W" not in {tensor.name for tensor in after.graph.initializer}
    assert after.graph.node[-1].output == model.graph.node[-1].output
    assert_valid(after)
    assert_same(model, after, case.feeds(rng, dtype), **judges)
    return after


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", MATMUL)
def test_matmul(name: str, dtype: type, rng: np.random.Generator) -> None:
    check_rewritten(MATMUL[name], MATMUL[name].model(rng, dtype), rng)


@pytest.mark.parametrize("name", GEMM)
def test_gemm(name: str, rng: np.random.Generator) -> None:
    case = GEMM[name]
    before = case.model(rng)
    after = check_rewritten(case, before, rng)
    kept = {a.name: onnx.helper.get_attribute_value(a) for a in after.graph.node[-1].attribute}
    given = {a.name: onnx.helper.get_attribute_value(a) for a in before.graph.node[-1].attribute}
    moved = "transB" if case.form == "gemm-left" else "transA"
    assert {**kept, moved: 0} == {**given, moved: 0}
    assert not kept.get(moved, 0)
    assert after.graph.node[-1].input[2:] == before.graph.node[-1].input[2:]


OTHER_TYPES = {
    "matmul right": MATMUL["right, 3-D"],
    "matmul left": MATMUL["left"],
    "gemm right": GEMM["right transA=1 transB=1 C[N] scaled"],
    "gemm left": GEMM["left transA=0 transB=0 C[N] plain"],
}


@pytest.mark.parametrize("name", OTHER_TYPES)
@pytest.mark.parametrize("dtype", [np.float64, np.float16, ml_dtypes.bfloat16])
def test_types(name: str, dtype: type, rng: np.random.Generator) -> None:
    case = OTHER_TYPES[name]
    before = case.model(rng, dtype)
    # ONNX Runtime has no bfloat16 MatMul on the CPU; the Gemm of onnx.reference multiplies
    # alpha in float32 and so turns float16 and bfloat16 into it.
    after = check_rewritten(
        case,
        before,
        rng,
        in_ort=dtype is not ml_dtypes.bfloat16,
        in_reference="scaled" not in case.node or dtype is np.float64,
    )
    kinds = {tensor.data_type for tensor in after.graph.initializer}
    assert kinds == {before.graph.initializer[0].data_type}


@pytest.mark.parametrize("opset", range(7, NEWEST + 1))
@pytest.mark.parametrize("name", ["matmul", "gemm"])
def test_opsets(name: str, opset: int, rng: np.random.Generator) -> None:
    case = MATMUL["right"] if name == "matmul" else GEMM["right transA=1 transB=1 C[N] plain"]
    model = case.model(rng, opset=opset)
    try:
        run_ort(model, case.feeds(rng))
        known = True
    except ort.capi.onnxruntime_pybind11_state.Fail:  # an opset newer than this ONNX Runtime
        known = False
    after = check_rewritten(case, model, rng, in_ort=known)
    assert [(item.domain, item.version) for item in after.opset_import] == [("", opset)]


# --- what is refused, with its reason

REFUSED = {
    "a vector": ("y = MatMul(x, W)", (3, M), (3,), (M,), "W: a vector has no factors"),
    "a batch applied to a vector": (
        "y = MatMul(x, W)",
        (M,),
        (3, N),
        (3, M, N),
        "a batch of weights applied to a single vector",
    ),
    "a batch applied to what has no shape": (
        "z = Reshape(x, s)\n y = MatMul(z, W)",
        (7, M),
        (3, 7, N),
        (3, M, N),
        "unknown number of axes",
    ),
    "two constants": (
        "z = MatMul(W, K)\n y = Add(x, z)",
        (M, 5),
        (M, 5),
        (M, N),
        "both operands are constant",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, rng: np.random.Generator) -> None:
    nodes, x, y, shape, reason = REFUSED[name]
    weights = {"W": uniform(shape, rng)}
    if "K" in nodes:
        weights["K"] = uniform((N, 5), rng)
    inputs = f"float{list(x)} x" + (", int64[k] s" if "s)" in nodes else "")
    model = parse(
        f"""<ir_version: 8, opset_import: ["": 17]>
        one ({inputs}) => (float{list(y)} y) {{ {nodes} }}""",
        weights,
    )
    result = factored(model, rank=1)
    (layer,) = result.report.layers
    assert layer.status == "dense"
    assert layer.rank is None
    assert reason.removeprefix("W: ") in layer.reason
    assert layer.parameters_before == layer.parameters_after > 0
    assert parameters(result.model) == parameters(model)


@pytest.mark.parametrize("side", ["x, W", "W, x"])
def test_a_leading_axis_of_length_one_applied_to_a_vector(
    side: str, rng: np.random.Generator
) -> None:
    shape = (M, N) if side == "x, W" else (N, M)
    model = parse(
        f"""<ir_version: 8, opset_import: ["": 17]>
        one (float[{M}] x) => (float[1, {N}] y) {{ y = MatMul({side}) }}""",
        {"W": known_rank(*shape, RANK, rng, batch=(1,))},
    )
    result = factored(model, rank=RANK)
    assert_same(model, result.model, {"x": uniform((M,), rng)})


def test_integer_weights_are_no_linear_map_to_factor(rng: np.random.Generator) -> None:
    model = parse(
        f"""<ir_version: 8, opset_import: ["": 17]>
        one (int32[3, {M}] x) => (int32[3, {N}] y) {{ y = MatMul(x, W) }}""",
        {"W": rng.integers(-3, 4, (M, N)).astype(np.int32)},
    )
    (layer,) = factored(model, rank=1).report.layers
    assert "has type int32" in layer.reason


# --- the list of forms


def test_every_form_has_its_own_name_and_says_what_it_looks_at() -> None:
    forms = all_forms()
    names = [form.name for form in forms]
    assert len(set(names)) == len(names)
    assert {"matmul-left", "matmul-right", "gemm-left", "gemm-right"} <= set(names)
    assert all(form.targets for form in forms)
    assert len({type(form) for form in forms}) == len(forms)


def test_ops_choose_forms() -> None:
    assert {form.ops for form in chosen_forms(("gemm",))} == {"gemm"}
    every = {form.ops for form in all_forms()}
    assert {form.ops for form in chosen_forms(("all",))} == every - {"hidden", "heads"}
    default = {form.ops for form in chosen_forms(None)}
    assert default == {form.ops for form in chosen_forms(("default",))}
    assert {"matmul", "gemm"} <= default
    both = {form.ops for form in chosen_forms(("default", "gemm"))}
    assert both == default


def test_an_unknown_op_is_an_error_that_lists_the_known() -> None:
    with pytest.raises(UsageError, match=r"ops=…: expected all, default or some of .*gemm.*'gem'"):
        chosen_forms(("gem",))


def test_a_form_that_is_not_chosen_is_left_alone(rng: np.random.Generator) -> None:
    model = linear_model(known_rank(M, N, RANK, rng))
    result = factored(model, rank=RANK, ops=("gemm",))
    (layer,) = result.report.layers
    assert layer.status == "dense"
    assert "ops=" in layer.reason
    assert op_types(result.model) == ["MatMul"]
