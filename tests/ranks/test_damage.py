"""The damage of a layer: its curve, and what a run says of measuring it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from onnx_lowrank import compress
from onnx_lowrank.progress import Advance, Silent
from onnx_lowrank.ranks.alone import alone
from onnx_lowrank.ranks.damage import DamageCurve
from tests.helpers.models import parse, uniform


def test_a_curve_goes_through_its_points_and_falls_with_the_rank() -> None:
    tails = np.concatenate([np.cumsum((0.8 ** np.arange(20))[::-1])[::-1], [0.0]])
    curve = DamageCurve(((10, 1e-3), (3, 5e-2)), tails)
    assert curve.at(10) == pytest.approx(1e-3)
    assert curve.at(3) == pytest.approx(5e-2)
    damages = [curve.at(rank) for rank in range(22)]
    assert all(after <= before for before, after in itertools.pairwise(damages))
    assert curve.at(20) == 0.0
    assert curve.at(15) == pytest.approx(1e-3 * tails[15] / tails[10])
    odd = DamageCurve(((10, 1e-3), (3, 1e-4)), tails)  # noise: less damage at a lower rank
    assert np.isfinite([odd.at(rank) for rank in range(21)]).all()


class Counting(Silent):
    """Counts what the stage of damage says is done."""

    def __init__(self) -> None:
        self.left = 0

    @contextmanager
    def stage(self, name: str, total: int | None) -> Iterator[Advance]:
        if name == "damage":
            self.left = total or 0
        yield self.done if name == "damage" else lambda _: None

    def done(self, count: int) -> None:
        self.left -= count


def test_no_layer_is_measured_after_the_stage_says_that_all_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(5)
    model = parse(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[n, 16] x) => (float[n, 16] y) <float[16, 48] W, float[48, 16] V>
        { a = MatMul(x, W)  b = Relu(a)  y = MatMul(b, V) }""",
        {"W": uniform((16, 48), rng), "V": uniform((48, 16), rng)},
    )
    counting, left = Counting(), list[int]()

    def measuring(*args: Any) -> float | None:
        left.append(counting.left)
        return alone(*args)

    monkeypatch.setattr("onnx_lowrank.ranks.damage.alone", measuring)
    options: dict[str, Any] = {"ops": ("default", "hidden"), "effort": "quick", "bench": False}
    data = {"x": uniform((96, 16), rng)}
    compress(model, keep=0.7, data=data, progress=counting, simplify=False, **options)
    assert len(left) == 2  # a width is measured at two references
    assert left[0] > left[1] > 0  # each of them moves the bar
    assert counting.left == 0
