"""Whole runs of models with sequences and optional values in and out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import pytest

from onnx_lowrank import InputError, Result, check, compress, sweep
from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.runtime.session import open_session, run
from onnx_lowrank.schema.measures import Check
from tests.helpers.models import known_rank, parse

HEAD = '<ir_version: 8, opset_import: ["": 17]>'
# Rows of several lengths in, and as many out.
ROWS = f"""{HEAD} g (seq(float[n, 32]) x, float[1, 32] bias) => (seq(float[m, 16]) y) {{
    all = ConcatFromSequence <axis = 0> (x)
    moved = Add (all, bias)
    h = MatMul (moved, V)
    s = Tanh (h)
    z = MatMul (s, W)
    one = Constant <value = int64[1] {{1}}> ()
    y = SplitToSequence <axis = 0> (z)
}}"""
# Ends in a branch whose size depends on what is computed.
BRANCH = f"""{HEAD} g (float[6, 32] x) => (float[k, 16] y) {{
    h = MatMul (x, V)
    z = MatMul (h, W)
    sum = ReduceSum <keepdims = 0> (z)
    zero = Constant <value = float {{0}}> ()
    up = Greater (sum, zero)
    y = If (up) <
        then_branch = t () => (float[k, 16] p) {{
            signs = Greater (z, zero)
            last = Constant <value = int64[1] {{1}}> ()
            counts = Cast <to = 1> (signs)
            most = ReduceMax <axes = [1], keepdims = 0> (counts)
            some = Cast <to = 9> (most)
            p = Compress <axis = 0> (z, some)
        }},
        else_branch = e () => (float[k, 16] q) {{ q = Identity (z) }}
    >
}}"""
WEIGHTS = {
    "V": known_rank(32, 24, 6, np.random.default_rng(0), scale=0.25),
    "W": known_rank(24, 16, 5, np.random.default_rng(1), scale=0.25),
}


def saved(folder: Path, text: str) -> Path:
    path = folder / "in.onnx"
    onnx.save(parse(text, WEIGHTS), path)
    return path


def sample(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    rows = [rng.standard_normal((count, 32), np.float32) for count in rng.integers(1, 4, 3)]
    return {"x": rows, "bias": rng.standard_normal((1, 32), np.float32)}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Samples as the ONNX backend tests have them, with the model's own outputs."""
    path = saved(tmp_path, ROWS)
    session = open_session(path, threads=1)
    for number in range(12):
        folder = tmp_path / "data" / f"test_data_set_{number}"
        folder.mkdir(parents=True)
        feed = sample(number)
        rows = onnx.numpy_helper.from_list(feed["x"], "x")
        (folder / "input_0.pb").write_bytes(rows.SerializeToString())
        bias = onnx.numpy_helper.from_array(feed["bias"], "bias")
        (folder / "input_1.pb").write_bytes(bias.SerializeToString())
        found = session.run(None, feed)[0]
        (folder / "output_0.pb").write_bytes(
            onnx.numpy_helper.from_list(found, "y").SerializeToString()
        )
    return tmp_path / "data"


def ran(result: Result, path: Path, feed: dict[str, Any]) -> Array:
    result.save(path)
    return run(open_session(path, threads=1), feed, "it")["y"]


def checked(result: Result) -> Check:
    assert result.report.check is not None
    return result.report.check


def factored(result: Result) -> list[str]:
    return [layer.name for layer in result.report.layers if layer.status == "factored"]


def test_a_sequence_goes_in_and_comes_out(data: Path, tmp_path: Path) -> None:
    path = tmp_path / "in.onnx"
    result = compress(
        path, energy=1.0, data=data, simplify=False, allow_slower=True, samples=3, threads=1
    )
    assert len(factored(result)) == 2
    (figures,) = checked(result).providers[0].outputs
    assert figures.name == "y"
    assert figures.relative_l2 < 1e-5
    assert any("agrees with the stored outputs of 3 samples" in n for n in result.report.notes)
    feed = sample(99)
    expected = run(open_session(path, threads=1), feed, "it")["y"]
    np.testing.assert_allclose(ran(result, tmp_path / "out.onnx", feed), expected, atol=1e-4)


