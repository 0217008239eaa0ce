"""The whole command on real models; ``python models/get.py --all`` fetches and makes them."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from onnx_lowrank.cli.program import exit_code
from onnx_lowrank.numerics.arrays import Array
from tests.helpers.models import (
    linear_model,
    parameters,
    uniform,
)
from tests.helpers.places import CACHE

# Model -> how many linear maps it has at least.
MODELS = {
    "captcha": 81,
    "cnn": 2,
    "magika": 2,
    "minilm-l3": 18,
    "minilm-l3-static": 18,
    "minilm-l6-dynamo": 36,
    "mlp-dynamo": 3,
    "mlp-sklearn": 3,
    "mlp-torchscript": 3,
    "ppocrv4-rec": 9,
    "ppocrv5-rec": 5,
    "vit": 17,
}

pytestmark = pytest.mark.slow


def cached(name: str) -> Path:
    path = CACHE / f"{name}.onnx"
    if not path.exists():
        pytest.skip(f"models/cache/{name}.onnx is missing: python models/get.py {name}")
    return path


def compress(source: Path, folder: Path, *options: object) -> tuple[Path, dict[str, Any]]:
    """Run the command; OUT and the report."""
    out, report = folder / "out.onnx", folder / "report.json"
    args = [source, out, "--report", report, *options]
    assert exit_code([str(arg) for arg in args]) == 0
    found: dict[str, Any] = json.loads(report.read_text())
    agrees_with_files(found, source, out)
    return out, found


def agrees_with_files(report: dict[str, Any], source: Path, out: Path) -> None:
    """Compare the report with an independent count of both files."""
    for key, path in (("input", source), ("output", out)):
        counted = parameters(onnx.load(path), integers=True)
        assert report[key] == {
            "path": str(path),
            "bytes": path.stat().st_size,
            "parameters": counted,
            "digest": hashlib.sha256(path.read_bytes()).hexdigest() if key == "input" else None,
        }
        side = {"input": "before", "output": "after"}[key]
        assert report["totals"][f"parameters_{side}"] == counted
    sizes = {t.name: math.prod(t.dims) for t in onnx.load(out).graph.initializer}
    for layer in report["layers"]:
        if layer["status"] == "factored" and not layer["shared"]:
            pair = [
                sizes[node.input[1]]
                for node in onnx.load(out).graph.node
                if node.name.startswith(layer["name"]) and len(node.input) > 1
                if node.input[1] in sizes and "lowrank" in node.input[1]
            ]
            if len(pair) == 2:  # a weight on the right, of a node with a name
                assert sum(pair) == layer["parameters_after"]


def check_layers(report: dict[str, Any]) -> None:
    for layer in report["layers"]:
        assert layer["status"] in ("factored", "dense")
        assert layer["reason"]
        if layer["status"] == "dense":
            assert layer["rank"] is None
            continue
        m, n = layer["shape"]
        assert 1 <= layer["rank"] <= min(m, n)
        assert layer["parameters_after"] == layer["slices"] * layer["rank"] * (m + n)
        assert layer["parameters_after"] <= 0.9 * layer["parameters_before"]
        assert layer["energy"] >= 0.9
        assert 0 <= layer["weight_error"] <= math.sqrt(0.1) + 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_energy_090_goes_through(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = cached(name)
    out, report = compress(source, tmp_path, "--energy", 0.9, "--samples", 1, "--no-bench")
    assert capfd.readouterr().err == ""
    assert len(report["layers"]) >= MODELS[name]
    check_layers(report)
    totals = report["totals"]
    if any(layer["status"] == "factored" for layer in report["layers"]):
        assert totals["linear_parameters_after"] < totals["linear_parameters_before"]
    assert report["check"]["samples"] == 1
    onnx.checker.check_model(str(out), full_check=True)
    ort.InferenceSession(str(out), providers=["CPUExecutionProvider"])


def ids(rng: np.random.Generator, *shape: int) -> dict[str, Array]:
    return {
        "input_ids": rng.integers(0, 30000, shape),
        "attention_mask": np.ones(shape, np.int64),
    }


def test_full_rank_agrees_with_the_original(tmp_path: Path) -> None:
    source = cached("minilm-l3")
    options = ("--energy", "1.0", "--min-gain", "-1", "--samples", 2, "--no-bench")
    out, report = compress(source, tmp_path, *options)
    linear = [layer for layer in report["layers"] if layer["op_type"] == "MatMul"]
    assert len(linear) == 18
    assert all(layer["status"] == "factored" for layer in linear)
    for output in report["check"]["providers"][0]["outputs"]:
        assert output["relative_l2"] < 1e-4
    # The same once more, with nothing of this package.
    before, after = (ort.InferenceSession(str(path)) for path in (source, out))
    names = {item.name for item in before.get_inputs()}
    feed = ids(np.random.default_rng(0), 2, 24)
    feed = {name: feed.get(name, np.zeros((2, 24), np.int64)) for name in names}
    for a, b in zip(before.run(None, feed), after.run(None, feed), strict=True):
        assert np.linalg.norm(b - a) < 1e-4 * np.linalg.norm(a)


def test_real_data_for_a_classifier(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = cached("mlp-sklearn")
    data = CACHE / "mlp-sklearn.data.npz"
    if not data.exists():
        pytest.skip(f"{data.name} is missing")
    # The classifier itself, 512×10, has nothing to give: half of it cannot tell ten classes apart.
    options = ("--keep", 0.5, "--exclude", "MatMul2", "--no-simplify")
    _, report = compress(source, tmp_path, "--data", data, *options)
    assert report["check"]["data"] == str(data)
    outputs = {o["name"]: o for o in report["check"]["providers"][0]["outputs"]}
    assert outputs["probabilities"]["top1_agreement"] > 0.9
    assert "top-1 agreement" in capfd.readouterr().out
    assert report["latency"][0]["pairs"] > 0


@pytest.mark.parametrize(
    ("size", "rank", "before", "after"),
    [(1000, 10, 1_000_000, 20_000), (4096, 512, 16_777_216, 4_194_304)],
)
def test_the_figures_that_are_promised(
    size: int,
    rank: int,
    before: int,
    after: int,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    source = tmp_path / "in.onnx"
    onnx.save(linear_model(uniform([size, size], np.random.default_rng(0))), source)
    options = ("--rank", rank, "--no-simplify", "--no-bench", "--samples", 1)
    out, report = compress(source, tmp_path, *options)
    (layer,) = report["layers"]
    assert (layer["parameters_before"], layer["parameters_after"]) == (before, after)
    assert parameters(onnx.load(source)) == before
    assert parameters(onnx.load(out)) == after
    shown = capfd.readouterr().out
    assert f"{before:,}" in shown
    assert f"{after:,}" in shown
    change = {1000: "-98.0 %  50.00×", 4096: "-75.0 %  4.00×"}[size]
    assert change in shown
