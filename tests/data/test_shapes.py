from __future__ import annotations

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from onnx_lowrank.data.declared import InputSpec, input_specs, output_specs
from onnx_lowrank.data.shapes import ConcreteShapes, concrete_shapes, parse_dims, parse_input_shapes
from onnx_lowrank.errors import InputError, UsageError
from onnx_lowrank.phrases import near_names

F32 = np.dtype(np.float32)


def spec(name: str, *shape: int | str | None, dtype: npt.DTypeLike = np.float32) -> InputSpec:
    return InputSpec(name, np.dtype(dtype), shape)


def resolved(*specs: InputSpec, image: tuple[int, int] = (224, 224), **dims: int) -> ConcreteShapes:
    return concrete_shapes(specs, {}, dims, image=image)


def test_specs_of_every_kind_of_size() -> None:
    model = ir.from_onnx_text(
        """<ir_version: 8, opset_import: ["" : 18]>
        g (float[N, 3, ?] x, bfloat16[2] b, float s, string[1] t) => (float y)
        { y = Identity(s) }"""
    )
    x, b, s, t = input_specs(model)
    assert x == InputSpec("x", np.dtype(np.float32), ("N", 3, None))
    assert b.dtype == np.dtype(ml_dtypes.bfloat16)
    assert s.shape in ((), None)
    assert t.dtype == np.dtype(object)


def test_specs_leave_out_initializers_and_keep_unknown_rank() -> None:
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, None),
            helper.make_tensor_value_info("w", TensorProto.FLOAT, [2]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [helper.make_tensor("w", TensorProto.FLOAT, [2], [1, 2])],
    )
    model = helper.make_model(graph, ir_version=3, opset_imports=[helper.make_opsetid("", 9)])
    specs = input_specs(ir.from_proto(model))
    assert [(item.name, item.shape) for item in specs] == [("x", None)]
    assert concrete_shapes(specs, {}, {}).shapes == {}
    assert concrete_shapes(specs, {"x": (3, 2)}, {}).shapes == {"x": (3, 2)}


def test_specs_treat_minus_one_and_question_mark_as_unknown() -> None:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["?", 3, "?", "-1"])
    value.type.tensor_type.shape.dim[0].dim_value = -1
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "g",
        [value],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    assert input_specs(ir.from_proto(model))[0].shape == (None, 3, None, None)


def test_specs_of_what_is_no_tensor() -> None:
    graph = helper.make_graph(
        [helper.make_node("Identity", ["s"], ["y"])],
        "g",
        [helper.make_tensor_sequence_value_info("s", TensorProto.FLOAT, None)],
        [helper.make_tensor_sequence_value_info("y", TensorProto.FLOAT, None)],
    )
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    (item,) = input_specs(ir.from_proto(model))
    assert (item.kind, item.dtype, item.fed, item.drawn) == ("sequence", F32, True, False)
    assert output_specs(ir.from_proto(model))[0].kind == "sequence"
    assert not item.optional
    assert concrete_shapes([item], {}, {}).shapes == {}


def test_parsing() -> None:
    assert parse_input_shapes(["x:1,128", "a::b:0:3,0, 5"]) == {"x": (1, 128), "a::b:0": (3, 0, 5)}
    assert parse_dims(["batch=1", "a=b=2"]) == {"batch": 1, "a=b": 2}


@pytest.mark.parametrize(
    "text", ["x", "x:", ":1", "x:1,", "x:-1", "x:1.5", "x:a", "x:1x2", "x:²", ""]
)
def test_bad_input_shape(text: str) -> None:
    with pytest.raises(UsageError, match=r"input_shapes=.* expected name:size"):
        parse_input_shapes([text])


@pytest.mark.parametrize("text", ["batch", "batch=", "=1", "batch=-1", "batch=x", "batch=1.0", ""])
def test_bad_dim(text: str) -> None:
    with pytest.raises(UsageError, match=r"dims=.* expected name=size"):
        parse_dims([text])


def test_options_given_twice() -> None:
    with pytest.raises(UsageError, match="before"):
        parse_input_shapes(["x:1", "x:2"])
    with pytest.raises(UsageError, match="before"):
        parse_dims(["n=1", "n=1"])


