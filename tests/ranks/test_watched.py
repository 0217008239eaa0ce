"""Goals of models whose outputs cannot be compared number by number, or hold padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnx_lowrank import Result, compress, sweep
from onnx_lowrank.evaluation.reading import PLAIN, reading_of
from onnx_lowrank.evaluation.watched import watched
from onnx_lowrank.numerics.arrays import Array
from tests.helpers.models import parse

_HEAD = '<ir_version: 8, opset_import: ["": 17]>'

# Ends in the number of a class.
CLASSES = f"""{_HEAD} g (float[N, 32] x) => (int64[N] y) {{
    a = MatMul(x, w1)
    b = Tanh(a)
    scores = MatMul(b, w2)
    y = ArgMax<axis = 1, keepdims = 0>(scores)
}}"""
# Ends in the boxes that are left of 24, with their numbers and their sizes.
BOXES = f"""{_HEAD} g (float[24, 32] x) => (int64[K, 3] kept, float[K, 4] y) {{
    a = MatMul(x, w1)
    b = Tanh(a)
    c = MatMul(b, w2)
    split = Constant<value = int64[2] {{4, 28}}>()
    corners, rest = Split<axis = 1>(c, split)
    first = Constant<value = int64[1] {{0}}>()
    boxes = Unsqueeze(corners, first)
    scores = ReduceMean<axes = [1], keepdims = 0>(rest)
    two = Constant<value = int64[2] {{0, 1}}>()
    ranked = Unsqueeze(scores, two)
    most = Constant<value = int64[1] {{24}}>()
    overlap = Constant<value = float[1] {{0.5}}>()
    least = Constant<value = float[1] {{0.0}}>()
    kept = NonMaxSuppression(boxes, ranked, most, overlap, least)
    last = Constant<value = int64 {{2}}>()
    number = Gather<axis = 1>(kept, last)
    y = Gather<axis = 0>(corners, number)
}}"""


def model(text: str) -> onnx.ModelProto:
    rng = np.random.default_rng(5)
    shapes = {"w1": (32, 64), "w2": (64, 32)}
    return parse(text, {n: rng.normal(size=s).astype("f4") * 0.2 for n, s in shapes.items()})


def feeds(rows: int, count: int = 40) -> list[dict[str, Array]]:
    rng = np.random.default_rng(1)
    return [{"x": rng.normal(size=(rows, 32)).astype("f4")} for _ in range(count)]


def run(text: str, **options: Any) -> Result:
    plain: dict[str, Any] = {"simplify": False, "bench": False, "rank_multiple": 1}
    rows = 24 if text is BOXES else 16
    return compress(model(text), **{**plain, "calibration": feeds(rows), **options})


def ranks(result: Result) -> dict[str, int | None]:
    return {layer.weight: layer.rank for layer in result.report.layers}


@pytest.mark.parametrize(("text", "before"), [(CLASSES, "scores"), (BOXES, "ranked, boxes")])
def test_damage_is_measured_before_what_cannot_be_compared(text: str, before: str) -> None:
    result = run(text, keep=0.6)
    goal = result.report.goal
    assert goal is not None
    assert goal.predicted_damage is not None
    assert goal.achieved_damage is not None
    assert 0.3 < goal.achieved_damage / goal.predicted_damage < 3
    assert all(rank is None or rank > 4 for rank in ranks(result).values())
    notes = [note for note in result.report.notes if note.startswith("damage of output")]
    assert notes
    for name in before.split(", "):
        assert any(name in note for note in notes)


def test_top1_of_a_model_that_gives_classes() -> None:
    result = run(CLASSES, tolerance=0.1, metric="top1", objective="size")
    goal, check = result.report.goal, result.report.check
    assert goal is not None
    assert goal.loss is not None
    assert goal.loss <= 0.1
    assert check is not None
    assert check.providers[0].outputs[0].relative_l2 == pytest.approx(goal.loss)


def test_a_metric_gets_outputs_of_any_size(tmp_path: Path) -> None:
    file = tmp_path / "judge.py"
    file.write_text(
        "def score(outputs, reference, labels):\n"
        "    ours, theirs = (set(map(tuple, o['kept'].tolist())) for o in (outputs, reference))\n"
        "    return len(ours & theirs) / max(len(ours | theirs), 1)\n"
    )
    result = run(BOXES, tolerance=0.4, metric=f"{file}:score", objective="size")
    goal = result.report.goal
    assert goal is not None
    assert goal.loss is not None
    assert goal.loss <= 0.4


def test_a_sweep_over_boxes() -> None:
    options: dict[str, Any] = {"simplify": False, "bench": False, "calibration": feeds(24, 12)}
    curve = sweep(model(BOXES), shares=[0.6], **options)
    assert curve.points[-1].damage is not None
    assert curve.points[-1].damage > 0


def test_what_stands_for_outputs() -> None:
    flow = ir.from_onnx_text(BOXES.replace("w1", "x").replace("w2", "x"))
    node = next(node for node in flow.graph if node.op_type == "Tanh")
    seen = watched(flow, [node], PLAIN)
    assert set(seen.instead) == {"kept", "y"}
    assert set(seen.instead["kept"]) == {"boxes", "ranked"}
    assert reading_of(flow).loose == {"kept", "y"}


@pytest.mark.parametrize(
    ("shape", "fits"),
    [
        ("B, T, 4", True),
        ("B, T", True),
        ("B, 4", False),  # four classes are no four tokens
        ("B, S", False),
        ("R, 4", True),  # a flattened batch
        ("B, 8, T", True),  # channels first
        ("B, 8, 4", False),
    ],
)
def test_which_outputs_have_the_axes_of_the_mask(shape: str, fits: bool) -> None:
    text = f"{_HEAD} g (float[B, T, 4] x, int64[B, T] mask) => (float[{shape}] y) {{ y = Relu(x) }}"
    reading = reading_of(ir.from_onnx_text(text), "mask")
    assert (reading.masked == {"y"}) is fits


PADDED = f"""{_HEAD} g (float[B, T, 32] x, int64[B, T] attention_mask) => (float[B, T, 32] y) {{
    y = MatMul(x, W)
}}"""


def test_padding_behind_the_channels_does_not_count() -> None:
    text = f"{_HEAD} g (float[B, 8, T] x, int64[B, T] mask) => (float[B, 8, T] y) {{ y = Relu(x) }}"
    reading = reading_of(ir.from_onnx_text(text), "mask")
    mask = np.array([[1, 1, 0], [1, 0, 0]])
    y = np.arange(2 * 8 * 3).reshape(2, 8, 3)
    kept = reading.counted("y", y, reading.kept({"mask": mask}))
    assert kept.tolist() == [y[0, :, 0].tolist(), y[0, :, 1].tolist(), y[1, :, 0].tolist()]
    square = np.arange(2 * 3 * 3).reshape(2, 3, 3)  # as many channels as tokens
    kept = reading.counted("y", square, reading.kept({"mask": mask}))
    assert kept[1].tolist() == square[0, :, 1].tolist()


def test_damage_and_check_leave_padding_out() -> None:
    """Padding holds what the factored weight cannot carry: nothing else does."""
    rng = np.random.default_rng(2)
    basis = rng.normal(size=(4, 32)).astype("f4")
    mask = np.array([[1, 1, 1, 0, 0]] * 2)
    given = []
    for _ in range(30):
        x = rng.normal(size=(2, 5, 4)).astype("f4") @ basis
        x[mask == 0] = 100 * rng.normal(size=(4, 32))
        given.append({"x": x.astype("f4"), "attention_mask": mask})
    proto = parse(PADDED, {"W": rng.normal(size=(32, 32)).astype("f4")})
    options: dict[str, Any] = {"simplify": False, "bench": False, "rank_multiple": 1}
    result = compress(proto, calibration=given, keep=0.5, metric="relative-l2", **options)
    check, goal = result.report.check, result.report.goal
    assert check is not None
    assert goal is not None
    assert check.providers[0].outputs[0].relative_l2 < 0.02
    assert goal.achieved_damage is not None
    assert goal.achieved_damage < 1e-3
    assert sum("padding counts nowhere" in note for note in result.report.notes) == 1
    judged = compress(proto, calibration=given, tolerance=0.05, objective="size", **options)
    assert judged.report.goal is not None
    assert (judged.report.goal.loss or 0) < 0.05
    assert judged.report.layers[0].rank is not None
