"""Tables of few bits, judged by two runtimes: rows are what their codes stand for."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.graph.spool import Spool
from onnx_lowrank.maps.find import find
from onnx_lowrank.maps.formats import Format
from onnx_lowrank.maps.forms import all_forms, chosen_forms
from onnx_lowrank.maps.selection import Selection
from onnx_lowrank.maps.tables import find_tables, round_table, table_formats
from onnx_lowrank.numerics.blocks import Bits
from tests.helpers.models import parse, run_ort, run_reference

WIDTHS: dict[Bits, int] = {8: 40, 6: 48, 4: 96}


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
        codes = round_table(model, sites, form, spool)
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


def test_formats_by_width() -> None:
    assert table_formats(96, 4) == (Format(4, 16, table=True),)
    assert table_formats(40, 4) == table_formats(40, 8) == (Format(8, 40, table=True),)
    assert table_formats(40, 6) == ()
    blocks = [form.block for width in (384, 96, 48) for form in table_formats(width, 6)]
    assert blocks == [64, 32, 16]