@pytest.mark.parametrize(
    ("item", "shape"),
    [
        (spec("ids", "batch", "sequence_length", dtype=np.int64), (1, 64)),
        (spec("x", "seq", "batch", 8), (64, 1, 8)),
        (spec("x", "d0", 16, "d1"), (1, 16, 64)),
        (spec("x", None, 3, None, None), (1, 3, 224, 224)),
        (spec("x", None, None, None, 3), (1, 224, 224, 3)),
        (spec("x", None, None, None, None), (1, 3, 224, 224)),
        (spec("x", "d0", 3, 48, "d1"), (1, 3, 48, 320)),
        (spec("x", "d0", 3, "d1", 512), (1, 3, 224, 512)),
        (spec("x", None, 3, None, None, dtype=np.uint8), (1, 3, 224, 224)),
        (spec("x", None, 3, None, None, dtype=np.int64), (1, 3, 64, 64)),
        (spec("past", "batch", 12, "past_seq", 64), (1, 12, 64, 64)),
        (spec("audio", None, None), (1, 16000)),
        (spec("scalar"), ()),
        (spec("x", 2, 3), (2, 3)),
    ],
)
def test_guesses(item: InputSpec, shape: tuple[int, ...]) -> None:
    assert resolved(item).shapes[item.name] == shape


def test_image_size_can_be_set() -> None:
    item = spec("x", None, 3, None, None)
    assert resolved(item, image=(48, 320)).shapes["x"] == (1, 3, 48, 320)


def test_nothing_assumed_no_note() -> None:
    shapes = resolved(spec("x", 1, 3), spec("y", "n"), n=5)
    assert shapes.notes == ()
    assert shapes.shapes == {"x": (1, 3), "y": (5,)}
    assert shapes.assumed == {"x": frozenset(), "y": frozenset()}


def test_notes_name_every_assumption() -> None:
    shapes = resolved(
        spec("ids", "batch", "seq", dtype=np.int64),
        spec("mask", "batch", "seq", dtype=np.int64),
        spec("x", None, 4),
        batch=2,
    )
    assert shapes.notes == (
        "ids, mask: [2, 64] (assumed seq=64; set with dims=… or input_shapes=…)",
        "x: [1, 4] (assumed axis 0=1; set with input_shapes=…)",
    )
    assert shapes.assumed == {
        "ids": frozenset({1}),
        "mask": frozenset({1}),
        "x": frozenset({0}),
    }


def test_many_equal_inputs_make_one_note() -> None:
    (note,) = resolved(*(spec(f"past{i}", "batch", 4) for i in range(30))).notes
    assert note.startswith("past0, past1, past2 and 27 more: [1, 4] ")


def test_symbol_has_one_value_everywhere() -> None:
    specs = (spec("a", "n", "s"), spec("b", "s", "n"))
    shapes = concrete_shapes(specs, {"b": (7, 3)}, {})
    assert shapes.shapes == {"a": (3, 7), "b": (7, 3)}
    assert shapes.dims == {"n": 3, "s": 7}
    assert shapes.notes == ()
    guessed = resolved(*specs)
    assert guessed.shapes["b"] == guessed.shapes["a"][::-1]


def test_sum_of_symbols() -> None:
    item = spec("mask", "batch", "past + seq + 1")
    given = resolved(item, past=5, seq=2)
    assert given.shapes["mask"] == (1, 8)
    assert given.assumed["mask"] == frozenset({0})
    assert resolved(item).shapes["mask"] == (1, 129)


@pytest.mark.parametrize(
    ("shapes", "dims", "message"),
    [
        ({"x": (1, 2, 3)}, {}, r"x:1,2,3': expected 2 sizes for \[n, 4\], got 3"),
        ({"x": (1, 5)}, {}, r"x:1,5': axis 1 is fixed to 4 in the model, got 5"),
        ({"xx": (1, 4)}, {}, r"no tensor input 'xx'; did you mean 'x'\?"),
        ({"x": (2, 4)}, {"n": 1}, r"axis 0 is 'n', expected 1 \(dims='n=1'\), got 2"),
        ({"x": (2, 4), "z": (3,)}, {}, r"expected 2 \(input_shapes='x:2,4'\), got 3"),
        ({}, {"nn": 1}, r"dims='nn=1': no input has a dimension 'nn'; did you mean 'n'\?"),
        ({}, {"qqq": 1}, r"there are 'n'"),
    ],
)
def test_conflicts(shapes: dict[str, tuple[int, ...]], dims: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        concrete_shapes((spec("x", "n", 4), spec("z", "n")), shapes, dims)
    assert "\n" not in str(caught.value)


def test_near_names_without_any() -> None:
    assert near_names("x", []) == "there are none"
    assert near_names("qqq", [f"n{i}" for i in range(12)]).endswith("and 2 more")
