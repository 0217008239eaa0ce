"""Ranks and formats together: predictions, goals, and what every layer gets."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from onnx_lowrank import GateError, InputError, Result, compress, sweep
from onnx_lowrank.cli.program import exit_code
from onnx_lowrank.numerics.arrays import Array, Feed
from tests.helpers.models import parse

HEAD = '<ir_version: 8, opset_import: ["" : 17]>'
SIZE = 128


def weight(rng: np.random.Generator, n: int = SIZE, falls: float | None = None) -> Array:
    """A matrix of full rank, or one whose singular values fall."""
    full = rng.standard_normal((SIZE, n)) / np.sqrt(SIZE)
    if falls is not None:
        u, s, v = np.linalg.svd(full, full_matrices=False)
        full = (u * (s * np.exp(-np.arange(len(s)) / falls))) @ v
        full *= np.sqrt(n) / np.linalg.norm(full)
    return np.asarray(full, np.float32)


@pytest.fixture
def model() -> onnx.ModelProto:
    """A layer of low rank between two of full rank, the last of which counts little."""
    rng = np.random.default_rng(3)
    return parse(
        f"""{HEAD} g (float[N,{SIZE}] x) => (float[N,{SIZE}] y) {{
            [low] h = MatMul (x, A)
            a = Tanh (h)
            [full] k = MatMul (a, B)
            [side] s = MatMul (a, C)
            t = Mul (s, little)
            y = Add (k, t)
        }}""",
        {
            "A": weight(rng, falls=4.0),
            "B": weight(rng),
            "C": weight(rng),
            "little": np.array([0.1], np.float32),
        },
    )


def feeds(count: int) -> list[Feed]:
    rng = np.random.default_rng(5)
    basis = rng.standard_normal((SIZE, SIZE)) * np.exp(-np.arange(SIZE) / 30)[:, None]
    return [{"x": (rng.standard_normal((16, SIZE)) @ basis).astype("f4")} for _ in range(count)]


SAMPLES = feeds(60)


def made(model: onnx.ModelProto, **options: Any) -> Result:
    plain: dict[str, Any] = {"simplify": False, "bench": False, "calibration": SAMPLES}
    return compress(model, **{**plain, "weights": "auto", **options})


def error(result: Result) -> float:
    assert result.report.check is not None
    return result.report.check.providers[0].outputs[0].relative_l2


def formats(result: Result) -> dict[str, str | None]:
    return {layer.name: layer.format for layer in result.report.layers}


def test_every_layer_gets_what_suits_it(model: onnx.ModelProto) -> None:
    result = made(model, max_size=24_000)
    rows = {layer.name: layer for layer in result.report.layers}
    assert result.report.output.bytes <= 24_000
    assert rows["low"].rank is not None
    assert rows["low"].format is not None
    assert rows["full"].rank is None
    assert (rows["full"].format or "").startswith("4 bits")
    onnx.checker.check_model(onnx.load_from_string(_bytes(result)), full_check=True)
    # Neither ranks alone nor formats alone come near at that size.
    assert error(result) < 0.7 * error(made(model, max_size=24_000, weights="fp32"))


def _bytes(result: Result) -> bytes:
    import onnx_ir as ir

    return bytes(ir.to_proto(result.model).SerializeToString())


@pytest.mark.parametrize("share", [0.22, 0.15, 0.1])
def test_predicted_is_achieved(share: float, model: onnx.ModelProto) -> None:
    goal = made(model, keep=share).report.goal
    assert goal is not None
    assert goal.predicted_damage is not None
    assert goal.achieved_damage is not None
    assert 0.67 < goal.predicted_damage / goal.achieved_damage < 1.5
    assert 0.5 < (goal.summed_damage or 0.0) / goal.achieved_damage < 2.0


def test_keep_counts_bytes_as_they_are_stored(model: onnx.ModelProto) -> None:
    whole = 4 * 3 * SIZE * SIZE
    result = made(model, keep=0.2)
    stored = sum(
        v.const_value.nbytes
        for v in result.model.graph.initializers.values()
        if v.const_value is not None and v.name != "little"
    )
    assert 0.18 * whole < stored <= 0.2 * whole
    with pytest.raises(GateError, match=r"the least .* is .* of the linear layers' bytes"):
        made(model, keep=0.001)


def test_a_tolerance(model: onnx.ModelProto) -> None:
    sizes = []
    for limit in (0.01, 0.05, 0.2):
        result = made(model, tolerance=limit, objective="size")
        assert result.report.goal is not None
        assert (result.report.goal.loss or 1.0) <= limit
        sizes.append(result.report.output.bytes)
    assert sizes[0] > 1.2 * sizes[1] > 1.4 * sizes[2]
    floats = made(model, tolerance=0.05, objective="size", weights="fp32")
    assert sizes[1] < 0.5 * floats.report.output.bytes


def test_zero_tolerance_leaves_floats(model: onnx.ModelProto) -> None:
    result = made(model, tolerance=0.0, objective="size")
    assert set(formats(result).values()) == {None}
    assert result.model.opset_imports[""] == 17
    assert error(result) < 1e-6


def test_a_format_that_is_asked_for_alone_is_no_choice(model: onnx.ModelProto) -> None:
    result = made(model, tolerance=0.2, weights="8", objective="size")
    assert all((form or "").startswith("8 bits") for form in formats(result).values())
    with pytest.raises(GateError, match=r"the formats that were asked for the loss is .* at least"):
        made(model, tolerance=0.001, weights="4", objective="size")


def test_corrections_are_healed_with_the_codes_frozen(model: onnx.ModelProto) -> None:
    options: dict[str, Any] = {"keep": 0.16, "min_gain": 0.99}  # no pairs: 4 bits, corrected
    plain = made(model, **options)
    healed = made(model, **options, heal=40)
    assert any("+ rank" in (form or "") for form in formats(plain).values())
    assert formats(healed) == formats(plain)
    found = healed.report.healing
    assert found is not None
    assert found.best_step > 0
    assert found.error_after < 0.995 * found.error_before
    assert error(healed) < error(plain)
    # The file says how it was made, which takes some letters more.
    assert abs(healed.report.output.bytes - plain.report.output.bytes) < 400
    codes = [
        {
            n: v.const_value.numpy().tobytes()
            for n, v in own.model.graph.initializers.items()
            if n.endswith(".q4.codes") and v.const_value is not None
        }
        for own in (plain, healed)
    ]
    assert codes[0] == codes[1]


def test_a_sweep_in_bytes(model: onnx.ModelProto) -> None:
    report = sweep(
        model,
        shares=[0.25, 0.125],
        weights="fp32,8,4",
        calibration=SAMPLES,
        simplify=False,
        bench=False,
    )
    assert [point.keep for point in report.points] == [1.0, 0.25, 0.125]
    assert report.points[0].error < 1e-6
    assert report.points[1].error < report.points[2].error < 0.3
    assert report.points[2].bytes < report.points[1].bytes < 0.3 * report.points[0].bytes


def test_tables_are_options_too() -> None:
    rng = np.random.default_rng(1)
    model = parse(
        f"""{HEAD} g (int64[N] i) => (float[N,{SIZE}] y) {{
            [rows] x = Gather (E, i)
            [product] y = MatMul (x, W)
        }}""",
        {"E": rng.standard_normal((500, SIZE)).astype("f4"), "W": weight(rng)},
    )
    samples = [{"i": rng.integers(0, 500, 32)} for _ in range(40)]
    found = []
    for share in (0.27, 0.2, 0.14):
        result = made(model, keep=share, calibration=samples)
        goal = result.report.goal
        assert goal is not None
        assert 0.5 < (goal.predicted_damage or 0.0) / (goal.achieved_damage or 1.0) < 2.0
        found.append(formats(result)["rows"])
        again = compress(model, recipe=result.recipe, calibration=samples, bench=False)
        assert formats(again) == formats(result)
        assert error(again) == error(result)
    assert found[0] == "8 bits, a scale for each row"
    assert found[1] == "6 bits, blocks of 64"
    assert found[2] == "4 bits, blocks of 32"
    own = made(model, keep=0.8, calibration=samples, quantize_ops=["matmul"])
    assert formats(own)["rows"] is None
    factored = made(model, keep=0.14, calibration=samples, ops=["gather", "matmul"])
    assert error(factored) < 0.2


def test_without_samples_it_is_said(model: onnx.ModelProto) -> None:
    result = made(model, keep=0.2, calibration=None)
    notes = " ".join(result.report.notes)
    assert "rounded to nearest in 3 of 3 weights" in notes
    assert "random input" in notes
    assert error(result) < 0.3


def test_a_model_that_cannot_be_raised_keeps_floats_where_it_may() -> None:
    old = parse(
        '<ir_version: 6, opset_import: ["" : 11]> g (float[N,64] x) => (float[N,32] y) '
        '{ a = Resize <coordinate_transformation_mode="tf_half_pixel_for_nn"> (x, E, S)\n'
        " y = MatMul (a, W) }",
        {
            "W": np.random.default_rng(0).standard_normal((64, 32)).astype("f4"),
            "E": np.zeros(0, np.float32),
            "S": np.ones(2, np.float32),
        },
    )
    samples = [{"x": feed["x"][:, :64]} for feed in SAMPLES]
    result = made(old, keep=0.9, calibration=samples)
    assert any(n.startswith("all weights stay floats: ") for n in result.report.notes)
    assert result.model.opset_imports[""] == 11
    with pytest.raises(
        InputError, match="Resize of opset 11 has coordinate_transformation_mode tf"
    ):
        made(old, keep=0.9, calibration=samples, weights="8,4")


def test_zero_columns_and_inputs(model: onnx.ModelProto) -> None:
    rng = np.random.default_rng(2)
    w = weight(rng)
    w[:, 5], w[7] = 0.0, 0.0
    own = parse(
        f"{HEAD} g (float[N,{SIZE}] x) => (float[N,{SIZE}] y) {{ y = MatMul (x, W) }}", {"W": w}
    )
    samples = [{"x": feed["x"] * (np.arange(SIZE) > 9)} for feed in SAMPLES]
    result = made(own, keep=0.15, calibration=[{"x": s["x"].astype("f4")} for s in samples])
    assert error(result) < 0.1


def test_the_command(model: onnx.ModelProto, tmp_path: Any, capsys: Any) -> None:
    onnx.save(model, tmp_path / "in.onnx")
    np.savez(tmp_path / "data.npz", x=np.concatenate([feed["x"] for feed in SAMPLES]))
    files = [str(tmp_path / name) for name in ("in.onnx", "out.onnx")]
    options = ["--data", str(tmp_path / "data.npz"), "--weights", "fp32,8,4", "--no-bench"]
    assert exit_code([*files, *options, "--max-size", "24KB", "--quantize-ops", "matmul"]) == 0
    text = capsys.readouterr().out
    assert "4 bits, blocks of" in text
    assert "weights" in text
    assert (tmp_path / "out.onnx").stat().st_size <= 24_000
    assert exit_code([*files, *options, "--force"]) == 2
    assert exit_code([*files, "--weights", "auto", "--quantize-ops", "lstm"]) == 2
