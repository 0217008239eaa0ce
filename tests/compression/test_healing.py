"""Healing as a part of a run: with goals, formats, and what it refuses."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper
import onnx_ir as ir
import pytest

from onnx_lowrank import compress
from onnx_lowrank.cli.program import exit_code
from onnx_lowrank.errors import InputError, UsageError
from onnx_lowrank.fitting.heal import Healed, HealPlan, heal
from onnx_lowrank.graph.elements import elements_of, install
from onnx_lowrank.graph.spool import Spool
from onnx_lowrank.runtime.session import open_session, run
from tests.helpers.healing import calibration, error, opener, parted, perceptron, samples
from tests.helpers.models import parse


def test_compress_heals(tmp_path: Path) -> None:
    path = calibration(tmp_path)
    options: dict[str, Any] = {
        "rank": 8,
        "include": ["first"],
        "min_gain": 0.0,
        "data": path,
        "samples": 40,
        "calibration_samples": 360,
        "bench": False,
        "threads": 1,
    }
    plain = compress(perceptron(), **options)
    better = compress(perceptron(), **options, heal=150, heal_at=["a"])
    assert plain.report.healing is None
    healing = better.report.healing
    assert healing is not None
    assert healing.steps == 150
    assert healing.values == ("y", "a")
    assert healing.error_after < healing.error_before
    assert healing.trained == 3
    # 360 samples are left to fit to: 324 in batches of 16, and 36 that judge.
    assert (healing.batches, healing.held_out) == (21, 3)
    errors = [
        report.check.providers[0].outputs[0].relative_l2
        for report in (plain.report, better.report)
        if report.check is not None
    ]
    assert errors[1] < errors[0]
    assert better.report.to_dict()["healing"]["best_step"] == healing.best_step
    assert better.report.output.parameters == plain.report.output.parameters


def test_healing_withholds_nothing_from_the_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is better for it the result is that of the same run without it."""
    monkeypatch.setattr("onnx_lowrank.compression.assemble.HealPlan", partial(HealPlan, rate=30.0))
    options: dict[str, Any] = {"rank": 8, "min_gain": 0.0, "bench": False}
    plain = compress(perceptron(), calibration=samples(48), effort="quick", **options)
    tried = compress(perceptron(), calibration=samples(48), heal=5, **options)
    calibration, healing = tried.report.calibration, tried.report.healing
    assert calibration is not None
    assert healing is not None
    # A quarter of 48 checks, at most 16; the other 36 calibrate, a tenth of which judges healing.
    assert calibration.samples == 36
    assert (healing.batches, healing.held_out, healing.best_step) == (32, 4, 0)
    for name in plain.model.graph.initializers:
        one, other = (elements_of(result.model, name) for result in (plain, tried))
        np.testing.assert_array_equal(one, other)


def test_names_are_those_of_the_simplified_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """`c` is another value once onnxsim has folded the normalization behind it."""
    rng = np.random.default_rng(0)
    proto = parse(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        agraph (float[N,8,4,4] x) => (float[N,6] y) {
            c = Conv (x, K)
            b = BatchNormalization (c, s, o, mean, var)
            f = Flatten (b)
            y = MatMul (f, W)
        }
        """,
        {
            "K": rng.normal(size=(16, 8, 1, 1)).astype(np.float32),
            "s": np.full(16, 5.0, np.float32),
            "o": np.full(16, 3.0, np.float32),
            "mean": rng.normal(size=16).astype(np.float32),
            "var": np.full(16, 0.1, np.float32),
            "W": rng.normal(size=(256, 6)).astype(np.float32) / 9,
        },
    )
    originals: list[ir.Model] = []

    def caught(model: ir.Model, original: ir.Model, *rest: Any) -> Healed:
        originals.append(original)
        return heal(model, original, *rest)

    monkeypatch.setattr("onnx_lowrank.compression.assemble.heal", caught)
    feeds = [{"x": rng.normal(size=(8, 8, 4, 4)).astype(np.float32)} for _ in range(12)]
    result = compress(
        proto, rank=3, ops=["conv", "matmul"], min_gain=0.0, calibration=feeds, heal=2, bench=False
    )
    (original,) = originals
    assert [node.op_type for node in original.graph] == ["Conv", "Flatten", "MatMul"]
    healing = result.report.healing
    assert healing is not None
    want, got = opener(original)(feeds[0])["y"], opener(ir.from_proto(proto))(feeds[0])["y"]
    np.testing.assert_allclose(want, got, rtol=1e-3, atol=1e-3)


def test_the_command_heals_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(perceptron(), tmp_path / "in.onnx")
    arguments = [
        str(tmp_path / "in.onnx"), str(tmp_path / "out.onnx"), "--rank", "8", "--min-gain", "0",
        "--include", "first", "--data", str(calibration(tmp_path)), "--heal", "20", "--no-bench",
    ]  # fmt: skip
    assert exit_code(arguments) == 0
    assert "healing: held-out error" in capsys.readouterr().out
    session = open_session(tmp_path / "out.onnx", threads=1)
    assert run(session, samples(1)[0], "it")["y"].shape == (8, 6)


def test_an_unknown_operator_writes_nothing(tmp_path: Path) -> None:
    model = parse(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        agraph (float[N,24] x) => (float[N,32] y) {
            h = MatMul (x, W)
            [odd] y = CumSum (h, axis)
        }
        """,
        {
            "W": np.random.default_rng(0).normal(size=(24, 32)).astype(np.float32),
            "axis": np.array(1, np.int64),
        },
    )
    onnx.save(model, tmp_path / "in.onnx")
    data = calibration(tmp_path)
    with pytest.raises(InputError, match="operator CumSum at node 'odd' has no derivative"):
        compress(tmp_path / "in.onnx", rank=4, data=data, heal=5, simplify=False, bench=False)
    arguments = [str(tmp_path / "in.onnx"), str(tmp_path / "out.onnx"), "--rank", "4", "--data",
                 str(data), "--heal", "5", "--no-bench"]  # fmt: skip
    assert exit_code(arguments) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.onnx", "samples.npz"]


