"""A result whose formats were chosen stands beside int8 alone."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_lowrank import compress
from onnx_lowrank.compression.int8 import Figured, said
from onnx_lowrank.measures import Speedup
from tests.helpers.models import parse

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
    text = said(figures(*other), figures(*OWN))
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
