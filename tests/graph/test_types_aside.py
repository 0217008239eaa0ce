"""Models with maps and other types that onnx_ir cannot read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import pytest

from onnx_lowrank import compress
from onnx_lowrank.graph.load import load
from onnx_lowrank.graph.serialize import to_proto
from tests.helpers.models import known_rank, uniform

M, N = 32, 24


@pytest.fixture
def classifier(rng: np.random.Generator) -> onnx.ModelProto:
    """As skl2onnx writes a classifier: a label, and a sequence of maps from label to score."""
    model = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["": 17, "ai.onnx.ml": 3]>
        classes (float[n, {M}] x) => (int64[n] label) {{
            h = MatMul (x, W)
            scores = Softmax (h)
            label = ArgMax <axis = 1, keepdims = 0> (scores)
            maps = ai.onnx.ml.ZipMap <classlabels_int64s: ints = {list(range(N))}> (scores)
        }}"""
    )
    model.graph.initializer.append(
        onnx.numpy_helper.from_array(known_rank(M, N, 4, rng, scale=0.125), "W")
    )
    maps = onnx.helper.make_map_type_proto(
        onnx.TensorProto.INT64,
        onnx.helper.make_tensor_type_proto(onnx.TensorProto.FLOAT, []),
    )
    kind = onnx.helper.make_sequence_type_proto(maps)
    model.graph.output.append(onnx.helper.make_value_info("maps", kind))
    onnx.checker.check_model(model, full_check=True)
    return model


def test_a_map_type_is_read_and_written(classifier: onnx.ModelProto) -> None:
    before = classifier.SerializeToString(deterministic=True)
    again = to_proto(load(classifier).model.clone())
    assert again.graph.output == classifier.graph.output
    assert classifier.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 4},
        {"keep": 0.6},
        {"keep": 0.6, "heal": 2},
        {"tolerance": 0.5, "metric": "top1", "objective": "size"},
    ],
    ids=str,
)
def test_a_classifier_with_maps(
    options: dict[str, Any],
    classifier: onnx.ModelProto,
    rng: np.random.Generator,
    tmp_path: Path,
) -> None:
    np.savez(tmp_path / "data.npz", x=uniform((48, M), rng))
    result = compress(
        classifier, data=tmp_path / "data.npz", samples=8, bench=False, simplify=False, **options
    )
    result.save(tmp_path / "out.onnx")
    written = onnx.load(tmp_path / "out.onnx")
    assert written.graph.output == classifier.graph.output
    onnx.checker.check_model(written, full_check=True)
    assert result.report.check is not None
    (provider,) = result.report.check.providers
    compared = {output.name: output for output in provider.outputs}
    assert compared.keys() == {"label", "maps"}
    if "rank" in options:
        assert compared["maps"].relative_l2 < 1e-5


def test_types_in_a_support_report(classifier: onnx.ModelProto, tmp_path: Path) -> None:
    """Shapes are inferred for it, and the types of maps with them."""
    from onnx_lowrank.graph.fixed import fix_shapes

    model = load(classifier).model
    fix_shapes(model, {"x": (3, M)})
    assert to_proto(model).graph.output[1] == classifier.graph.output[1]
    assert [node.op_type for node in model.graph][-1] == "ZipMap"
