"""Values that wait, in memory or in files."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from onnx_lowrank.runtime import memory
from onnx_lowrank.runtime.memory import Memory
from onnx_lowrank.runtime.shelf import Shelf


@pytest.fixture
def tight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shelf:
    """A shelf that holds 100 kB in memory."""
    monkeypatch.setattr(memory, "held", lambda: 0)
    return Shelf(Memory(250_000, True, tmp_path))


def test_what_has_no_room_waits_in_a_file(
    tight: Shelf, tmp_path: Path, rng: np.random.Generator
) -> None:
    arrays = {
        "a": rng.standard_normal((50, 200)).astype(np.float32),  # 40 kB
        "b": rng.standard_normal((20_000,)).astype(ml_dtypes.bfloat16).reshape(2, 100, 100),
        "c": np.asfortranarray(rng.standard_normal((100, 60))),
        "text": np.array(["one", "two"] * 20_000, object),
        "none": np.zeros((0, 3), np.int64),
    }
    values = tight.values(arrays)
    assert tight.spilled == arrays["c"].nbytes
    assert len(list(tmp_path.iterdir())) == 1
    for name, array in arrays.items():
        np.testing.assert_array_equal(values[name], array)
        assert values[name].dtype == array.dtype
        assert values.shape(name) == array.shape


def test_room_and_files_come_back(tight: Shelf, tmp_path: Path) -> None:
    both = tight.values({"a": np.zeros(90_000, np.uint8), "b": np.ones(90_000, np.uint8)})
    kept = both.only({"b"})
    assert "a" not in kept
    del both
    assert len(list(tmp_path.iterdir())) == 1
    assert kept["b"].all()
    again = tight.values({"c": np.ones(90_000, np.uint8)})  # the room of a
    assert tight.spilled == 90_000
    del kept, again
    assert not list(tmp_path.iterdir())


def test_without_a_limit_nothing_is_written() -> None:
    shelf = Shelf()
    values = shelf.values({"a": np.zeros(1 << 20, np.uint8)})
    assert not shelf.spilled
    assert len(values) == 1
    del values["a"]
    assert not values


def test_work_beside_the_values_has_its_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "held", lambda: 0)
    limit = Memory(250_000, True, tmp_path)
    for beside, spilled in ((0, 0), (150_000, 90_000), (10**9, 90_000)):
        shelf = Shelf(limit, beside)
        values = shelf.values({"a": np.ones(90_000, np.uint8)})
        assert shelf.spilled == spilled
        assert values["a"].all()
        del values
