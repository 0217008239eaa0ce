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