@pytest.mark.parametrize(
    "goal",
    [
        {"keep": 0.5},
        {"keep": 0.5, "uniform": True},
        {"tolerance": 0.3, "objective": "size"},
        {
            "tolerance": 5.0,
            "objective": "size",
            "metric": lambda out, ref, _: -abs(out["y"] - ref["y"]).max(),
        },
        {"max_size": 4000},
        {"rank": 4, "refit": True, "fisher": True},
    ],
    ids=["keep", "uniform", "tolerance", "metric", "size", "fits"],
)
def test_goals(goal: dict[str, Any], data: Path, tmp_path: Path) -> None:
    result = compress(
        tmp_path / "in.onnx",
        data=data,
        bench=False,
        simplify=False,
        samples=3,
        threads=1,
        min_gain=-1,
        **goal,
    )
    assert factored(result)
    if "keep" in goal:
        measured = any("output 'y' is measured at z" in n for n in result.report.notes)
        assert measured is not goal.get("uniform", False)
        assert (checked(result).damage or 0) > 0


def test_feeds_from_python_and_archives(data: Path, tmp_path: Path) -> None:
    path = tmp_path / "in.onnx"
    del data
    result = compress(
        path,
        energy=1.0,
        data=[sample(n) for n in range(8)],
        bench=False,
        simplify=False,
        samples=2,
        threads=1,
    )
    assert len(factored(result)) == 2
    folder = tmp_path / "archives"
    folder.mkdir()
    for number in range(4):
        feed = sample(number)
        np.savez(
            folder / f"{number}.npz", x=np.stack([r[:1] for r in feed["x"]]), bias=feed["bias"]
        )
    result = compress(
        path, energy=1.0, data=folder, bench=False, simplify=False, samples=2, threads=1
    )
    assert len(factored(result)) == 2
    np.savez(tmp_path / "stack.npz", x=np.ones((4, 2, 32), np.float32), bias=np.ones((4, 32)))
    with pytest.raises(
        InputError, match="input 'x': expected a sequence of tensors in each sample"
    ):
        compress(path, energy=1.0, data=tmp_path / "stack.npz", bench=False, simplify=False)


def test_sequences_cannot_be_drawn(data: Path, tmp_path: Path) -> None:
    result = compress(tmp_path / "in.onnx", energy=1.0)
    assert len(factored(result)) == 2
    (note,) = [note for note in result.report.notes if "neither checked nor timed" in note]
    assert "input 'x'" in note
    assert "a sequence of tensors, which cannot be made at random; give samples" in note
    assert check(tmp_path / "in.onnx", tmp_path / "in.onnx", data=data, samples=2).errors == ()


def test_a_curve_of_a_model_with_sequences(data: Path, tmp_path: Path) -> None:
    found = sweep(
        tmp_path / "in.onnx", data=data, shares=[0.8, 0.5], threads=1, bench=False, simplify=False
    )
    assert [point.keep for point in found.points] == [1.0, 0.8, 0.5]


def test_a_branch_at_the_end_whose_size_is_computed(tmp_path: Path) -> None:
    path = saved(tmp_path, BRANCH)
    data = {"x": np.random.default_rng(2).standard_normal((12, 6, 32)).astype(np.float32)}
    feeds = [{"x": x} for x in data["x"]]
    goals: list[dict[str, Any]] = [
        {"keep": 0.5},
        {"rank": 2},
        {"tolerance": 0.9, "objective": "size"},
    ]
    for goal in goals:
        result = compress(
            path,
            data=feeds,
            bench=False,
            simplify=False,
            samples=3,
            threads=1,
            min_gain=-1,
            **goal,
        )
        assert factored(result)
        assert (checked(result).damage or 0) > 0


def test_samples_bring_the_size_of_an_image_beside_a_sequence(tmp_path: Path) -> None:
    """No sequence can be made at random, and none has to be."""
    text = f"""{HEAD} g (float[1, 3, H, B] image, seq(float[32]) s) => (float[1, 16] y) {{
        p = GlobalAveragePool (image)
        f = Flatten (p)
        e = MatMul (f, U)
        zero = Constant <value = int64 {{0}}> ()
        b = SequenceAt (s, zero)
        moved = Add (e, b)
        h = MatMul (moved, V)
        y = MatMul (h, W)
    }}"""
    rng = np.random.default_rng(0)
    start = rng.standard_normal((3, 32)).astype(np.float32)
    feeds = [
        {
            "image": rng.standard_normal((1, 3, 20, 24)).astype(np.float32),
            "s": [rng.standard_normal(32).astype(np.float32)],
        }
        for _ in range(4)
    ]
    result = compress(
        parse(text, {**WEIGHTS, "U": start}), data=feeds, rank=8, bench=False, simplify=False
    )
    assert result.report.check is not None
    assert factored(result)
