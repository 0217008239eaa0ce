"""Saving a result: where it may go, what is beside it, and what a failure leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.checker
import onnx.numpy_helper
import pytest

import onnx_lowrank
from onnx_lowrank import InputError
from tests.helpers.models import (
    assert_same,
    factored,
    known_rank,
    linear_model,
    op_types,
    parameters,
    uniform,
)

M, N, RANK = 32, 24, 4


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(3)


@pytest.fixture
def model(rng: np.random.Generator) -> onnx.ModelProto:
    return linear_model(known_rank(M, N, RANK, rng), bias=uniform((N,), rng))


def test_save(model: onnx.ModelProto, tmp_path: Path, rng: np.random.Generator) -> None:
    result = factored(model, rank=RANK)
    assert result.report.output.path is None
    path = tmp_path / "out.onnx"
    report = result.save(path)
    assert report.output.path == str(path)
    assert report.output.bytes == path.stat().st_size
    assert [file.name for file in tmp_path.iterdir()] == ["out.onnx"]
    assert_same(model, onnx.load(path), {"x": uniform((3, M), rng)})


def test_save_refuses_what_exists_unless_forced(model: onnx.ModelProto, tmp_path: Path) -> None:
    path = tmp_path / "out.onnx"
    path.write_bytes(b"precious")
    result = factored(model, rank=RANK)
    with pytest.raises(InputError, match="exists; force=True overwrites it"):
        result.save(path)
    assert path.read_bytes() == b"precious"
    result.save(path, force=True)
    assert op_types(onnx.load(path)) == ["MatMul", "MatMul", "Add"]
    assert [file.name for file in tmp_path.iterdir()] == ["out.onnx"]


@pytest.mark.parametrize("force", [False, True])
def test_save_never_overwrites_the_input(
    force: bool, model: onnx.ModelProto, tmp_path: Path
) -> None:
    path = tmp_path / "in.onnx"
    onnx.save(model, path)
    before = path.read_bytes()
    (tmp_path / "link.onnx").symlink_to(path)
    result = factored(path, rank=RANK)
    for target in (path, tmp_path / "link.onnx"):
        with pytest.raises(InputError, match="overwrite the input"):
            result.save(target, force=force)
    assert path.read_bytes() == before


@pytest.mark.parametrize("place", ["missing/out.onnx", "folder"])
def test_save_to_an_impossible_place(place: str, model: onnx.ModelProto, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=place.split("/")[0]):
        factored(model, rank=RANK).save(tmp_path / place)
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]


def test_a_failed_write_leaves_nothing(
    model: onnx.ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.onnx"
    path.write_bytes(b"precious")
    result = factored(model, rank=RANK)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(onnx_lowrank.compression.result, "write", full)
    with pytest.raises(InputError, match="No space left on device; nothing written"):
        result.save(path, force=True)
    assert path.read_bytes() == b"precious"
    assert [file.name for file in tmp_path.iterdir()] == ["out.onnx"]


def test_save_with_external_data(
    model: onnx.ModelProto, tmp_path: Path, rng: np.random.Generator
) -> None:
    big = linear_model(known_rank(256, 256, RANK, rng))
    path = tmp_path / "out.onnx"
    report = factored(big, rank=RANK).save(path, external_data="always")
    data = tmp_path / "out.onnx.data"
    assert sorted(file.name for file in tmp_path.iterdir()) == [path.name, data.name]
    assert report.output.bytes == path.stat().st_size + data.stat().st_size
    assert data.stat().st_size < 4 * parameters(big)
    assert_same(big, onnx.load(path), {"x": uniform((3, 256), rng)})
    # Written again without: no orphan is left.
    factored(model, rank=RANK).save(path, external_data="never", force=True)
    assert [file.name for file in tmp_path.iterdir()] == ["out.onnx"]


def test_save_twice_gives_the_same_file(model: onnx.ModelProto, tmp_path: Path) -> None:
    result = factored(model, rank=RANK)
    result.save(tmp_path / "a.onnx")
    result.save(tmp_path / "b.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
