"""Gated units, ``f(X·A) ⊙ (X·U)``: the columns of both maps go together."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnx_lowrank import compress, inspect
from onnx_lowrank.compression.result import Result
from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.maps.find import Finding, find
from onnx_lowrank.maps.forms import all_forms, chosen_forms
from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.runtime.session import open_session, run
from tests.helpers.models import parse

WIDTH, UNITS, NEEDED, TOKENS = 16, 48, 30, 200
NEAR = 0.008  # copies are not quite alike by moments that are shrunk
OPTIONS: dict[str, Any] = {"ops": ("hidden",), "simplify": False, "bench": False}

HEAD = """<ir_version: 8, opset_import: ["": OPSET, "com.microsoft": 1]>
g (TYPE[B, T, 16] x) => (TYPE[B, T, 16] y)
<TYPE[16, 48] gate, TYPE[48] gate_b, TYPE[16, 48] up, TYPE[48] up_b, TYPE[16, 96] both,
 TYPE[96] both_b, TYPE[48, 16] down, TYPE[16] down_b, TYPE half, TYPE one, TYPE root,
 TYPE cubic, TYPE three, int64[2] sizes, int64[1] begin, int64[1] middle, int64[1] end,
 int64[1] last, int8[16, 48] codes>
{"""

SIGMOID = "s = Sigmoid(g1)  a = Mul(g1, s)"
ERF = """e0 = Mul(g1, root)  e1 = Erf(e0)  e2 = Add(e1, one)  e3 = Mul(g1, e2)
  a = Mul(e3, half)"""
TANH = """t0 = Pow(g1, three)  t1 = Mul(t0, cubic)  t2 = Add(g1, t1)  t3 = Mul(t2, root)
  t4 = Tanh(t3)  t5 = Add(t4, one)  t6 = Mul(g1, t5)  a = Mul(t6, half)"""

GATE = "g0 = MatMul(x, gate)  g1 = Add(g0, gate_b)"
UP = "u0 = MatMul(x, up)  u1 = Add(u0, up_b)"
LAST = "h = Mul(a, u1)  d = MatMul(h, down)  y = Add(d, down_b)"
BOTH = "b0 = MatMul(x, both)  b1 = Add(b0, both_b)"

TWO = {
    "SiLU": (18, GATE, UP, SIGMOID, LAST),
    "GELU by Erf": (13, GATE, UP, ERF, LAST),
    "GELU by Tanh": (13, GATE, UP, TANH, LAST),
    "Gelu": (20, GATE, UP, "a = Gelu(g1)", LAST),
    "QuickGelu": (18, GATE, UP, "a = com.microsoft.QuickGelu(g1)", LAST),
    "BiasGelu": (18, "g0 = MatMul(x, gate)", UP, "a = com.microsoft.BiasGelu(g0, gate_b)", LAST),
    "ReLU, no bias": (
        *(18, "g1 = MatMul(x, gate)", "u1 = MatMul(x, up)", "a = Relu(g1)"),
        "h = Mul(u1, a)  y = MatMul(h, down)",
    ),
}
ONE = {
    "Split of sizes": (18, BOTH, "g1, u1 = Split<axis = -1>(b1, sizes)", SIGMOID, LAST),
    "Split of opset 11": (
        *(11, BOTH, "g1, u1 = Split<axis = -1, split = [48, 48]>(b1)", SIGMOID, LAST),
    ),
    "Split into so many": (18, BOTH, "g1, u1 = Split<axis = -1, num_outputs = 2>(b1)", ERF, LAST),
    "Slices": (
        *(18, BOTH, "g1 = Slice(b1, begin, middle, last)  u1 = Slice(b1, middle, end, last)"),
        *(SIGMOID, LAST),
    ),
}  # fmt: skip


def arrays(dtype: type[np.generic] = np.float32, seed: int = 3) -> dict[str, Array]:
    """Weights whose units are 30 of 48, and copies of them."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> Array:
        return np.asarray(rng.normal(size=shape) / np.sqrt(shape[0]))

    gate, up = normal(WIDTH, UNITS), normal(WIDTH, UNITS)
    gate_b, up_b = rng.normal(size=UNITS), rng.normal(size=UNITS)
    for own in (gate, up, gate_b, up_b):
        own[..., NEEDED:] = own[..., : UNITS - NEEDED]
    order = rng.permutation(UNITS)
    gate, up, gate_b, up_b = (own[..., order] for own in (gate, up, gate_b, up_b))
    floats = {
        **{"gate": gate, "up": up, "gate_b": gate_b, "up_b": up_b},
        "both": np.concatenate([gate, up], axis=1),
        "both_b": np.concatenate([gate_b, up_b]),
        **{"down": normal(UNITS, WIDTH), "down_b": rng.normal(size=WIDTH)},
        **{"half": np.array(0.5), "one": np.array(1.0), "root": np.array(0.7071)},
        **{"cubic": np.array(0.0447), "three": np.array(3.0)},
    }
    integers = {"sizes": [UNITS, UNITS], "begin": [0], "middle": [UNITS], "last": [-1]}
    integers |= {"end": [np.iinfo(np.int64).max]}
    return {
        **{name: np.asarray(own, dtype) for name, own in floats.items()},
        **{name: np.array(own, np.int64) for name, own in integers.items()},
        "codes": rng.integers(-100, 100, (WIDTH, UNITS)).astype(np.int8),
    }


def gated(
    lines: tuple[Any, ...], own: Mapping[str, Array] | None = None, kind: str = "float"
) -> onnx.ModelProto:
    """A model out of lines, the first of which is the opset, with the constants that they read."""
    opset, *text = lines
    head, known = HEAD.replace("OPSET", str(opset)), own or arrays()
    model = parse(head.replace("TYPE", kind) + "\n  ".join(text) + "}", known)
    read = {name for node in model.graph.node for name in node.input}
    for tensor in [t for t in model.graph.initializer if t.name not in read]:
        model.graph.initializer.remove(tensor)
    return model


def feeds(dtype: type[np.generic] = np.float32) -> list[dict[str, Array]]:
    rng = np.random.default_rng(8)
    return [{"x": rng.normal(size=(1, TOKENS, WIDTH)).astype(dtype)} for _ in range(24)]


def off(before: onnx.ModelProto, after: Result) -> float:
    """How far the outputs are from each other, relative, on samples that nobody knows."""
    feed = {"x": np.random.default_rng(99).normal(size=(2, 50, WIDTH)).astype(np.float32)}
    if before.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT16:
        feed = {"x": feed["x"].astype(np.float16)}
    found = []
    for proto in (before, ir.to_proto(after.model)):
        onnx.checker.check_model(proto, full_check=True)
        session = open_session(proto.SerializeToString(), threads=1)
        (array,) = run(session, feed, "it").values()
        found.append(array.astype(np.float64))
    return float(np.linalg.norm(found[1] - found[0]) / np.linalg.norm(found[0]))


def shapes(result: Result) -> dict[str, tuple[int, ...]]:
    values = result.model.graph.initializers
    return {name: tuple(v.const_value.shape) for name, v in values.items()}  # type: ignore[union-attr,arg-type]


def found(model: onnx.ModelProto, *ops: str) -> Finding:
    loaded = ir.from_proto(model)
    return find(loaded, Constants(loaded), all_forms(), chosen_forms(ops or ("hidden",)))


@pytest.mark.parametrize("name", TWO)
def test_copies_of_units_are_left_out_of_all_maps(name: str) -> None:
    model = gated(TWO[name])
    result = compress(model, data=feeds(), rank=NEEDED, effort="quick", **OPTIONS)
    sizes = shapes(result)
    assert sizes["gate"] == sizes["up"] == (WIDTH, NEEDED)
    assert sizes["down"] == (NEEDED, WIDTH)
    assert all(sizes[name] == (NEEDED,) for name in ("gate_b", "up_b") if name in sizes)
    assert [n.op_type for n in result.model.graph] == [n.op_type for n in model.graph.node]
    # The twins of a unit are alike up to rounding: what is left out is made up for.
    assert off(model, result) < (NEAR if "bias" not in name else 0.6)
    if "bias" not in name:
        less = compress(model, data=feeds(), rank=NEEDED - 6, effort="quick", **OPTIONS)
        assert off(model, less) > 0.04


@pytest.mark.parametrize("name", ONE)
def test_one_product_that_is_taken_apart(name: str) -> None:
    model = gated(ONE[name])
    result = compress(model, data=feeds(), rank=NEEDED, effort="quick", **OPTIONS)
    sizes = shapes(result)
    assert sizes["both"] == (WIDTH, 2 * NEEDED)
    assert sizes["both_b"] == (2 * NEEDED,)
    assert sizes["down"] == (NEEDED, WIDTH)
    assert off(model, result) < NEAR
    (row,) = (layer for layer in result.report.layers if layer.form == "hidden")
    assert row.parameters_before == 3 * WIDTH * UNITS
    assert row.parameters_after == 3 * WIDTH * NEEDED
    assert row.macs_before == TOKENS * 3 * WIDTH * UNITS
    assert row.macs_after == TOKENS * 3 * WIDTH * NEEDED


@pytest.mark.parametrize("how", ["chunk", "slice"])
@pytest.mark.parametrize("dynamo", [False, True])
def test_what_torch_writes_is_found(how: str, dynamo: bool, tmp_path: Path) -> None:
    """One layer whose halves are taken apart by sizes that may be computed."""
    torch = pytest.importorskip("torch")

    class Gated(torch.nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.both, self.down = torch.nn.Linear(16, 96), torch.nn.Linear(48, 16)

        def forward(self, x: Any) -> Any:
            both = self.both(x)
            parts = both.chunk(2, -1) if how == "chunk" else (both[..., :48], both[..., 48:])
            gate, up = parts
            return self.down(torch.nn.functional.silu(gate) * up)

    torch.manual_seed(0)
    batch = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}
    axes = {"dynamic_shapes": (batch,)} if dynamo else {"dynamic_axes": {"x": {0: "b", 1: "t"}}}
    path, given = tmp_path / "gated.onnx", (torch.randn(2, 5, 16),)
    torch.onnx.export(
        Gated().eval(), given, path, input_names=["x"], opset_version=18, dynamo=dynamo, **axes
    )
    options: dict[str, Any] = {"ops": ("hidden",), "bench": False, "effort": "quick"}
    result = compress(path, data=feeds(), rank=NEEDED, **options)
    (row,) = (layer for layer in result.report.layers if layer.form == "hidden")
    assert row.rank == NEEDED
    assert row.parameters_after == 3 * WIDTH * NEEDED
    assert 1e-4 < off(onnx.load(path), result) < 0.6


def test_sizes_that_others_read_stay() -> None:
    """The constant of a Split is another Split's too, whose model keeps its width."""
    twice = (
        *(18, BOTH, "g1, u1 = Split<axis = -1>(b1, sizes)", SIGMOID, "h = Mul(a, u1)"),
        "d = MatMul(h, down)  e = Concat<axis = -1>(d, d, d, d, d, d)",
        "p, q = Split<axis = -1>(e, sizes)  z = Add(p, q)  y = MatMul(z, down)",
    )
    model = gated(twice)
    result = compress(model, data=feeds(), rank=NEEDED, effort="quick", **OPTIONS)
    assert shapes(result)["sizes"] == (2,)
    assert off(model, result) < NEAR


def test_float16_keeps_its_type() -> None:
    own = arrays(np.float16)
    model = gated(TWO["SiLU"], own, "float16")
    result = compress(model, data=feeds(np.float16), rank=NEEDED, effort="quick", **OPTIONS)
    assert shapes(result)["up"] == (WIDTH, NEEDED)
    assert off(model, result) < 0.02


def test_gemm_with_a_transposed_weight_and_its_own_bias() -> None:
    own = arrays()
    own["gate"] = np.ascontiguousarray(own["gate"].T)
    lines = (
        *(18, "r = Reshape(x, rows)  g1 = Gemm<transB = 1>(r, gate, gate_b)"),
        *("u0 = MatMul(r, up)  u1 = Add(up_b, u0)", SIGMOID, "h = Mul(a, u1)"),
        "d = Gemm(h, down, down_b)  y = Reshape(d, back)",
    )
    opset, *text = lines
    head = HEAD.replace("OPSET", str(opset)).replace("TYPE", "float")
    head = head.replace("gate_b,", "gate_b, int64[2] rows, int64[3] back,")
    head = head.replace("float[16, 48] gate,", "float[48, 16] gate,")
    own |= {"rows": np.array([-1, WIDTH]), "back": np.array([-1, TOKENS, WIDTH])}
    model = parse(head + "\n  ".join(text) + "}", own)
    read = {name for node in model.graph.node for name in node.input}
    for tensor in [t for t in model.graph.initializer if t.name not in read]:
        model.graph.initializer.remove(tensor)
    result = compress(model, data=feeds(), rank=NEEDED, effort="quick", **OPTIONS)
    assert shapes(result)["gate"] == (NEEDED, WIDTH)
    feed = feeds()[3]
    before, after = (
        next(iter(run(open_session(p.SerializeToString(), threads=1), feed, "it").values()))
        for p in (model, ir.to_proto(result.model))
    )
    assert np.linalg.norm(after - before) < NEAR * np.linalg.norm(before)


def test_it_counts_once_and_by_all_three_maps() -> None:
    finding = found(gated(TWO["SiLU"]))
    (group,) = finding.groups
    assert [head.node.outputs[0].name for head in group.heads] == ["u0", "g0"]
    assert group.elements == 3 * WIDTH * UNITS
    assert group.pair_elements(NEEDED) == 3 * WIDTH * NEEDED
    assert group.selects
    assert not finding.wide
    (joined,) = found(gated(ONE["Slices"])).groups
    assert joined.elements == 3 * WIDTH * UNITS
    assert joined.pair_elements(NEEDED) == 3 * WIDTH * NEEDED


OTHER = "another node sees what lies in front of it too"
NO_MAP = "a map in front of it is no plain product with a float weight of its own"
CONSTANT = "a constant in front of it has another shape, or is read elsewhere too"


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        ((GATE, UP, SIGMOID, "h = Mul(a, u1)  v = ReduceSum<keepdims = 1>(u1)",
          "d = MatMul(h, down)  y = Add(d, v)"), OTHER),
        ((GATE, UP, SIGMOID, "h = Mul(a, u1)  k = MatMul(h, down)  v = Mul(h, half)",
          "w = MatMul(v, down)  y = Add(k, w)"), None),
        ((GATE, "u0 = MatMul(x, gate)  u1 = Add(u0, up_b)", SIGMOID, LAST), NO_MAP),
        ((GATE, "u0 = MatMul(x, up)  u1 = Add(u0, gate_b)", SIGMOID, LAST), CONSTANT),
        ((GATE, "q = DequantizeLinear(codes, half)  u1 = MatMul(x, q)", SIGMOID, LAST), NO_MAP),
        # Halves of another axis, and parts that are not alike.
        ((GATE, "p, q = Split<axis = 1, num_outputs = 2>(g1)  u1 = Concat<axis = 1>(q, p)",
          SIGMOID, LAST), None),
        ((BOTH, "g1 = Slice(b1, begin, middle, last)  r = Slice(b1, begin, end, last)",
          "u0 = MatMul(r, both_t)  u1 = Add(u0, up_b)", SIGMOID, LAST), None),
    ],
)  # fmt: skip
def test_what_cannot_be_narrowed_stays_and_says_why(
    lines: tuple[str, ...], why: str | None
) -> None:
    if "both_t" in lines[2]:
        own = arrays()
        own["both_t"] = np.ones((2 * UNITS, UNITS), np.float32)
        head = HEAD.replace("OPSET", "18").replace("TYPE", "float")
        head = head.replace("float half,", "float half, float[96, 48] both_t,")
        model = parse(head + "\n  ".join(lines) + "}", own)
    else:
        model = gated((18, *lines))
    finding = found(model, "default", "hidden")
    assert not [group for group in finding.groups if group.inner is not None]
    assert set(finding.wide.values()) == ({why} if why else set())


