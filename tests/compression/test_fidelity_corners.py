"""Functions, domains, types and tensors of rare kinds stay exactly as they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.defs
import onnx.helper
import onnx.numpy_helper
import pytest

from onnx_lowrank import InputError, compress
from tests.helpers.models import all_node_protos, known_rank, parse, run_ort, uniform
from tests.helpers.untouched import RANK, D, assert_untouched, outcome, rich


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(17)


# --- functions


def with_functions(rng: np.random.Generator) -> onnx.ModelProto:
    model = parse(
        f"""<ir_version: 10, opset_import: ["": 18, "local": 1, "com.example": 2]>
        g (float[N, {D}] x) => (float[N, {D}] y) {{
            h = local.block <slope = 0.5> (x)
            m = MatMul(h, W)
            y = local.outer(m)
        }}
        <domain: "local", opset_import: ["": 18, "com.example": 2], doc_string: "a block">
        block <slope, other: float = 2.0> (a) => (b) {{
            t = LeakyRelu <alpha: float = @slope> (a)
            u = LeakyRelu <alpha: float = @other> (t)
            b = Identity(u)
        }}
        <domain: "local", opset_import: ["": 18, "local": 1]>
        outer (a) => (b) {{ b = local.block <slope = 0.25> (a) }}""",
        {"W": known_rank(D, D, RANK, rng)},
    )
    for index, node in enumerate(all_node_protos(model)):
        node.name = f"n{index}"
    entry = model.functions[0].metadata_props.add()
    entry.key, entry.value = "note", "kept"
    value = onnx.helper.make_tensor_value_info("t", onnx.TensorProto.FLOAT, ["N", D])
    model.functions[0].value_info.append(value)
    return model


def test_functions(rng: np.random.Generator, tmp_path: Path) -> None:
    model = with_functions(rng)
    after = outcome(model, tmp_path, saved=True)
    assert_untouched(model, after, ["n1"], ["W"])
    feeds = {"x": uniform((3, D), rng)}
    np.testing.assert_allclose(
        run_ort(after, feeds)["y"], run_ort(model, feeds)["y"], rtol=1e-4, atol=1e-4
    )


def test_overloaded_functions(rng: np.random.Generator, tmp_path: Path) -> None:
    model = parse(
        f"""<ir_version: 10, opset_import: ["": 18, "local": 1]>
        g (float[N, {D}] x) => (float[N, {D}] y) {{
            h = local.act:one (x)
            m = MatMul(h, W)
            y = local.act:two (m)
        }}
        <domain: "local", overload: "one", opset_import: ["": 18]> act (a) => (b) {{ b = Relu(a) }}
        <domain: "local", overload: "two", opset_import: ["": 18]> act (a) => (b) {{ b = Tanh(a) }}
        """,
        {"W": known_rank(D, D, RANK, rng)},
    )
    for index, node in enumerate(model.graph.node):
        node.name = f"n{index}"
    after = outcome(model, tmp_path, saved=True)
    assert_untouched(model, after, ["n1"], ["W"])


# --- corners of the container


def test_the_default_domain_by_its_long_name(rng: np.random.Generator, tmp_path: Path) -> None:
    model = parse(
        f"""<ir_version: 8, opset_import: ["ai.onnx": 17]>
        g (float[N, {D}] x) => (float[N, {D}] y) {{ h = Relu(x)  y = ai.onnx.MatMul(h, W) }}""",
        {"W": known_rank(D, D, RANK, rng)},
    )
    after = outcome(model, tmp_path, saved=True)
    onnx.checker.check_model(after)
    feeds = {"x": uniform((3, D), rng)}
    np.testing.assert_allclose(
        run_ort(after, feeds)["y"], run_ort(model, feeds)["y"], rtol=1e-4, atol=1e-4
    )


def test_a_domain_that_is_imported_twice(rng: np.random.Generator, tmp_path: Path) -> None:
    # skl2onnx writes such models.
    model = parse(
        f"""<ir_version: 8, opset_import: ["": 17, "ai.onnx.ml": 1]>
        g (float[N, {D}] x) => (float[N, {D}] y) {{ y = MatMul(x, W) }}""",
        {"W": known_rank(D, D, RANK, rng)},
    )
    model.opset_import.append(onnx.helper.make_opsetid("", 17))
    after = outcome(model, tmp_path, saved=True)
    assert {(i.domain, i.version) for i in after.opset_import} == {("", 17), ("ai.onnx.ml", 1)}


def test_a_graph_that_imports_no_default_domain(rng: np.random.Generator, tmp_path: Path) -> None:
    model = parse(
        f"""<ir_version: 8, opset_import: ["com.microsoft": 1]>
        g (float[N, {D}] x) => (float[N, {D}] y) {{ y = com.microsoft.FusedMatMul(x, W) }}""",
        {"W": known_rank(D, D, RANK, rng)},
    )
    after = outcome(model, tmp_path, saved=True)
    onnx.checker.check_model(after)
    feeds = {"x": uniform((3, D), rng)}
    np.testing.assert_allclose(
        run_ort(after, feeds)["y"], run_ort(model, feeds)["y"], rtol=1e-4, atol=1e-4
    )


def test_types_that_are_no_tensors(rng: np.random.Generator, tmp_path: Path) -> None:
    model = parse(
        f"""<ir_version: 8, opset_import: ["": 17]>
        g (float[N, {D}] x, seq(float[N]) parts, optional(float[2]) maybe)
        => (float[N, {D}] y, int64 count) {{
            y = MatMul(x, W)
            count = SequenceLength(parts)
        }}""",
        {"W": known_rank(D, D, RANK, rng)},
    )
    model.graph.node[0].name, model.graph.node[1].name = "fc", "length"
    after = outcome(model, tmp_path, saved=True)
    assert_untouched(model, after, ["fc"], ["W"])


def test_tensors_of_every_type_and_way_of_storing(rng: np.random.Generator, tmp_path: Path) -> None:
    model = rich(rng)
    for kind in (
        onnx.TensorProto.STRING,
        onnx.TensorProto.BOOL,
        onnx.TensorProto.INT4,
        onnx.TensorProto.UINT8,
        onnx.TensorProto.INT64,
        onnx.TensorProto.FLOAT8E4M3FN,
        onnx.TensorProto.BFLOAT16,
        onnx.TensorProto.COMPLEX64,
    ):
        values: list[Any] = [b"a", b"b"] if kind == onnx.TensorProto.STRING else [1, 0]
        tensor = onnx.helper.make_tensor(f"t{kind}", kind, [2], values)
        model.graph.initializer.append(tensor)
    after = outcome(model, tmp_path, saved=True)
    assert_untouched(model, after, ["fc"], ["W"])


# --- numbers near the ends of float32


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "options",
    [
        {"energy": 1.0, "weights": "4"},
        {"keep": 0.5, "weights": "8", "refit": True, "effort": "quick"},
        {"keep": 0.5, "effort": "quick"},
    ],
    ids=["4 bits", "8 bits", "pairs"],
)
@pytest.mark.parametrize(("weight", "inputs"), [(1e37, 1.0), (1e7, 1e28)])
def test_weights_and_inputs_whose_squares_are_beyond_float32(
    weight: float, inputs: float, options: dict[str, Any], rng: np.random.Generator
) -> None:
    """As near to the original as the same model of ordinary numbers, and no warning of numpy."""
    first, second = (known_rank(D, D, D, rng) / 8 for _ in range(2))
    plain = parse(
        f"""<ir_version: 10, opset_import: ["": 21]>
        g (float[N, {D}] x) => (float[N, {D}] y) {{
            h = MatMul(x, W)
            t = Relu(h)
            y = MatMul(t, V)
        }}""",
        {"W": first, "V": second},
    )
    far = onnx.ModelProto()
    far.CopyFrom(plain)
    for tensor, scale in zip(far.graph.initializer, (inputs, weight), strict=True):
        array = onnx.numpy_helper.to_array(tensor) * np.float32(scale)
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    data = [{"x": uniform((1, D), rng)} for _ in range(80)]
    reports = [
        compress(model, data=data, bench=False, simplify=False, **options).report
        for model in (plain, far)
    ]
    lost = [report.check.providers[0].outputs[0].relative_l2 for report in reports if report.check]
    assert lost[0] is not None
    assert lost[1] is not None
    # Without what the outputs feel, which has no number here, other ranks may be chosen.
    assert lost[1] <= 1.5 * lost[0] + 1e-3
    for report in reports:
        if report.goal is not None:
            assert np.isfinite(report.goal.predicted_damage or 0.0)


@pytest.mark.filterwarnings("error")
def test_outputs_whose_squares_are_beyond_float32_are_not_healed(rng: np.random.Generator) -> None:
    """No error of them is called 0."""
    model = parse(
        f"""<ir_version: 10, opset_import: ["": 21]>
        g (float[N, {D}] x) => (float[N, {D}] y) {{ y = MatMul(x, W) }}""",
        {"W": known_rank(D, D, D, rng) * np.float32(1e30)},
    )
    data = [{"x": uniform((1, D), rng)} for _ in range(40)]
    with pytest.raises(InputError, match=r"heal=…: the squares of 'y' leave the range of float32"):
        compress(model, data=data, rank=4, heal=3, bench=False, simplify=False)
