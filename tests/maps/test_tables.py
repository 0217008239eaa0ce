"""Tables of few bits, judged by two runtimes: rows are what their codes stand for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.graph.spool import Spool
from onnx_lowrank.maps.find import find
from onnx_lowrank.maps.formats import Format
from onnx_lowrank.maps.forms import Site, all_forms, chosen_forms
from onnx_lowrank.maps.selection import Selection
from onnx_lowrank.maps.tables import find_tables, table_codes, table_formats, write_table
from onnx_lowrank.numerics.blocks import Bits, Blocks
from tests.helpers.models import parse, run_ort, run_reference

WIDTHS: dict[Bits, int] = {8: 40, 6: 48, 4: 96}


def written(model: ir.Model, sites: Sequence[Site], form: Format, spool: Spool) -> Blocks:
    """Codes of a table, which are put in its place."""
    codes = table_codes(sites[0].matrix.numpy()[0], form)
    write_table(model, sites, codes, form, spool)
    return codes


@pytest.mark.parametrize(
    "form", [own for bits, w in WIDTHS.items() for own in table_formats(w, bits)]
)
def test_rows(form: Format, rng: np.random.Generator) -> None:
    width = WIDTHS[form.bits]
    table = rng.standard_normal((30, width)).astype(np.float32)
    model = ir.from_proto(
        parse(
            f"""<ir_version: 8, opset_import: ["" : {form.opset}]>
            g (int64[B,T] i) => (float[B,T,{width}] y) {{ y = Gather (E, i) }}""",
            {"E": table},
        )
    )
    constants = Constants(model)
    finding = find(model, constants, all_forms(), chosen_forms(None))
    sites = find_tables(finding, model, constants, Selection()).sites["E"]
    with Spool() as spool:
        codes = written(model, sites, form, spool)
        onnx.checker.check_model(ir.to_proto(model), full_check=True)
        i = rng.integers(-30, 30, (3, 5))
        for run in (run_reference, run_ort):
            np.testing.assert_allclose(
                run(model, {"i": i})["y"], codes.values().T[i], rtol=1e-6, atol=1e-6
            )
        stored = sum(
            value.const_value.nbytes
            for name, value in model.graph.initializers.items()
            if value.const_value is not None and name.startswith("E.")
        )
    assert stored == codes.nbytes == form.bytes(30, width)
    lost = np.linalg.norm(codes.values().T - table) / np.linalg.norm(table)
    assert lost < {8: 0.01, 6: 0.03, 4: 0.12}[form.bits]


HEADS = {
    "turned": "t = Transpose <perm = [1, 0]> (E)  z = MatMul (h, t)",
    "gemm": "z = Gemm <transB = 1> (h, E)",
    "left": "u = Transpose <perm = [1, 0]> (h)  v = MatMul (E, u)  z = Transpose (v)",
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("form", [Format(8, 96, table=True), Format(4, 16, table=True),
                                  Format(6, 32, table=True)], ids=str)  # fmt: skip
def test_a_product_reads_the_same_integers(
    form: Format, head: str, rng: np.random.Generator
) -> None:
    table = rng.standard_normal((30, 96)).astype(np.float32)
    text = f"""<ir_version: 8, opset_import: ["" : {form.opset}]>
        g (int64[B] i, float[N,96] h) => (float[B,96] y, float[N,30] z)
        {{ y = Gather (E, i)  {HEADS[head]} }}"""
    model = ir.from_proto(parse(text, {"E": table}))
    constants = Constants(model)
    tables = find_tables(
        find(model, constants, all_forms(), chosen_forms(None)), model, constants, Selection()
    )
    assert len(tables.groups["E"].others) == 1
    feeds = {"i": rng.integers(-30, 30, 5), "h": rng.standard_normal((4, 96)).astype("f4")}
    with Spool() as spool:
        rows = written(model, tables.sites["E"], form, spool).values().T
        proto = ir.to_proto(model)
        onnx.checker.check_model(proto, full_check=True)
        for run in (run_reference, run_ort):
            found = run(model, feeds)
            np.testing.assert_allclose(found["y"], rows[feeds["i"]], rtol=1e-6, atol=1e-6)
            np.testing.assert_allclose(found["z"], feeds["h"] @ rows.T, rtol=1e-4, atol=1e-4)
        stored = {name: v.const_value for name, v in model.graph.initializers.items()}
    large = [name for name, own in stored.items() if own is not None and own.nbytes > 50]
    assert sorted(large) == ["E.codes", "E.scales"]  # once for both


@pytest.mark.parametrize(("opset", "bits"), [(18, 8), (18, 4), (21, 8), (21, 4)])
def test_a_runtime_does_not_dequantize_in_every_run(
    opset: int, bits: Bits, rng: np.random.Generator, tmp_path: Path
) -> None:
    """Floats are made once while it loads, or the product is one with the integers."""
    text = f"""<ir_version: 10, opset_import: ["" : {opset}]>
        g (int64[B] i, float[N,96] h) => (float[B,96] y, float[N,30] z)
        {{ y = Gather (E, i)  t = Transpose <perm = [1, 0]> (E)  z = MatMul (h, t) }}"""
    model = ir.from_proto(parse(text, {"E": rng.standard_normal((30, 96)).astype(np.float32)}))
    constants = Constants(model)
    finding = find(model, constants, all_forms(), chosen_forms(None))
    with Spool() as spool:
        sites = find_tables(finding, model, constants, Selection()).sites["E"]
        rows = written(model, sites, table_formats(96, bits)[0], spool).values().T
        proto = ir.to_proto(model)
        h = rng.standard_normal((4, 96)).astype(np.float32)
        found = run_ort(model, {"i": np.array([3]), "h": h})["z"]
    assert np.linalg.norm(found - h @ rows.T) < 0.02 * np.linalg.norm(found)
    onnx.checker.check_model(proto, full_check=True)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "as-run.onnx")
    ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    run = onnx.load(tmp_path / "as-run.onnx").graph
    (head,) = (node for node in run.node if "z" in node.output)
    assert {*head.input} - {"h", ""} <= {tensor.name for tensor in run.initializer}


@pytest.mark.parametrize(
    ("lines", "selection", "why"),
    [
        ("z = ReduceSum <keepdims = 0> (E)", Selection(), "also read by"),
        ("y = Gather (E, i)  z = Identity (E)", Selection(), "also read by the graph's outputs"),
        ("t = Transpose (E)  z = MatMul (h, t)", Selection(exclude=("head",)), "reads it too: "),
    ],
)
def test_tables_that_others_need_as_floats(lines: str, selection: Selection, why: str) -> None:
    text = f"""<ir_version: 8, opset_import: ["" : 18]>
        g (int64[B] i, float[N,96] h) => (float[B,96] y, float z)
        {{ {"" if "y =" in lines else "y = Gather (E, i)"}  {lines} }}"""
    model = ir.from_proto(parse(text, {"E": np.ones((30, 96), np.float32)}))
    for node in model.graph:
        node.name = "head" if node.op_type == "MatMul" else node.op_type
    constants = Constants(model)
    finding = find(model, constants, all_forms(), chosen_forms(None))
    tables = find_tables(finding, model, constants, selection)
    assert not tables.sites
    assert why in tables.left["E"]


def test_formats_by_width() -> None:
    assert table_formats(96, 4) == (Format(4, 16, table=True),)
    assert table_formats(40, 4) == table_formats(40, 8) == (Format(8, 40, table=True),)
    assert table_formats(40, 6) == ()
    blocks = [form.block for width in (384, 96, 48) for form in table_formats(width, 6)]
    assert blocks == [64, 32, 16]
