"""A result beside int8 alone: always where formats were chosen, else where that is better."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnxruntime.quantization import QuantType, quantize_dynamic

from onnx_lowrank import compress, sweep
from onnx_lowrank.compression import int8 as int8_alone
from onnx_lowrank.compression.int8 import Figured, said
from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.schema.measures import Speedup
from tests.helpers.models import known_rank, parse, uniform

_TEXT = """<ir_version: 8, opset_import: ["": 17]> g (float[N, 96] x) => (float[N, 96] y) {
    a = MatMul(x, w1)
    b = Tanh(a)
    y = MatMul(b, w2)
}"""
_FAST: dict[str, Any] = {"bench": False, "effort": "quick"}


@pytest.fixture(autouse=True)
def _saturating(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights without a sign, whatever the processor is."""
    monkeypatch.setattr(int8_alone, "saturates", lambda: True)


def model(rank: int | None = None) -> onnx.ModelProto:
    rng = np.random.default_rng(4)
    weights = {
        name: uniform((96, 96), rng) if rank is None else known_rank(96, 96, rank, rng)
        for name in ("w1", "w2")
    }
    return parse(_TEXT, weights)


def feeds() -> list[dict[str, Array]]:
    rng = np.random.default_rng(1)
    return [{"x": uniform((8, 96), rng)} for _ in range(20)]


def notes(own: onnx.ModelProto | None = None, **options: Any) -> list[str]:
    wanted = {"data": feeds(), "keep": 0.5, **_FAST, **options}
    report = compress(model() if own is None else own, **wanted).report
    return [note for note in report.notes if "int8 alone" in note]


def test_it_is_said_with_figures_that_hold(tmp_path: Path) -> None:
    result = compress(model(), data=feeds(), calibrate=False, samples=20, keep=0.5, **_FAST)
    (note,) = [note for note in result.report.notes if "int8 alone" in note]
    plain, path = tmp_path / "plain.onnx", tmp_path / "int8.onnx"
    onnx.save(model(), plain)
    quantize_dynamic(plain, path, per_channel=True, weight_type=QuantType.QUInt8)
    sessions = [ort.InferenceSession(file) for file in (plain, path)]
    errors = []
    for feed in feeds():
        before, after = (session.run(None, feed)[0] for session in sessions)
        errors.append(np.linalg.norm(after - before) / np.linalg.norm(before))
    found = re.findall(r"([\d.]+) MB, off by ([\d.e-]+)", note)
    (size, loss), (own_size, own_loss) = [tuple(map(float, pair)) for pair in found]
    assert size == pytest.approx(path.stat().st_size / 1e6, rel=0.02)
    assert loss == pytest.approx(np.mean(errors), rel=0.05)
    assert result.report.check is not None
    (output,) = result.report.check.providers[0].outputs
    assert own_loss == pytest.approx(output.relative_l2, rel=0.05)
    assert own_size == pytest.approx(result.report.output.bytes / 1e6, rel=0.01)
    assert size < own_size
    assert loss < own_loss
    assert note.endswith("; int8 alone is the better choice here, but speed was not compared")


def test_a_sweep_says_it_once_beside_its_smallest_point() -> None:
    curve = sweep(model(), data=feeds(), shares=(0.8, 0.5), **_FAST)
    (note,) = [note for note in curve.notes if "int8 alone" in note]
    assert note.startswith("at shares=… 0.5: int8 alone ")
    size = re.findall(r"this result: ([\d.]+) MB", note)[0]
    assert float(size) == pytest.approx(curve.points[-1].bytes / 1e6, rel=0.01)


def test_the_metric_of_the_user_decides() -> None:
    (note,) = notes(metric="cosine", keep=None, tolerance=0.2, objective="size")
    assert note.count(" by cosine;") == 2


@pytest.mark.parametrize(
    "options",
    [
        {"data": None, "dims": {"N": 4}},  # random input is no judge
        {"check": False},
        {"weights": "8"},
        {"shape_for": "qnn"},  # which runs no such model
        {"shape_for": "webgpu"},
        {"dry_run": True},
        {"keep": 0.1},  # int8 cannot be as small
    ],
    ids=("random", "check", "weights", "qnn", "webgpu", "dry", "small"),
)
def test_elsewhere_nothing_is_said(options: dict[str, Any]) -> None:
    assert notes(**options) == []


def test_a_layer_of_low_rank_is_better_as_a_pair() -> None:
    assert notes(model(rank=30), keep=None, energy=0.999999) == []


def test_values_inside_that_count_as_outputs_count_for_both() -> None:
    (note,) = notes(judge_at=("b",))
    assert "int8 alone is the better choice" in note


def test_a_quantizer_that_fails_is_said_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise ValueError("Failed to find\n proper ai.onnx domain")

    monkeypatch.setattr(int8_alone, "quantize_dynamic", fails)
    assert notes() == ["not compared with int8 alone: Failed to find proper ai.onnx domain"]
    monkeypatch.setattr(int8_alone, "LARGEST", 1000)
    assert notes() == ["not compared with int8 alone: the model is above 0 MB"]


def test_weights_of_another_type_are_said() -> None:
    rng = np.random.default_rng(4)
    own = parse(
        _TEXT.replace("float[", "float16["),
        {name: uniform((96, 96), rng, np.float16) for name in ("w1", "w2")},
    )
    halves = [{"x": feed["x"].astype(np.float16)} for feed in feeds()]
    (note,) = notes(own, data=halves, keep=0.7)
    assert "takes weights of float32, got float16" in note
    assert not notes(own, data=halves, keep=0.2)  # int8 would not be smaller


