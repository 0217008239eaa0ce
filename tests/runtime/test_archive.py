"""Values with arrays in one file."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.runtime.archive import BROKEN, read_archive, read_header, write_archive


@dataclass(frozen=True, eq=False)
class Box:
    name: str
    inside: Any


def through(value: Any, folder: Path) -> Any:
    path = folder / "archive.npz"
    with path.open("wb") as file:
        write_archive(file, {"kind": "test"}, value, [Box])
    assert read_header(path)["kind"] == "test"
    return read_archive(path, [Box])


def bits(array: Array) -> bytes:
    return array.tobytes(order="A")


def test_plain_values(tmp_path: Path) -> None:
    value = {
        ("a", 1): (None, True, 1, 0.1, "ä", [1, (2,)]),
        "b": {"c": float("inf"), 3: -0.0, "d": np.float64(0.1)},
    }
    found = through(value, tmp_path)
    assert found == value
    assert isinstance(found, Mapping)
    assert str(found["b"][3]) == "-0.0"
    nothing = through(Box("x", {}), tmp_path)
    assert (nothing.name, nothing.inside) == ("x", {})


def test_arrays_keep_type_order_and_bits(rng: np.random.Generator, tmp_path: Path) -> None:
    square = rng.standard_normal((40, 40))
    arrays: list[Array] = [
        *(square, np.asfortranarray(square), square.astype(np.float32), square @ square.T),
        *(square + square.T, np.tril(square), np.triu(square), np.eye(40), -np.zeros((40, 40))),
        *(np.full((20, 20), np.nan), np.zeros(0), np.array(3), rng.random(5).astype(np.float16)),
        *(square.astype(ml_dtypes.bfloat16), np.asfortranarray(square.astype(ml_dtypes.bfloat16))),
        *(np.array([True, False]), rng.integers(0, 9, (2, 3, 4)), square[None].mT),
    ]
    for array, again in zip(arrays, through(arrays, tmp_path), strict=True):
        assert (again.dtype, again.shape) == (array.dtype, array.shape)
        assert again.flags.f_contiguous == array.flags.f_contiguous
        assert bits(again) == bits(array)


def test_one_triangle_is_written(rng: np.random.Generator, tmp_path: Path) -> None:
    square = rng.standard_normal((100, 100))
    sizes = []
    for array in (square, square + square.T, np.tril(square)):
        file = io.BytesIO()
        write_archive(file, {}, array)
        sizes.append(len(file.getvalue()))
    assert max(sizes[1:]) < 0.6 * sizes[0]


def test_an_array_that_is_shared_stays_so(tmp_path: Path) -> None:
    one = np.arange(5)
    first, second, other = through([Box("a", one), Box("b", one), np.arange(5)], tmp_path)
    assert first.inside is second.inside
    assert other is not first.inside


def test_what_cannot_be_written() -> None:
    with pytest.raises(TypeError, match="expected numbers, texts, arrays"):
        write_archive(io.BytesIO(), {}, object())
    with pytest.raises(TypeError, match="Box"):  # it could not be read again
        write_archive(io.BytesIO(), {}, [Box("a", 1)])


def test_every_damage_is_seen(rng: np.random.Generator, tmp_path: Path) -> None:
    path = tmp_path / "archive.npz"
    with path.open("wb") as file:
        write_archive(file, {}, Box("a", rng.standard_normal(100)), [Box])
    whole = path.read_bytes()
    for broken in (b"", whole[:100], whole[:-30], whole[:400] + b"?" + whole[401:]):
        path.write_bytes(broken)
        with pytest.raises(BROKEN):
            read_archive(path, [Box])
    path.write_bytes(whole)
    with pytest.raises(BROKEN):
        read_archive(path, [])  # of a class that is not known
