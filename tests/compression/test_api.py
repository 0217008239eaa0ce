"""The library: `onnx_lowrank.compress`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnx.checker
import onnx.numpy_helper
import onnx_ir as ir
import pytest

import onnx_lowrank
from onnx_lowrank import GateError, InputError, LowRankError, Report, UsageError, compress
from onnx_lowrank.schema.report import REPORT_VERSION
from tests.helpers.models import (
    assert_same,
    distance,
    factored,
    known_rank,
    linear_model,
    op_types,
    parameters,
    parse,
    run_ort,
    uniform,
)

M, N, RANK = 32, 24, 4


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(3)


@pytest.fixture
def model(rng: np.random.Generator) -> onnx.ModelProto:
    return linear_model(known_rank(M, N, RANK, rng), bias=uniform((N,), rng))


def perceptron(rng: np.random.Generator, dtype: npt.DTypeLike = np.float32) -> onnx.ModelProto:
    kind = "float" if dtype is np.float32 else "double"
    return parse(
        f"""<ir_version: 8, opset_import: ["": 17]>
        mlp ({kind}[B, {M}] x) => ({kind}[B, 10] y) {{
            a = Gemm <transB = 1> (x, W1, b1)
            r = Relu(a)
            h = MatMul(r, W2)
            s = Add(b2, h)
            t = Tanh(s)
            y = Gemm(t, W3, b3)
        }}""",
        {
            "W1": uniform((48, M), rng, dtype),
            "b1": uniform((48,), rng, dtype),
            "W2": uniform((48, 40), rng, dtype),
            "b2": uniform((40,), rng, dtype),
            "W3": uniform((40, 10), rng, dtype),
            "b3": uniform((10,), rng, dtype),
        },
    )


def save_beside(model: onnx.ModelProto, path: Path) -> None:
    """Save it with its weights in ``in.data``; onnx.save alone would take them out of it."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    onnx.save(copy, path, save_as_external_data=True, location="in.data", size_threshold=0)


# --- what it takes


def test_a_path_a_protobuf_and_an_ir_model_give_the_same(
    model: onnx.ModelProto, tmp_path: Path
) -> None:
    path = tmp_path / "in.onnx"
    onnx.save(model, path)
    results = [factored(given, rank=RANK) for given in (path, model, ir.from_proto(model))]
    results.append(compress(str(path), rank=RANK, simplify=False, check=False, bench=False))
    protos = [ir.to_proto(result.model).graph for result in results]
    assert all(proto == protos[0] for proto in protos)
    assert [result.report.input.path for result in results] == [
        str(path),
        None,
        None,
        str(path),
    ]
    assert results[0].report.input.bytes == path.stat().st_size


def test_the_input_is_not_changed(model: onnx.ModelProto, tmp_path: Path) -> None:
    path = tmp_path / "in.onnx"
    onnx.save(model, path)
    before, on_disk = model.SerializeToString(), path.read_bytes()
    graph = ir.from_proto(model)
    nodes, text = list(graph.graph), ir.to_proto(graph).SerializeToString()
    for given in (model, graph, path):
        result = factored(given, rank=RANK)
        assert op_types(result.model) == ["MatMul", "MatMul", "Add"]
    assert model.SerializeToString() == before
    assert path.read_bytes() == on_disk
    assert list(graph.graph) == nodes
    assert ir.to_proto(graph).SerializeToString() == text


def test_the_result_outlives_the_input(model: onnx.ModelProto, tmp_path: Path) -> None:
    path = tmp_path / "in.onnx"
    save_beside(model, path)
    result = factored(path, rank=RANK)
    result.save(tmp_path / "out.onnx")
    path.unlink()
    (tmp_path / "in.data").unlink()
    feeds = {"x": uniform((3, M), np.random.default_rng(0))}
    assert_same(model, onnx.load(tmp_path / "out.onnx"), feeds)


def test_external_data_is_not_changed(model: onnx.ModelProto, tmp_path: Path) -> None:
    path, data = tmp_path / "in.onnx", tmp_path / "in.data"
    save_beside(model, path)
    before = path.read_bytes(), data.read_bytes()
    result = factored(path, rank=RANK)
    result.save(tmp_path / "out.onnx", external_data="always")
    assert (path.read_bytes(), data.read_bytes()) == before
    written = onnx.load(tmp_path / "out.onnx")
    onnx.checker.check_model(written, full_check=True)
    assert_same(model, written, {"x": uniform((3, M), np.random.default_rng(0))})


def test_public_names() -> None:
    for name in onnx_lowrank.__all__:
        assert getattr(onnx_lowrank, name) is not None
    for error in (GateError, InputError, UsageError):
        assert issubclass(error, LowRankError)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = onnx_lowrank.nonsense


# --- what it does