def test_memory_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8_alone, "TIMES", 10**9)
    (note,) = notes()
    assert note.startswith("not compared with int8 alone: it takes about ")
    assert "memory=…" in note


def test_a_model_of_which_nothing_is_quantized_is_none(tmp_path: Path) -> None:
    text = _TEXT.replace("MatMul(x, w1)", 'Einsum <equation = "bm,mn->bn"> (x, w1)')
    text = text.replace("MatMul(b, w2)", 'Einsum <equation = "bm,mn->bn"> (b, w2)')
    rng = np.random.default_rng(4)
    other = parse(text, {name: uniform((96, 96), rng) for name in ("w1", "w2")})
    assert int8_alone.quantized_alone(ir.from_proto(other), tmp_path, QuantType.QUInt8) is None
    assert int8_alone.quantized_alone(ir.from_proto(model()), tmp_path, QuantType.QInt8)


@pytest.mark.parametrize("saturating", [True, False])
def test_weights_have_the_faster_sign_that_is_exact(
    saturating: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8_alone, "saturates", lambda: saturating)
    (kind,) = int8_alone.kinds_for(ir.from_proto(model()))
    path = int8_alone.quantized_alone(ir.from_proto(model()), tmp_path, kind)
    assert path is not None
    kinds = {value.data_type for value in onnx.load(path).graph.initializer if len(value.dims) == 2}
    assert kinds == {onnx.TensorProto.UINT8 if saturating else onnx.TensorProto.INT8}
    figured = int8_alone.Figured(1000, 0.1)
    assert ("QUInt8" in int8_alone.said(figured, figured, kind)) == saturating


_CONV = """<ir_version: 8, opset_import: ["": 17]>
g (float[N, 16, 16, 16] x) => (float[N, 32, 16, 16] y) {
    y = Conv <pads = [1, 1, 1, 1]> (x, w)
}"""


def test_a_model_with_convolutions_is_compared_with_the_faster_kind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(int8_alone, "saturates", lambda: False)
    rng = np.random.default_rng(4)
    own = parse(_CONV, {"w": uniform((32, 16, 3, 3), rng)})
    assert int8_alone.kinds_for(ir.from_proto(own)) == (QuantType.QInt8, QuantType.QUInt8)
    made: list[QuantType] = []
    quantizes = int8_alone.quantized_alone

    def counted(model: ir.Model, folder: Path, kind: QuantType) -> Path | None:
        made.append(kind)
        return quantizes(model, folder, kind)

    monkeypatch.setattr(int8_alone, "quantized_alone", counted)
    data = [{"x": uniform((2, 16, 16, 16), rng)} for _ in range(20)]
    options: dict[str, Any] = {"ops": ("conv",), "weights": "auto", "effort": "quick"}
    report = compress(own, data=data, keep=0.3, **options).report
    (note,) = [note for note in report.notes if "int8 alone" in note]
    assert made == [QuantType.QInt8, QuantType.QUInt8]
    (name,) = re.findall(r"per channel, (QU?Int8)", note)
    (speed, _) = re.findall(r"([\d.]+)× as fast", note)
    assert name in ("QInt8", "QUInt8")
    assert float(speed) > 0.0


def test_the_root_log_is_as_before(caplog: pytest.LogCaptureFixture) -> None:
    before = logging.getLogger().disabled
    (_,) = notes()
    assert logging.getLogger().disabled == before
    assert not [record for record in caplog.records if "pre-processing" in record.getMessage()]


OWN = (10_000_000, 0.1, 1.5)


def figures(size: float, error: float, speed: float) -> Figured:
    return Figured(int(size), error, Speedup(speed, speed, speed, (speed - 0.1, speed + 0.1)))


@pytest.mark.parametrize(
    ("other", "better"),
    [
        ((9_000_000, 0.09, 1.6), True),
        ((10_100_000, 0.1, 1.45), True),  # equal, within what is measured
        ((11_000_000, 0.05, 2.0), False),
        ((5_000_000, 0.2, 2.0), False),
        ((5_000_000, 0.05, 1.2), False),
    ],
)
def test_when_int8_alone_is_the_better_choice(
    other: tuple[float, float, float], better: bool
) -> None:
    text = said(figures(*other), figures(*OWN), QuantType.QUInt8)
    assert text.endswith("int8 alone is the better choice here") == better
    assert "this result: 10 MB, off by 0.1, 1.50× as fast" in text


def test_it_is_measured_where_formats_are_chosen() -> None:
    rng = np.random.default_rng(0)
    model = parse(
        """<ir_version: 8, opset_import: ["" : 17]> g (float[N,64] x) => (float[N,64] y) {
            h = MatMul (x, W)
            a = Tanh (h)
            y = MatMul (a, V)
        }""",
        {name: (rng.standard_normal((64, 64)) / 8).astype("f4") for name in "WV"},
    )
    samples = [{"x": rng.standard_normal((8, 64)).astype("f4")} for _ in range(40)]
    said_by = {}
    for weights in ("8", "8,4"):
        report = compress(model, max_size="30KB", weights=weights, data=samples).report
        said_by[weights] = [note for note in report.notes if "int8 alone" in note]
    assert not said_by["8"]
    (note,) = said_by["8,4"]
    assert note.startswith("int8 alone (quantize_dynamic, per channel, QUInt8): ")
    assert "not compared" not in note