def test_scales_of_codes_are_trained(tmp_path: Path) -> None:
    """Of weights that are rounded to nearest; blocks of 24 rows are not full."""
    proto = perceptron()
    original = ir.from_proto(proto)
    model = compress(
        proto, energy=1.0, weights="4", calibrate=False, simplify=False, check=False, bench=False
    ).model
    scales = tuple(name for name in model.graph.initializers if name.endswith(".scales"))
    assert len(scales) == 2
    fresh = [{"x": np.random.default_rng(99).normal(size=(200, 24)).astype(np.float32)}]
    before = error(model, original, fresh)
    found = heal(
        model,
        original,
        (*scales, "b1", "b2"),
        *parted(samples(60)),
        None,
        opener,
        HealPlan(steps=150, rate=4e-3),
        lambda _: None,
    )
    assert found.best_step > 0
    assert {found.arrays[name].dtype for name in scales} == {np.dtype(np.float16)}
    with Spool(tmp_path) as spool:
        install(model, found.arrays, spool)
        assert error(model, original, fresh) < 0.95 * before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heal": 5}, "heal=… needs calibration=… or data=…"),
        ({"heal_at": ["h"]}, "heal_at=… needs heal=…"),
        ({"heal": -1}, "heal=…: expected a whole number from 0"),
        ({"heal": 5, "data": "x.npz", "calibrate": False}, "heal=… and calibrate=False exclude"),
        ({"heal": 5, "data": "x.npz", "dry_run": True}, "heal=… and dry_run=True exclude"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        compress(perceptron(), **options)


def test_nothing_to_heal_is_said(tmp_path: Path) -> None:
    result = compress(perceptron(), rank=32, data=calibration(tmp_path), heal=5, bench=False)
    assert result.report.healing is None
    assert any("nothing to heal" in note for note in result.report.notes)


def test_constant_nodes_are_trained_too(tmp_path: Path) -> None:
    proto = perceptron()
    proto.ir_version = 3
    for tensor in proto.graph.initializer:  # before version 4 initializers are inputs too
        proto.graph.input.append(
            onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        )
    result = compress(
        proto, rank=8, include=["first"], min_gain=0.0, data=calibration(tmp_path), heal=50,
        constant_inputs=True, simplify=False, bench=False, threads=1,
    )  # fmt: skip
    assert not any("lowrank" in name for name in result.model.graph.initializers)
    healing = result.report.healing
    assert healing is not None
    assert healing.error_after < healing.error_before


def test_biases_that_are_default_values_of_inputs_are_trained_too(tmp_path: Path) -> None:
    """As models before IR 4 have all of their constants."""
    options: dict[str, Any] = {
        "rank": 8, "include": ["first"], "min_gain": 0.0, "data": calibration(tmp_path),
        "samples": 40, "calibration_samples": 360, "bench": False, "threads": 1, "heal": 20,
    }  # fmt: skip
    model = perceptron()
    for tensor in model.graph.initializer:
        own = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        model.graph.input.append(own)
    found = compress(model, **options, constant_inputs=True).report.healing
    plain = compress(perceptron(), **options).report.healing
    assert found is not None
    assert plain is not None
    assert found.trained == plain.trained == 3
    assert found.error_after == pytest.approx(plain.error_after, rel=1e-3)
