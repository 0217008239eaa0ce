"""Whether this machine's integer products are exact, and how another one's are told apart."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.runtime import saturation
from onnx_lowrank.runtime.saturation import saturates


@pytest.fixture(autouse=True)
def _anew() -> Iterator[None]:
    saturates.cache_clear()
    yield
    saturates.cache_clear()


def test_a_machine_always_answers_the_same() -> None:
    found = saturates()
    saturates.cache_clear()
    assert saturates() == found


class Session:
    """Adds up pairs of products in 16 bits from some number of rows on."""

    def __init__(self, rows: int) -> None:
        self._rows = rows

    def run(self, names: None, feed: dict[str, Array]) -> list[Array]:
        x = feed["x"].astype(np.int64)
        pairs = (x * 127).reshape(len(x), -1, 2).sum(axis=2)
        if len(x) >= self._rows:
            pairs = np.minimum(pairs, 32767)
        return [np.repeat(pairs.sum(axis=1)[:, None], 32, axis=1)]


@pytest.mark.parametrize(("rows", "found"), [(1, True), (16, True), (17, False)])
def test_kernels_that_saturate(rows: int, found: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(model: bytes, **options: Any) -> Session:
        return Session(rows)

    monkeypatch.setattr(saturation, "open_session", opened)
    assert saturates() == found
