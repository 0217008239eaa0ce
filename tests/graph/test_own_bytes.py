"""What onnx.checker, or ONNX Runtime, rejects in a file as it stands on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import pytest

from onnx_lowrank import InputError, compress
from onnx_lowrank.graph.load import load
from tests.helpers.models import linear_model, parse, uniform

OPTIONS = {"rank": 2, "check": False, "bench": False, "simplify": False}


def model(rng: np.random.Generator) -> onnx.ModelProto:
    return parse(
        """<ir_version: 8, opset_import: ["": 17]>
        two (float[n, 8] x, bool c) => (float[n, 8] y) {
            h = MatMul (x, W)
            r = Relu (h)
            y = If (c) <
                then_branch = g () => (float[n, 8] a) { a = MatMul (r, V) },
                else_branch = g () => (float[n, 8] b) { b = Identity (r) }
            >
        }""",
        {"W": uniform((8, 8), rng), "V": uniform((8, 8), rng)},
    )


def again(proto: onnx.ModelProto) -> None:
    """A second W, as a tool leaves it that appends what is there already."""
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((8, 8), np.float32), "W"))


def again_in_branch(proto: onnx.ModelProto) -> None:
    branch = proto.graph.node[2].attribute[0].g
    for _ in range(2):
        branch.initializer.append(onnx.numpy_helper.from_array(np.ones((8, 8), np.float32), "U"))


def input_twice(proto: onnx.ModelProto) -> None:
    proto.graph.input.append(proto.graph.input[0])


def output_twice(proto: onnx.ModelProto) -> None:
    proto.graph.node.insert(1, onnx.helper.make_node("Neg", ["x"], ["h"]))


def output_and_initializer(proto: onnx.ModelProto) -> None:
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((8, 8), np.float32), "h"))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (again, "'W' twice"),
        (again_in_branch, "'U' twice"),
        (input_twice, "'x' twice"),
        (output_twice, "'h' twice"),
        (output_and_initializer, "'h'"),
    ],
)
@pytest.mark.parametrize("large", [False, True])
def test_two_things_of_one_name_are_refused(
    damage: Callable[[onnx.ModelProto], None],
    named: str,
    large: bool,
    rng: np.random.Generator,
    tmp_path: Path,
) -> None:
    proto = model(rng)
    damage(proto)
    if large:  # those that the checker does not get to see
        proto.graph.initializer.append(
            onnx.numpy_helper.from_array(np.ones((256, 256), np.float32), "big")
        )
    path = tmp_path / "in.onnx"
    onnx.save(proto, path)
    with pytest.raises(InputError, match=named) as caught:
        load(path)
    assert "in.onnx" in str(caught.value)


def wrong_type(proto: onnx.ModelProto) -> None:
    (attribute,) = proto.graph.node[0].attribute
    attribute.type = onnx.AttributeProto.INT


def two_fields(proto: onnx.ModelProto) -> None:
    tensor = proto.graph.initializer[1]
    tensor.float_data.extend([1.0] * 8)


def no_type(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].attribute[0].ClearField("type")


def wrong_operator(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].op_type = "NoSuchOperator"


@pytest.mark.parametrize("damage", [wrong_type, two_fields, wrong_operator])
def test_what_nobody_accepts_is_refused(
    damage: Callable[[onnx.ModelProto], None], rng: np.random.Generator, tmp_path: Path
) -> None:
    proto = parse(
        """<ir_version: 8, opset_import: ["": 17]>
        one (float[n, 8] x) => (float[n, 8] y) { y = Gemm <alpha = 0.5> (x, W, b) }""",
        {"W": uniform((8, 8), rng), "b": uniform((8,), rng)},
    )
    damage(proto)
    path = tmp_path / "in.onnx"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(InputError, match=r"in\.onnx"):
        compress(path, **OPTIONS)  # type: ignore[arg-type]


def test_unsorted_nodes_are_said(rng: np.random.Generator, tmp_path: Path) -> None:
    """ONNX Runtime sorts them, and so does the tool."""
    proto = parse(
        """<ir_version: 8, opset_import: ["": 17]>
        one (float[n, 8] x) => (float[n, 8] y) { h = MatMul (x, W)  y = Relu (h) }""",
        {"W": uniform((8, 8), rng)},
    )
    nodes = list(proto.graph.node)[::-1]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    path = tmp_path / "in.onnx"
    path.write_bytes(proto.SerializeToString())
    found = compress(path, **OPTIONS)  # type: ignore[arg-type]
    assert any("onnx.checker rejects the input" in note for note in found.report.notes)


def test_weights_are_not_copied_for_the_checker(rng: np.random.Generator, tmp_path: Path) -> None:
    """One that is only declared as external has no data to look at: its file is not opened."""
    path = tmp_path / "in.onnx"
    onnx.save(
        linear_model(uniform((256, 256), rng)),
        path,
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=0,
    )
    assert load(path).objection is None