@pytest.mark.parametrize(("dtype", "within"), [(np.float32, 1e-5), (np.float64, 1e-13)])
def test_full_rank_of_everything_is_the_same_model(
    dtype: type, within: float, rng: np.random.Generator
) -> None:
    model = perceptron(rng, dtype)
    result = factored(model, energy=1.0, min_gain=-1.0)
    assert [layer.status for layer in result.report.layers] == ["factored"] * 3
    assert [layer.rank for layer in result.report.layers] == [M, 40, 10]
    assert_same(model, result.model, {"x": uniform((7, M), rng, dtype)}, within=within)


def test_a_lower_energy_is_a_smaller_and_a_worse_model(rng: np.random.Generator) -> None:
    model = perceptron(rng)
    feeds = {"x": uniform((20, M), rng)}
    exact = run_ort(model, feeds)["y"]
    sizes, errors = [], []
    for energy in (0.99, 0.9, 0.7, 0.4):
        result = factored(model, energy=energy, min_gain=-1.0, rank_multiple=1)
        sizes.append(parameters(result.model))
        errors.append(distance(run_ort(result.model, feeds)["y"], exact))
    assert sizes == sorted(sizes, reverse=True)
    assert errors == sorted(errors)
    assert errors[0] < 0.3 < errors[-1]


def test_report_figures_are_those_of_an_independent_count(rng: np.random.Generator) -> None:
    model = perceptron(rng)
    result = factored(model, keep=0.5, rank_multiple=1)
    report = result.report
    assert report.totals.parameters_before == report.input.parameters == parameters(model)
    assert report.totals.parameters_after == report.output.parameters
    assert report.output.parameters == parameters(result.model, integers=True)
    saved = report.totals.linear_parameters_before - report.totals.linear_parameters_after
    assert parameters(model) - parameters(result.model) == saved
    assert report.totals.linear_parameters_before == 48 * M + 48 * 40 + 40 * 10
    for layer in report.layers:
        assert layer.shape is not None
        m, n = layer.shape
        assert layer.rank is not None
        assert layer.parameters_after == layer.rank * (m + n) <= 0.5 * m * n
    names = {tensor.name: tensor for tensor in ir.to_proto(result.model).graph.initializer}
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    second = report.layers[1]
    product = onnx.numpy_helper.to_array(
        names[f"{second.name}.lowrank_A"]
    ) @ onnx.numpy_helper.to_array(names[f"{second.name}.lowrank_B"])
    error = np.linalg.norm(weights["W2"] - product) / np.linalg.norm(weights["W2"])
    assert second.weight_error == pytest.approx(error, rel=1e-4)


def test_check_and_macs(model: onnx.ModelProto) -> None:
    result = compress(model, rank=RANK, simplify=False, bench=False, samples=3, dims={"N": 5})
    report = result.report
    assert report.check is not None
    assert (report.check.data, report.check.samples) == ("random", 3)
    (provider,) = report.check.providers
    assert provider.provider == "CPUExecutionProvider"
    assert [output.name for output in provider.outputs] == ["y"]
    assert provider.outputs[0].relative_l2 < 1e-5
    assert report.totals.macs_before == 5 * M * N
    assert report.totals.macs_after == 5 * RANK * (M + N)
    assert report.latency == ()


