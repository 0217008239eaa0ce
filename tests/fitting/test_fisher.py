"""Fisher: errors of a layer's outputs weighted by their effect on the model's outputs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_lowrank import UsageError, compress
from onnx_lowrank.cli.program import exit_code
from onnx_lowrank.errors import DerivativeError
from onnx_lowrank.fitting.output_gradients import Felt, felt
from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.maps.find import find
from onnx_lowrank.maps.forms import all_forms
from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.numerics.fisher import PLAIN, Fisher
from onnx_lowrank.numerics.ridge import Regression
from onnx_lowrank.runtime.taps import tapped
from tests.helpers.models import parse, run_ort

Feed = dict[str, Array]

OPTIONS: dict[str, Any] = {"simplify": False, "check": False, "bench": False, "min_gain": -1.0}

# What comes first is felt through the second layer only.
TWO = """<ir_version: 8, opset_import: ["": 17]>
agraph (float[N, 20] x) => (float[N, 16] y) <float[20, 24] w1, float[24] b1, float[24, 16] w2>
{ h = MatMul(x, w1)
  a = Add(h, b1)
  y = MatMul(a, w2) }"""


@pytest.fixture
def two(rng: np.random.Generator) -> onnx.ModelProto:
    """Half of what the first layer gives is hardly read by the second."""
    weights = {name: rng.normal(size=s).astype("f4") for name, s in (("w1", (20, 24)), ("b1", 24))}
    second = rng.normal(size=(24, 16)) * np.where(np.arange(24) < 12, 1.0, 0.01)[:, None]
    return parse(TWO, {**weights, "w2": second.astype("f4")})


def rows(rng: np.random.Generator, count: int, size: int = 20) -> list[Feed]:
    return [{"x": rng.normal(size=(8, size)).astype("f4")} for _ in range(count)]


def error(model: Any, other: Any, feeds: Sequence[Feed]) -> float:
    off = [run_ort(other, feed)["y"] - run_ort(model, feed)["y"] for feed in feeds]
    return float(np.linalg.norm(off) / np.linalg.norm([run_ort(model, f)["y"] for f in feeds]))


def felt_by(
    model: onnx.ModelProto, feeds: Sequence[Feed], mask: str | None = None, draws: int = 2048
) -> Felt:
    loaded = ir.from_proto(model)
    constants = Constants(loaded, False)
    forms = [form for form in all_forms() if form.name != "conv-spatial"]
    groups = find(loaded, constants, forms).groups

    def opened(copy: ir.Model) -> Any:
        proto = ir.to_proto(copy)
        names = {value.name for value in proto.graph.input}
        return lambda feed: run_ort(proto, {k: v for k, v in feed.items() if k in names})

    steps: list[int] = []
    found = felt(loaded, constants, groups, feeds, mask, opened, steps.append, draws=draws)
    assert sum(steps) == len(feeds)
    return found


def test_inputs_alone_are_tapped_without_a_run(
    two: onnx.ModelProto, rng: np.random.Generator
) -> None:
    (feed,) = rows(rng, 1)

    def refuse(_: ir.Model) -> Any:
        raise AssertionError("the model was opened")

    assert tapped(ir.from_proto(two), ["x"], refuse)(feed)["x"] is feed["x"]


@given(st.integers(1, 12), st.integers(0, 10_000))
def test_coordinates_and_the_way_back(size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(size, size))
    fisher = Fisher.of(root @ root.T, 100_000)
    array = rng.normal(size=(2, 3, size))
    np.testing.assert_allclose(fisher.back(fisher.into(array)), array, rtol=1e-7, atol=1e-9)
    # An error's square there is e G eᵀ, G with the mean eigenvalue 1 and a tenth on top.
    own = root @ root.T / np.trace(root @ root.T) * size + 0.1 * np.eye(size)
    e = array[0, 0]
    assert np.sum(fisher.into(e) ** 2) == pytest.approx(e @ own @ e, rel=1e-6)


def test_nothing_felt_is_nothing_known() -> None:
    fisher = Fisher.of(np.zeros((3, 3)), 10)
    assert fisher is PLAIN
    array = np.ones((2, 3), np.float32)
    assert fisher.into(array) is array
    assert fisher.back(array) is array


def test_few_draws_say_little() -> None:
    second = np.diag([10.0, 1.0, 1.0, 1.0])
    ratios = []
    for draws in (2, 20, 2000):
        root = Fisher.of(second, draws).root
        assert root is not None
        ratios.append(root[0, 0] / root[1, 1])
    assert 1.0 <= ratios[0] < ratios[1] < ratios[2]


def test_it_is_what_the_following_layers_make_of_errors(
    two: onnx.ModelProto, rng: np.random.Generator
) -> None:
    found = felt_by(two, rows(rng, 40))
    assert not found.left
    first = next(f for group, f in found.found.items() if group.matrix.name == "w1")
    assert first.root is not None
    w2 = next(onnx.numpy_helper.to_array(i) for i in two.graph.initializer if i.name == "w2")
    exact = (w2 @ w2.T).astype(np.float64)
    exact = exact / np.trace(exact) * 24 + 0.1 * np.eye(24)
    np.testing.assert_allclose(first.root @ first.root.T, exact, atol=0.15 * exact.max())


@pytest.mark.parametrize(("dtype", "kind"), [("float16", np.float16), ("double", np.float64)])
def test_samples_of_other_floats(
    two: onnx.ModelProto, rng: np.random.Generator, dtype: str, kind: type
) -> None:
    """Derivatives are taken in float32, so what is fed is made that as well."""
    weights: dict[str, Array] = {
        w.name: onnx.numpy_helper.to_array(w).astype(kind) for w in two.graph.initializer
    }
    other = parse(TWO.replace("float[", f"{dtype}["), weights)
    feeds = rows(rng, 40)
    cast: list[Feed] = [{"x": feed["x"].astype(kind)} for feed in feeds]
    roots = [
        {group.matrix.name: fisher.root for group, fisher in felt_by(model, own).found.items()}
        for model, own in ((two, feeds), (other, cast))
    ]
    assert roots[0].keys() == roots[1].keys() >= {"w1"}
    for name, root in roots[0].items():
        found = roots[1][name]
        assert root is not None
        assert found is not None
        np.testing.assert_allclose(found, root, atol=0.02 * float(np.abs(root).max()))
    result = compress(other, keep=0.5, fisher=True, calibration=cast, **OPTIONS)
    assert [layer.energy_of for layer in result.report.layers] == ["fisher"] * 2
    after = ir.to_proto(result.model)
    assert list(after.graph.input) == list(other.graph.input)
    assert list(after.graph.output) == list(other.graph.output)
    assert run_ort(after, cast[0])["y"].dtype == kind


def test_a_pair_keeps_what_the_outputs_feel(two: onnx.ModelProto, rng: np.random.Generator) -> None:
    fit, judge = rows(rng, 40), rows(np.random.default_rng(99), 8)
    options = {**OPTIONS, "keep": 0.7, "uniform": True, "include": ["h"], "calibration": fit}
    plain = compress(two, **options)
    weighed = compress(two, fisher=True, **options)
    assert error(two, weighed.model, judge) < 0.5 * error(two, plain.model, judge)
    (layer,) = [layer for layer in weighed.report.layers if layer.status == "factored"]
    assert layer.energy_of == "fisher"
    assert layer.predicted_error is not None
    # The pair is far off in what is not felt, and close in what is.
    assert layer.predicted_error < 0.3


def test_predicted_and_achieved_error_are_of_the_same_kind(
    two: onnx.ModelProto, rng: np.random.Generator, tmp_path: Path
) -> None:
    np.savez(tmp_path / "judge.npz", x=np.concatenate([f["x"] for f in rows(rng, 40)]))
    result = compress(
        two, calibration=rows(rng, 60), data=tmp_path / "judge.npz", samples=40, fisher=True,
        **{**OPTIONS, "energy": 0.8},
    )  # fmt: skip
    for layer in result.report.layers:
        assert layer.output_error == pytest.approx(layer.predicted_error, rel=0.2)


def test_refit_in_these_coordinates(rng: np.random.Generator) -> None:
    text = """<ir_version: 8, opset_import: ["": 17]>
    agraph (float[N, 20] x) => (float[N, 6] y)
    <float[20, 24] w1, float[24, 24] w2, float[24] b2, float[24, 6] w3>
    { h1 = MatMul(x, w1)
      t1 = Tanh(h1)
      h2 = MatMul(t1, w2)
      a2 = Add(h2, b2)
      t2 = Tanh(a2)
      y = MatMul(t2, w3) }"""
    shapes = {"w1": (20, 24), "w2": (24, 24), "b2": (24,), "w3": (24, 6)}
    model = parse(text, {k: (rng.normal(size=s) * 0.3).astype("f4") for k, s in shapes.items()})
    fit, judge = rows(rng, 60), rows(np.random.default_rng(99), 8)
    options = {**OPTIONS, "rank": 6, "calibration": fit, "exclude": ["y"]}
    plain, weighed, both = (
        error(model, compress(model, refit=refit, fisher=fisher, **options).model, judge)
        for refit, fisher in ((True, False), (False, True), (True, True))
    )
    assert both < plain
    assert both < weighed


def test_regression_errors_are_of_the_coordinates(rng: np.random.Generator) -> None:
    x, true = rng.normal(size=(400, 5)), rng.normal(size=(5, 3))
    y = x @ true + 0.5
    root = rng.normal(size=(3, 3))
    fisher = Fisher.of(root @ root.T, 10_000)
    sums = Regression(5, 3, biased=True, fisher=fisher)
    sums.add(x.astype("f4"), y.astype("f4"))
    found = sums.solution(np.zeros((5, 3)), 1e-9)
    assert found is not None
    np.testing.assert_allclose(fisher.back(found), true, atol=1e-4)
    a, b = np.eye(5)[:, :2], true[:2]
    shift = sums.shift(a, b)
    assert shift is not None
    np.testing.assert_allclose(shift, (y - x @ a @ b).mean(axis=0), atol=1e-5)
    off = fisher.into(y - x @ a @ b - shift)
    wanted = np.sum(off**2) / np.sum(fisher.into(y) ** 2)
    assert sums.error(a, b, shift) == pytest.approx(wanted, rel=1e-4)
    assert sums.energy == pytest.approx(np.sum(fisher.into(y) ** 2), rel=1e-4)


def test_maps_that_share_their_first_factor(rng: np.random.Generator) -> None:
    text = """<ir_version: 8, opset_import: ["": 17]>
    agraph (float[N, 20] x) => (float[N, 16] y)
    <float[20, 16] w1, float[20, 16] w2, float[16, 16] w3>
    { a = MatMul(x, w1)
      b = MatMul(x, w2)
      t = Tanh(b)
      s = Mul(a, t)
      y = MatMul(s, w3) }"""
    base = rng.normal(size=(20, 6))
    weights = {n: (base @ rng.normal(size=(6, 16))).astype("f4") for n in ("w1", "w2")}
    model = parse(text, {**weights, "w3": rng.normal(size=(16, 16)).astype("f4")})
    fit, judge = rows(rng, 60), rows(np.random.default_rng(99), 8)
    options = {**OPTIONS, "check": True, "keep": 0.6, "calibration": fit}
    plain = compress(model, effort="quick", **options)
    weighed = compress(model, fisher=True, **options)
    for result in (plain, weighed):
        factors = [name for name in result.model.graph.initializers if "lowrank_A" in name]
        assert len(factors) < sum(layer.status == "factored" for layer in result.report.layers)
    assert error(model, weighed.model, judge) < 1.02 * error(model, plain.model, judge)
    assert {layer.energy_of for layer in weighed.report.layers} == {"fisher"}


def test_a_convolution(rng: np.random.Generator) -> None:
    text = """<ir_version: 8, opset_import: ["": 17]>
    agraph (float[N, 3, 8, 8] x) => (float[N, 4] y)
    <float[12, 3, 3, 3] w, float[12] b, float[12, 4] v>
    { h = Conv<pads = [1, 1, 1, 1]>(x, w, b)
      r = Relu(h)
      g = GlobalAveragePool(r)
      f = Flatten(g)
      y = MatMul(f, v) }"""
    shapes = {"w": (12, 3, 3, 3), "b": (12,), "v": (12, 4)}
    model = parse(text, {k: rng.normal(size=s).astype("f4") for k, s in shapes.items()})
    feeds = [{"x": rng.normal(size=(1, 3, 8, 8)).astype("f4")} for _ in range(30)]
    found = felt_by(model, feeds)
    assert len(found.found) == 2
    assert found.draws == 30 * 8
    assert not found.left


@pytest.mark.parametrize(("length", "draws"), [(1, 20 * 6), (6, 20 * 6), (40, 16 * 16)])
def test_each_row_of_an_output_has_a_direction(
    length: int, draws: int, rng: np.random.Generator
) -> None:
    text = """<ir_version: 8, opset_import: ["": 17]>
    agraph (float[N, L, 20] x) => (float[N, L, 9] y) <float[20, 9] w>
    { h = MatMul(x, w)
      y = Tanh(h) }"""
    model = parse(text, {"w": rng.normal(size=(20, 9)).astype("f4")})
    feeds = [{"x": rng.normal(size=(1, length, 20)).astype("f4")} for _ in range(20)]
    found = felt_by(model, feeds, draws=128)
    assert found.draws == draws
    assert len(found.found) == 1


def test_a_weight_with_two_readers_feels_both(rng: np.random.Generator) -> None:
    text = """<ir_version: 8, opset_import: ["": 17]>
    agraph (float[N, 20] x) => (float[N, 20] y) <float[20, 20] w>
    { h = MatMul(x, w)
      t = Tanh(h)
      y = MatMul(t, w) }"""
    model = parse(text, {"w": (rng.normal(size=(20, 20)) * 0.2).astype("f4")})
    found = felt_by(model, rows(rng, 20))
    ((_, fisher),) = found.found.items()
    assert fisher.known


@pytest.mark.parametrize(
    ("body", "weights", "why"),
    [
        ("h = MatMul(x, w) t = Transpose(w) y = MatMul(h, t)", {"w": (20, 20)}, "transposed"),
        ('y = Einsum<equation = "nd,dk->nk">(x, w)', {"w": (20, 20)}, "form einsum does not tell"),
    ],
)
def test_what_cannot_be_weighed_is_named(
    body: str, weights: Mapping[str, tuple[int, ...]], why: str, rng: np.random.Generator
) -> None:
    text = f"""<ir_version: 8, opset_import: ["": 17]>
    agraph (float[N, 20] x) => (float[N, 20] y) {{ {body} }}"""
    model = parse(text, {k: rng.normal(size=s).astype("f4") for k, s in weights.items()})
    result = compress(model, calibration=rows(rng, 8), rank=6, fisher=True, **OPTIONS)
    notes = [note for note in result.report.notes if "not weighted by Fisher information: " in note]
    assert [why in note for note in notes] == [True]
    assert {layer.energy_of for layer in result.report.layers} == {"output"}


ODD = """<ir_version: 8, opset_import: ["": 17]>
agraph (float[N, 20] x) => (float[N, 20] y) <float[20, 20] w, int64 axis>
{ h = MatMul(x, w)
  [odd] y = CumSum(h, axis) }"""


def test_an_operator_without_a_derivative_leaves_all_as_it_is(rng: np.random.Generator) -> None:
    weights = {"w": rng.normal(size=(20, 20)).astype("f4"), "axis": np.array(1, np.int64)}
    model, fit = parse(ODD, weights), rows(rng, 20)
    options = {**OPTIONS, "rank": 6, "calibration": fit}
    weighed = compress(model, fisher=True, **options)
    plain = compress(model, effort="quick", **options)
    wanted = "errors are not weighted by Fisher information: operator CumSum at node 'odd' has no"
    assert any(wanted in note for note in weighed.report.notes)
    assert error(plain.model, weighed.model, fit) == 0.0
    with pytest.raises(DerivativeError, match="operator CumSum at node 'odd' has no derivative"):
        felt_by(model, fit)


def test_one_sample_is_not_weighed_and_says_so(two: onnx.ModelProto, tmp_path: Path) -> None:
    np.savez(tmp_path / "one.npz", x=np.ones((1, 20), np.float32))
    result = compress(two, data=tmp_path / "one.npz", fisher=True, rank=6, **OPTIONS)
    assert any("Fisher information: there are no samples" in note for note in result.report.notes)


def test_what_no_output_feels(rng: np.random.Generator) -> None:
    text = """<ir_version: 8, opset_import: ["": 17]>
    agraph (float[N, 20] x) => (int64[N] y) <float[20, 20] w>
    { h = MatMul(x, w)
      y = ArgMax<axis = 1, keepdims = 0>(h) }"""
    model = parse(text, {"w": rng.normal(size=(20, 20)).astype("f4")})
    with pytest.raises(DerivativeError, match="no output of the model is a float"):
        felt_by(model, rows(rng, 4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "fisher=True needs calibration=… or data=… or load_stats=…"),
        (
            {"data": "x.npz", "calibrate": False},
            "fisher=True and calibrate=False exclude each other",
        ),
    ],
)
def test_it_needs_samples(two: onnx.ModelProto, options: Mapping[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        compress(two, fisher=True, **options)


def test_the_command_says_what_energy_it_is(
    two: onnx.ModelProto,
    rng: np.random.Generator,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    onnx.save(two, tmp_path / "in.onnx")
    np.savez(tmp_path / "data.npz", x=rng.normal(size=(200, 20)).astype("f4"))
    arguments = [str(tmp_path / "in.onnx"), str(tmp_path / "out.onnx"), "--energy", "0.9"]
    arguments += ["--data", str(tmp_path / "data.npz"), "--fisher", "--no-bench"]
    arguments += ["--report", str(tmp_path / "report.json")]
    assert exit_code(arguments) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "energy and error of the outputs, weighted by Fisher information" in shown
    report = json.loads((tmp_path / "report.json").read_text())
    assert "fisher" in report["seconds"]
    assert {layer["energy_of"] for layer in report["layers"]} == {"fisher"}
