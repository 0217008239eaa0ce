"""What the user quantizes later: pairs lose about as much by it as the weights themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantType,
    quantize_dynamic,
    quantize_static,
)

from onnx_lowrank import compress
from onnx_lowrank.numerics.arrays import Array, Feed
from onnx_lowrank.runtime.session import open_session, run
from tests.helpers.models import parse

SIZE, RANK = 192, 72
FLAVOURS = [
    pytest.param({"per_channel": channels, "weight_type": kind, "reduce_range": narrow}, id=name)
    for channels in (False, True)
    for kind in (QuantType.QInt8, QuantType.QUInt8)
    for narrow in (False, True)
    for name in [
        f"{'channels' if channels else 'tensor'}-{kind.name}{'-reduced' if narrow else ''}"
    ]
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model of two steep weights, one after the other, and the same in pairs."""
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("models")
    model = parse(
        f"""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[N,{SIZE}] x) => (float[N,{SIZE}] y) {{
            h = MatMul (x, W1)
            a = Tanh (h)
            y = MatMul (a, W2)
        }}
        """,
        {"W1": _steep(rng), "W2": _steep(rng)},
    )
    onnx.save(model, folder / "in.onnx")
    result = compress(
        folder / "in.onnx", rank=RANK, calibration=_feeds(64), check=False, bench=False
    )
    assert result.report.layers[0].rank == RANK
    ir.save(result.model, folder / "out.onnx")
    return folder / "in.onnx", folder / "out.onnx"


def _steep(rng: np.random.Generator) -> Array:
    """A weight whose singular values fall to a hundredth."""
    left, right = (np.linalg.qr(rng.standard_normal((SIZE, SIZE)))[0] for _ in range(2))
    values = 4.0 * np.exp(-np.arange(SIZE) * np.log(100.0) / RANK)
    return np.asarray((left * values) @ right, np.float32)


def _feeds(count: int, seed: int = 1) -> list[Feed]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.standard_normal((16, SIZE)).astype(np.float32)} for _ in range(count)]


def _lost(before: Path, after: Path) -> float:
    """Relative L2 distance of the outputs, all samples together."""
    sessions = [open_session(path) for path in (before, after)]
    rows = [[run(session, feed, "a model")["y"] for feed in _feeds(8, 2)] for session in sessions]
    exact, found = (np.concatenate(part) for part in rows)
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize("options", FLAVOURS)
def test_by_dynamic_quantization(
    files: tuple[Path, Path], options: dict[str, Any], tmp_path: Path
) -> None:
    lost = []
    for path in files:
        quantize_dynamic(path, tmp_path / path.name, **options)
        lost.append(_lost(path, tmp_path / path.name))
    assert lost[1] < 1.5 * lost[0]


@pytest.mark.parametrize("channels", [True, False])
def test_by_static_quantization(files: tuple[Path, Path], channels: bool, tmp_path: Path) -> None:
    lost = []
    for path in files:
        quantize_static(path, tmp_path / path.name, _Reader(), per_channel=channels)
        lost.append(_lost(path, tmp_path / path.name))
    assert lost[1] < 1.5 * lost[0]


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self) -> None:
        self._feeds = iter(_feeds(8))

    def get_next(self) -> Feed | None:
        """The next sample."""
        return next(self._feeds, None)
