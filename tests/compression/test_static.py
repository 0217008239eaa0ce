"""Static integers for targets that want them: what is written, how near it is, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnx_lowrank import InputError, Result, UsageError, compress
from onnx_lowrank.cli.program import exit_code
from onnx_lowrank.numerics.arrays import Array, Feed
from onnx_lowrank.targets import open_target
from onnx_lowrank.targets.base import Job
from onnx_lowrank.targets.support import ModelSupport, support_of
from tests.helpers.models import parse
from tests.helpers.targets import require

CHANNELS = "8 bits per channel, inputs and results in 8 bits"
ONE = "8 bits with one scale, inputs and results in 8 bits"


def weight(rng: np.random.Generator, m: int, n: int) -> Array:
    return np.asarray(rng.standard_normal((m, n)) / 8, np.float32)


def three(rng: np.random.Generator, opset: int = 17) -> onnx.ModelProto:
    """Two products of one activation, and a Gemm behind them, between nodes of floats."""
    return parse(
        f"""<ir_version: 8, opset_import: ["" : {opset}]>
        g (float[N,8,96] x) => (float[N,8,48] y) {{
            r = Tanh (x)
            [q] q = MatMul (r, Q)
            [k] k = MatMul (r, K)
            s = Add (q, k)
            a = Tanh (s)
            [last] l = MatMul (a, W)
            m = Add (l, b)
            y = Tanh (m)
        }}""",
        {
            "Q": weight(rng, 96, 80),
            "K": weight(rng, 96, 80),
            "W": weight(rng, 80, 48),
            "b": rng.standard_normal(48).astype(np.float32),
        },
    )


def feeds(rng: np.random.Generator, count: int = 40) -> list[Feed]:
    """Inputs of which a few directions hold most of the energy."""
    basis = rng.standard_normal((96, 96)) * np.exp(-np.arange(96) / 16)[:, None] / 3
    return [
        {"x": (rng.standard_normal((1, 8, 96)) @ basis).astype(np.float32)} for _ in range(count)
    ]


def error(result: Result) -> float:
    assert result.report.check is not None
    return result.report.check.providers[0].outputs[0].relative_l2


def formats(result: Result) -> set[str | None]:
    return {layer.format for layer in result.report.layers}


def taken(result: Result, provider: str) -> ModelSupport:
    """What a provider takes of a result, by the rules."""
    found = support_of(ir.to_proto(result.model), None, {}, {}).providers
    return next(own.model for own in found if own.provider == provider)


@pytest.mark.parametrize(("target", "form"), [("qnn", CHANNELS), ("nnapi", ONE)])
@pytest.mark.parametrize("goal", [{"energy": 1.0}, {"rank": 24}])
def test_all_layers(goal: dict[str, Any], target: str, form: str, rng: np.random.Generator) -> None:
    model, samples = three(rng), feeds(rng)
    common: dict[str, Any] = {"calibration": samples, "bench": False, "simplify": False, **goal}
    plain = compress(model, **common)
    wanted: dict[str, Any] = {"weights": "8", "activations": "int8", "shape_for": target}
    result = compress(model, **common, **wanted)
    proto = ir.to_proto(result.model)
    onnx.checker.check_model(proto, full_check=True)
    assert formats(result) == {form}
    assert error(result) < error(plain) + 0.03
    found = [node.op_type for node in result.model.graph]
    if target == "qnn":  # the shared input is rounded once, and what lies between two factors
        assert found.count("QuantizeLinear") == (8 if "rank" in goal else 5)
    assert not taken(result, target).left
    sizes = [value.shape for value in result.model.graph.inputs]
    assert [list(shape or ()) for shape in sizes] == [[1, 8, 96]]
    assert sum("ranges of inputs and results" in note for note in result.report.notes) == 1
    weights = [t for t in proto.graph.initializer if len(t.dims) == 2]
    assert {t.data_type for t in weights} == {onnx.TensorProto.INT8}


@pytest.mark.parametrize(
    ("goal", "weights"), [("keep", "auto"), ("keep", "8"), ("max_size", "auto")]
)
def test_chosen_beside_floats_and_ranks(goal: str, weights: str, rng: np.random.Generator) -> None:
    """What is predicted is what comes out, and a recipe makes the same again."""
    model, samples = three(rng), feeds(rng, 60)
    given = {"keep": 0.16 if weights == "8" else 0.3, "max_size": "35KB"}[goal]
    common: dict[str, Any] = {"calibration": samples, "bench": False, "simplify": False}
    common |= {goal: given}
    result = compress(model, **common, weights=weights, activations="int8", shape_for="qnn")
    assert CHANNELS in formats(result)
    found = result.report.goal
    assert found is not None
    assert 0.5 < (found.predicted_damage or 0.0) / (found.achieved_damage or 1.0) < 2.0
    again = compress(model, calibration=samples, bench=False, recipe=result.recipe)
    assert formats(again) == formats(result)
    assert error(again) == error(result)


@pytest.mark.parametrize("opset", [8, 11])  # QuantizeLinear is of opset 10
def test_an_older_model_is_raised_where_pairs_are_measured_too(
    opset: int, rng: np.random.Generator
) -> None:
    model, samples = three(rng, opset=opset), feeds(rng)
    result = compress(
        model,
        calibration=samples,
        bench=False,
        simplify=False,
        keep=0.3,
        weights="auto",
        activations="int8",
        shape_for="qnn",
    )
    assert CHANNELS in formats(result)
    assert error(result) < 0.1
    assert any(note.startswith(f"opset {opset} was raised to 13") for note in result.report.notes)


def test_what_is_asked_for_has_to_be_there(rng: np.random.Generator) -> None:
    model = three(rng)
    wanted: dict[str, Any] = {"weights": "8", "activations": "int8", "bench": False}
    without: list[dict[str, Any]] = [{}, {"data": feeds(rng, 4), "calibrate": False}]
    for why in without:
        with pytest.raises(InputError, match="ranges of static inputs come from samples"):
            compress(model, energy=1.0, shape_for="qnn", **wanted, **why)
    with pytest.raises(UsageError, match="target qnn takes no weights in blocks"):
        compress(model, energy=1.0, shape_for="qnn", weights="4", activations="int8")
    with pytest.raises(UsageError, match="target coreml multiplies no integers"):
        compress(model, energy=1.0, shape_for="coreml", **wanted)


def test_the_command(
    rng: np.random.Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    onnx.save(three(rng), tmp_path / "in.onnx")
    np.savez(tmp_path / "data.npz", x=np.concatenate([feed["x"] for feed in feeds(rng)]))
    files = [str(tmp_path / name) for name in ("in.onnx", "out.onnx")]
    options = [*files, "--energy", "1", "--for", "qnn", "--weights", "8", "--no-bench"]
    assert exit_code([*options, "--activations", "int8"]) == 1
    assert "come from samples, expected some" in capsys.readouterr().err
    assert not (tmp_path / "out.onnx").exists()
    assert exit_code(options) == 2
    assert "or --activations int8 beside 8" in capsys.readouterr().err
    options += ["--activations", "int8", "--data", str(tmp_path / "data.npz")]
    assert exit_code(options) == 0
    assert CHANNELS in capsys.readouterr().out


@pytest.mark.qnn
def test_the_emulator_takes_all_of_it(rng: np.random.Generator, tmp_path: Path) -> None:
    require("qnn")
    samples = feeds(rng)
    result = compress(
        three(rng),
        calibration=samples,
        bench=False,
        simplify=False,
        rank=24,
        weights="8",
        activations="int8",
        shape_for="qnn",
    )
    path = tmp_path / "out.onnx"
    result.save(path)
    (outcome,) = open_target("qnn").run([path], samples[:2], Job(), lambda _: None)
    assert outcome.error is None
    assert outcome.nodes is not None
    assert list(outcome.nodes) == ["QNNExecutionProvider"]