def test_what_stays_is_one_note_and_in_the_list_of_maps() -> None:
    model = gated((18, GATE, "u0 = MatMul(x, up)  u1 = Add(u0, gate_b)", SIGMOID, LAST))
    ops = ("default", "hidden")
    report = compress(model, keep=0.9, data=feeds(), **{**OPTIONS, "ops": ops}).report
    (note,) = [note for note in report.notes if "widths" in note]
    assert note.startswith("widths that stay as they are: ")
    assert note.endswith(f": {CONSTANT}")
    rows = [row.reason for row in inspect(model, ops=ops).entries]
    assert f"its width stays: {CONSTANT}" in rows
    plain = [row.reason for row in inspect(model).entries]
    assert not any("width" in reason for reason in plain)


def test_an_excluded_gate_keeps_all_three() -> None:
    model = gated(TWO["SiLU"])
    for node in model.graph.node:
        node.name = node.output[0]
    report = compress(model, rank=NEEDED, data=feeds(), exclude=("g0",), **OPTIONS).report
    (row,) = (layer for layer in report.layers if layer.form == "hidden")
    assert row.rank is None
    assert "exclude" in row.reason


def test_budgets_recipes_and_healing_know_them(tmp_path: Path) -> None:
    own = arrays(seed=5)
    own["gate"] = np.random.default_rng(1).normal(size=own["gate"].shape).astype("f4")
    model, path = gated(TWO["SiLU"], own), tmp_path / "recipe.json"
    options = {**OPTIONS, "data": feeds()}
    first = compress(model, keep=0.7, heal=30, save_recipe=path, rank_multiple=1, **options)
    totals = first.report.totals
    assert totals.linear_parameters_after <= 0.7 * totals.linear_parameters_before
    assert first.report.healing is not None
    assert first.report.healing.trained == 6  # three weights and their biases
    again = compress(model, recipe=path, data=feeds(), bench=False)
    assert shapes(first) == shapes(again)
