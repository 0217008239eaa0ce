"""Everything but the factored nodes stays exactly as it was, field by field in the protobuf."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.defs
import onnx.helper
import onnx.numpy_helper
import onnx_ir as ir
import pytest

from onnx_lowrank import compress
from tests.helpers.models import as_proto, factored
from tests.helpers.places import CACHE
from tests.helpers.untouched import MARK, RANK, D, assert_untouched, by_name, outcome, rich

NEWEST = onnx.defs.onnx_opset_version()
NEWEST_IR = int(onnx.IR_VERSION)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(17)


@pytest.mark.parametrize("saved", [False, True], ids=["memory", "file"])
@pytest.mark.parametrize("opset", range(7, NEWEST + 1))
def test_every_opset(opset: int, saved: bool, rng: np.random.Generator, tmp_path: Path) -> None:
    model = rich(rng, opset)
    assert_untouched(model, outcome(model, tmp_path, saved=saved), ["fc"], ["W"])


@pytest.mark.parametrize("saved", [False, True], ids=["memory", "file"])
@pytest.mark.parametrize("version", range(3, NEWEST_IR + 1))
def test_every_ir_version(
    version: int, saved: bool, rng: np.random.Generator, tmp_path: Path
) -> None:
    model = rich(rng, version=version)
    after = outcome(model, tmp_path, saved=saved)
    assert after.ir_version == version
    assert_untouched(model, after, ["fc"], ["W"])
    if version < 4:  # where an initializer has to be an input, the factors are Constant nodes
        names = [node.op_type for node in after.graph.node if MARK in node.output[0]]
        assert names == ["Constant", "Constant", "MatMul"]


def test_nothing_to_do_changes_nothing(rng: np.random.Generator, tmp_path: Path) -> None:
    model = rich(rng)
    before = model.SerializeToString()
    result = factored(model, rank=RANK, exclude=["*"])
    assert_untouched(model, as_proto(result.model), [], [])
    assert model.SerializeToString() == before


def test_the_new_node_carries_the_old_ones_metadata(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    after = outcome(rich(rng), tmp_path, saved=False)
    nodes = by_name(after.graph.node)
    own = {entry.key: entry.value for entry in nodes["fc"].metadata_props}
    new = {entry.key: entry.value for entry in nodes["fc.lowrank"].metadata_props}
    assert new == {**own, "onnx_lowrank.pair": "fc"}
    values = by_name(after.graph.value_info)
    shape = values[nodes["fc.lowrank"].output[0]].type.tensor_type.shape
    assert [dim.dim_param or dim.dim_value for dim in shape.dim] == ["batch", RANK]


def test_metadata_of_a_tensor(rng: np.random.Generator, tmp_path: Path) -> None:
    model = rich(rng)
    entry = model.graph.initializer[1].metadata_props.add()
    entry.key, entry.value = "note", "kept"
    after = outcome(model, tmp_path, saved=True)
    assert_untouched(model, after, ["fc"], ["W"])


def test_metadata_of_an_initializers_value(rng: np.random.Generator, tmp_path: Path) -> None:
    # torch's dynamo exporter says there which parameter of the module it is.
    model = rich(rng)
    value = onnx.helper.make_tensor_value_info("b", onnx.TensorProto.FLOAT, [D])
    entry = value.metadata_props.add()
    entry.key, entry.value = "pkg.torch.onnx.original_node_name", "p_bias"
    model.graph.value_info.append(value)
    after = outcome(model, tmp_path, saved=True)
    assert by_name(after.graph.value_info).get("b") == value


def test_an_annotation_of_the_weight_goes_with_it(rng: np.random.Generator, tmp_path: Path) -> None:
    after = outcome(rich(rng), tmp_path, saved=True)
    named = {annotation.tensor_name for annotation in after.graph.quantization_annotation}
    assert named == {"b", "x"}


@pytest.mark.parametrize(
    "name",
    [
        "magika",
        "mlp-sklearn",
        "vit",
        pytest.param("captcha", marks=pytest.mark.slow),
        pytest.param("minilm-l3", marks=pytest.mark.slow),
        pytest.param("minilm-l6-dynamo", marks=pytest.mark.slow),
        pytest.param("ppocrv5-rec", marks=pytest.mark.slow),
    ],
)
def test_real_models(name: str, tmp_path: Path) -> None:
    path = CACHE / f"{name}.onnx"
    if not path.is_file():
        pytest.skip(f"{name} is not here: python models/get.py {name}")
    result = compress(path, keep=0.5, simplify=False, check=False, bench=False)
    layers = [layer for layer in result.report.layers if layer.status == "factored"]
    assert layers
    result.save(tmp_path / "out.onnx")
    assert_untouched(
        onnx.load(path),
        onnx.load(tmp_path / "out.onnx"),
        {layer.name for layer in layers},
        {layer.weight for layer in layers},
    )


def test_an_ir_model_keeps_what_a_protobuf_keeps(rng: np.random.Generator) -> None:
    model = rich(rng)
    result = factored(ir.from_proto(model), rank=RANK)
    assert_untouched(model, as_proto(result.model), ["fc"], ["W"])
