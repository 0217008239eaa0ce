"""Which formats a layer may have: what is offered, what is refused, and why."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest

from onnx_lowrank.compression.settings import Settings
from onnx_lowrank.errors import UsageError
from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.maps.find import Finding, find
from onnx_lowrank.maps.formats import Format
from onnx_lowrank.maps.forms import all_forms, chosen_forms
from onnx_lowrank.maps.selection import Selection
from onnx_lowrank.maps.tables import Tables, find_tables
from onnx_lowrank.ranks.format_wishes import FormatWishes, offered, quantized_ops
from onnx_lowrank.ranks.formats import Formats, formats_of, without_opset
from tests.helpers.models import parse

HEAD = '<ir_version: 8, opset_import: ["" : 17]>'


def test_kinds_by_target() -> None:
    every = ("fp32", "8", "4")
    assert offered("fp32", "float", (None, "cpu")) == FormatWishes()
    assert offered("auto", "float", (None, "cpu")) == FormatWishes(every)
    # Zero points cost instructions on ARM, and were not timed on WebGPU.
    assert offered("4, 8", "float", ("arm", "cpu")) == FormatWishes(("8", "4"), zeros=False)
    none = FormatWishes(blocks=False, zeros=False)
    assert offered("auto", "float", ("qnn", "cpu")) == none
    with pytest.raises(UsageError, match=r"coreml takes no weights in blocks.*fp32 or auto$"):
        offered("fp32,8", "float", (None, "coreml"))
    with pytest.raises(UsageError, match=r"target qnn takes no weights.*fp32 or auto$"):
        offered("4", "float", (None, "QNNExecutionProvider"))
    with pytest.raises(UsageError, match=r"fp32 or auto, or activations='int8' beside 8$"):
        offered("8", "float", ("qnn", "cpu"))
    assert offered("auto", "float", ("webgpu", "openvino")) == FormatWishes(every, zeros=False)


def test_activations_by_target() -> None:
    for target in ("cpu", "arm", "openvino"):
        found = offered("fp32,8", "int8", (target, "cpu"))
        assert found.integers == Format(8, 0, activations="dynamic")
        assert found.blocks
    for target, channels in (("qnn", True), ("nnapi", False)):
        found = offered("auto", "int8", (target, "cpu"))
        assert found.kinds == ("fp32", "8")
        assert found.integers == Format(8, 0, activations="static", channels=channels)
        assert not found.blocks
        assert offered("8", "int8", (target, None)).kinds == ("8",)
        with pytest.raises(UsageError, match=r"no weights in blocks.*expected fp32, 8 or auto$"):
            offered("8,4", "int8", (None, target))
    # What both take: ranges of samples, one scale.
    assert offered("8", "int8", ("nnapi", "qnn")).integers == Format(
        8, 0, activations="static", channels=False
    )
    for target in ("coreml", "xnnpack", "webgpu"):
        with pytest.raises(UsageError, match=f"='int8': target {target} multiplies no integers"):
            offered("auto", "int8", (None, target))
    with pytest.raises(UsageError, match=r"'int8' needs 8 among .*got fp32, 4"):
        offered("fp32,4", "int8", ("cpu",))
    with pytest.raises(UsageError, match="activations=… needs weights=…"):
        Settings(activations="int8")
    with pytest.raises(UsageError, match="one of float, int8"):
        Settings(weights="8", activations="int4")


def test_ops() -> None:
    every = {"conv", "einsum", "gather", "gemm", "gru", "lstm", "matmul", "rnn"}
    assert quantized_ops(None) == quantized_ops(["all"]) == every
    assert quantized_ops(["gemm"]) == {"gemm"}
    with pytest.raises(UsageError, match=r"gather, gemm, gru, lstm, matmul.*got 'attention'"):
        quantized_ops(["attention"])


def test_several_kinds_need_something_to_choose_by() -> None:
    for weights in ("auto", "8,4"):
        with pytest.raises(UsageError, match="needs a goal for the whole model"):
            Settings(weights=weights)
        assert not Settings(weights=weights, max_size="1MB").quantized.single
    assert Settings(weights="auto", shape_for="qnn").quantized.single  # nothing is left to choose
    with pytest.raises(UsageError, match="some, separated by commas, of auto, fp32, 8, 4"):
        Settings(weights="fp32,3", max_size="1MB")
    with pytest.raises(UsageError, match="quantize_ops=… needs weights=…"):
        Settings(quantize_ops=("gemm",))


def mixed() -> tuple[Finding, ir.Model]:
    ones = {"W": (64, 128), "V": (128, 24), "U": (24, 64), "E": (50, 64)}
    model = ir.from_proto(
        parse(
            f"""{HEAD} g (int64[N] i) => (float[N,64] y) {{
                x = Gather (E, i)
                [wide] h = MatMul (x, W)
                t = Tanh (h)
                [narrow] k = Gemm (t, V)
                s = Tanh (k)
                [scaled] y = Gemm <alpha=2.0> (s, U)
            }}""",
            {name: np.ones(shape, np.float32) for name, shape in ones.items()},
        )
    )
    return find(model, Constants(model), all_forms(), chosen_forms(None)), model


def test_formats_of_layers_and_tables() -> None:
    finding, model = mixed()
    tables = find_tables(finding, model, Constants(model), Selection())
    wanted = FormatWishes(("fp32", "8", "4"))
    found, left = formats_of(finding, {}, tables, model, wanted, Selection())
    assert not left
    own = {group.matrix.name: formats for group, formats in found.items()}
    corrected = [form.correction for form in own["W"].dense if form is not None]
    assert max(corrected) == 16  # a quarter of the smaller side
    assert own["W"].dense[:2] == (None, Format(8, 64))  # as many as there are rows
    assert own["V"].dense[1] == Format(8, 128)
    assert max(form.correction for form in own["V"].dense if form is not None) == 4
    # The correction would have to be scaled as well.
    assert all(form is None or not form.correction for form in own["U"].dense)
    tables_of = (Format(8, 64, table=True), Format(4, 32, table=True), Format(4, 16, table=True))
    assert own["E"].dense == (None, *tables_of, Format(6, 64, table=True))
    assert own["W"].pairs == (None, Format(8, 128), Format(4, 32, zeros=True))


def test_products_without_zero_points() -> None:
    finding, model = mixed()
    wanted = FormatWishes(("fp32", "8", "4"), zeros=False)
    found, _ = formats_of(finding, {}, Tables(), model, wanted, Selection())
    assert not any(form and form.zeros for own in found.values() for form in own.dense)
    assert any(form and form.bits == 4 for own in found.values() for form in own.dense)
    conv, model = convolution()
    (own,) = formats_of(conv, {}, Tables(), model, wanted, Selection())[0].values()
    assert all(form.zeros for form in own.dense if form and form.bits == 4)


def convolution() -> tuple[Finding, ir.Model]:
    """A layer whose integers become floats while a model is loaded."""
    model = ir.from_proto(
        parse(
            f"{HEAD} g (float[N,32,H,W] x) => (float[N,64,h,w] y) {{ y = Conv (x, K) }}",
            {"K": np.ones((64, 32, 3, 3), np.float32)},
        )
    )
    return find(model, Constants(model), all_forms(), chosen_forms(None)), model


DYNAMIC = Format(8, 0, activations="dynamic", signed=False)


def test_formats_whose_inputs_are_rounded_come_first() -> None:
    finding, model = mixed()
    wanted = FormatWishes(("fp32", "8", "4"), integers=DYNAMIC)
    found, _ = formats_of(finding, {}, Tables(), model, wanted, Selection())
    own = {group.matrix.name: formats for group, formats in found.items()}
    assert own["W"].dense[:3] == (None, DYNAMIC, Format(8, 64))
    assert own["V"].pairs == (None, DYNAMIC, Format(8, 128), Format(4, 32, zeros=True))
    assert own["U"].integers is None  # its alpha would have to go into the scales
    old = without_opset(found, 11)
    assert {g.matrix.name: f for g, f in old.items()} == dict.fromkeys(
        ("W", "V"), Formats((None, DYNAMIC), (None, DYNAMIC))
    )
    assert not without_opset(found, 10)


def test_without_blocks_there_are_whole_columns_alone() -> None:
    finding, model = mixed()
    tables = find_tables(finding, model, Constants(model), Selection())
    static = Format(8, 0, activations="static")
    wanted = FormatWishes(("fp32", "8"), integers=static, blocks=False)
    found, left = formats_of(finding, {}, tables, model, wanted, Selection())
    names = {group.matrix.name: formats for group, formats in found.items()}
    assert names == dict.fromkeys(("W", "V"), Formats((None, static), (None, static)))
    assert list(left.values()) == [
        "only MatMul, and Gemm without transA, alpha and beta, multiply integers there"
    ]


def test_forms_and_nodes_that_are_left_out() -> None:
    finding, model = mixed()
    tables = find_tables(finding, model, Constants(model), Selection())
    wanted = FormatWishes(("4",), frozenset({"gemm"}))
    found, left = formats_of(finding, {}, tables, model, wanted, Selection(exclude=("scaled",)))
    assert [group.matrix.name for group in found] == ["V"]
    reasons = {group.matrix.name: why for group, why in left.items()}
    assert "does not name matmul" in reasons["W"]
    assert "exclude" in reasons["U"]


@pytest.mark.parametrize(
    ("form", "size"),
    [
        (Format(4, 32), 64 * 96 // 2 + 2 * 2 * 96),
        (Format(4, 32, zeros=True), 64 * 96 // 2 + 2 * 2 * 96 + 96),
        (Format(8, 128), 64 * 96 + 2 * 96),
        (Format(8, 96, table=True), 64 * 96 + 2 * 64),
        (Format(8, 0, activations="dynamic"), 64 * 96 + 4 * 96),
        (Format(8, 0, activations="static", channels=False), 64 * 96 + 4),
        (
            Format(4, 32, correction=8),
            64 * 96 // 2 + 2 * 2 * 96 + (64 * 8 + 2 * 8) + (8 * 96 + 2 * 96),
        ),
    ],
)
def test_bytes(form: Format, size: int) -> None:
    assert form.bytes(64, 96) == size


def test_bytes_of_pairs() -> None:
    assert Format(8, 128).bytes(64, 96, 32) == 64 * 32 + 2 * 32 + 32 * 96 + 2 * 96
    assert Format(8, 128).bytes(64, 96, 32, leads=False) == 32 * 96 + 2 * 96
    assert Format(8, 128).bytes(64, 96, 8, leads=False) == 4 * 8 * 96  # too narrow for a block
    assert DYNAMIC.bytes(64, 96, 32) == 64 * 32 + 4 * 32 + 32 * 96 + 4 * 96


def test_names() -> None:
    assert str(DYNAMIC) == "8 bits per channel, inputs in 8 bits, unsigned"
    assert str(dataclasses.replace(DYNAMIC, signed=True)) == "8 bits per channel, inputs in 8 bits"
    opsets = [DYNAMIC, Format(8, 8, table=True), Format(4, 32, table=True), Format(8, 128)]
    assert [form.opset for form in opsets] == [11, 11, 18, 21]