def test_no_linear_layer_is_a_valid_copy(rng: np.random.Generator) -> None:
    model = parse(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[3, 4] x) => (float[3, 4] y) { y = Relu(x) }"""
    )
    result = factored(model)
    assert result.report.layers == ()
    assert any("no linear map" in note for note in result.report.notes)
    assert_same(model, result.model, {"x": uniform((3, 4), rng)})


def test_a_model_that_the_runtime_cannot_run_is_written_all_the_same(
    rng: np.random.Generator,
) -> None:
    """A bfloat16 MatMul has no kernel on the CPU, before or after."""
    model = linear_model(known_rank(M, N, RANK, rng, ml_dtypes.bfloat16))
    for check in (True, False):
        result = factored(model, rank=RANK, check=check)
        assert op_types(result.model) == ["MatMul", "MatMul"]


# --- the gate and the dry run


def test_the_gate_carries_the_report(rng: np.random.Generator) -> None:
    model = perceptron(rng)
    with pytest.raises(GateError, match=r"max_error=0.001: output 'y' is off by") as caught:
        factored(model, rank=2, check=True, max_error=0.001, samples=2)
    report = caught.value.report
    assert isinstance(report, Report)
    assert report.check is not None
    error = report.check.providers[0].outputs[0].relative_l2
    assert error > 0.001
    assert f"{error:.3g}" in str(caught.value)
    assert caught.value.exit_code == 3


def test_a_gate_that_is_met_says_nothing(model: onnx.ModelProto) -> None:
    result = factored(model, rank=RANK, check=True, max_error=1e-4, samples=2)
    assert op_types(result.model) == ["MatMul", "MatMul", "Add"]


def test_a_dry_run_decides_and_changes_nothing(model: onnx.ModelProto, tmp_path: Path) -> None:
    path = tmp_path / "in.onnx"
    onnx.save(model, path)
    dry = compress(path, rank=RANK, simplify=False, dry_run=True)
    real = factored(path, rank=RANK)
    assert op_types(dry.model) == ["MatMul", "Add"]
    assert parameters(dry.model) == parameters(model)
    assert [(row.status, row.rank, row.parameters_after) for row in dry.report.layers] == [
        (row.status, row.rank, row.parameters_after) for row in real.report.layers
    ]
    assert dry.report.output.parameters == real.report.output.parameters
    assert dry.report.check is None
    assert dry.report.layers[0].weight_error is None
    assert [file.name for file in tmp_path.iterdir()] == ["in.onnx"]


# --- the report


def test_the_report_as_json(rng: np.random.Generator, tmp_path: Path) -> None:
    report = factored(perceptron(rng), keep=0.5, check=True, samples=1, data=None).report
    text = report.to_json()
    plain = json.loads(text)
    assert plain == json.loads(json.dumps(report.to_dict()))
    assert plain["version"] == REPORT_VERSION
    assert set(plain) >= {
        "version",
        "input",
        "output",
        "layers",
        "totals",
        "check",
        "latency",
        "settings",
        "seconds",
    }
    assert set(plain["input"]) == {"path", "bytes", "parameters", "digest"}
    for row, layer in zip(plain["layers"], report.layers, strict=True):
        assert row["shape"] == list(layer.shape or ())
        assert (row["rank"], row["status"], row["reason"]) == (
            layer.rank,
            layer.status,
            layer.reason,
        )
        assert set(row) >= {"name", "op_type", "form", "parameters_before", "parameters_after"}
        assert set(row) >= {"energy", "weight_error"}
    assert plain["settings"]["keep"] == 0.5
    assert plain["settings"]["energy"] is None
    assert set(plain["seconds"]) >= {"load", "find", "measure", "rewrite", "check"}
    assert all(seconds >= 0 for seconds in plain["seconds"].values())


def test_json_has_no_nan(rng: np.random.Generator) -> None:
    """Strict JSON whatever the weights hold."""
    weight = uniform((M, N), rng)
    weight[0, 0] = np.inf
    text = factored(linear_model(weight), check=True, samples=1).report.to_json()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in the report"))


# --- options out of range


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"energy": 1.5}, "energy=…"),
        ({"energy": 0.9, "rank": 2}, "energy=… and rank=…"),
        ({"samples": 0}, "samples=…: expected a whole number from 1, got 0"),
        ({"seed": -1}, "seed=…"),
        ({"threads": 0}, "threads=…"),
        ({"max_error": -1.0}, "max_error=…"),
        ({"max_error": float("nan")}, "max_error=…"),
        ({"ops": ("matmull",)}, "ops=…"),
    ],
)
def test_options_out_of_range(
    options: dict[str, Any], message: str, model: onnx.ModelProto
) -> None:
    with pytest.raises(UsageError, match=message):
        compress(model, simplify=False, bench=False, **options)


def test_a_gate_needs_a_check(model: onnx.ModelProto) -> None:
    for check, dry_run in ((False, False), (True, True)):
        with pytest.raises(UsageError, match=r"max_error=….*exclude each other"):
            compress(
                model, simplify=False, bench=False, max_error=0.1, check=check, dry_run=dry_run
            )


def test_an_unknown_option_is_a_type_error(model: onnx.ModelProto) -> None:
    with pytest.raises(TypeError, match="enregy"):
        compress(model, enregy=0.9)  # type: ignore[call-arg]


# --- bad models


def test_bad_files(tmp_path: Path, model: onnx.ModelProto) -> None:
    with pytest.raises(InputError, match=r"missing\.onnx"):
        factored(tmp_path / "missing.onnx")
    text = tmp_path / "text.onnx"
    text.write_text("not a model at all")
    with pytest.raises(InputError, match=r"text\.onnx"):
        factored(text)
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(model.SerializeToString()[:-200])
    with pytest.raises(InputError, match=r"cut\.onnx"):
        factored(cut)


def test_missing_and_short_external_data(tmp_path: Path, model: onnx.ModelProto) -> None:
    path, data = tmp_path / "in.onnx", tmp_path / "in.data"
    save_beside(model, path)
    data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(InputError, match=r"in\.data"):
        factored(path)
    data.unlink()
    with pytest.raises(InputError, match=r"in\.data is missing"):
        factored(path)


def test_simplified_and_checked_and_timed(tmp_path: Path, rng: np.random.Generator) -> None:
    """Every stage, as by default."""
    model = parse(
        f"""<ir_version: 8, opset_import: ["": 17]>
        g (float[B, {M}] x) => (float[B, {N}] y) {{
            T = Transpose(W)
            h = MatMul(x, T)
            z = Add(h, b)
            y = Identity(z)
        }}""",
        {"W": known_rank(N, M, RANK, rng), "b": uniform((N,), rng)},
    )
    result = compress(model, energy=0.999, samples=2, allow_slower=True)
    report = result.report
    assert [layer.status for layer in report.layers] == ["factored"]
    assert report.check is not None
    (latency,) = report.latency
    assert latency.speedup.low <= latency.speedup.median <= latency.speedup.high
    assert latency.before_ms.median > 0
    assert_same(model, result.model, {"x": uniform((3, M), rng)})
