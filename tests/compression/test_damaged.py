"""Damaged files: each is refused in one line, or worked on; none is an internal error."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from onnx_lowrank import LowRankError, compress, inspect
from tests.helpers.damage import aged, damaged, victims

EACH = 40
# Found by such damage: what broke once.
FOUND = (21, 53, 178, 229, 268, 501, 567, 589, 721, 1230, 1277, 1677, 3062, 4594)
# The same with other versions of ONNX.
FOUND_AGED = (50014, 50243, 50257, 50258, 50294, 60290, 60342, 60983, 61578, 80194)
VICTIMS = victims()


def tried(name: str, seed: int, path: Path) -> None:
    path.write_bytes(damaged(VICTIMS[name], seed))
    told(path, seed)


def tried_aged(seed: int, path: Path) -> None:
    names = list(VICTIMS)
    path.write_bytes(damaged(aged(VICTIMS[names[seed % len(names)]], seed), seed))
    told(path, seed)
    with contextlib.suppress(LowRankError):
        inspect(path)


def told(path: Path, seed: int) -> None:
    try:
        compress(path, rank=2, min_gain=-1, ops=["all"], simplify=False, check=False, bench=False)
    except LowRankError as error:
        text = str(error)
        assert text, seed
        assert "\n" not in text, seed


@pytest.mark.parametrize("name", VICTIMS)
def test_damage_is_no_internal_error(name: str, tmp_path: Path) -> None:
    for seed in range(10_000, 10_000 + EACH):
        tried(name, seed, tmp_path / "in.onnx")


def test_damage_in_other_versions_is_no_internal_error(tmp_path: Path) -> None:
    for seed in (*range(70_000, 70_000 + EACH), *FOUND_AGED):
        tried_aged(seed, tmp_path / "in.onnx")


def test_versions_that_do_not_fit_are_no_internal_error(tmp_path: Path) -> None:
    path = tmp_path / "in.onnx"
    for seed in range(12):
        for model in VICTIMS.values():
            path.write_bytes(aged(model, seed).SerializeToString())
            told(path, seed)


@pytest.mark.parametrize("seed", FOUND)
def test_damage_that_was_an_internal_error(seed: int, tmp_path: Path) -> None:
    names = list(VICTIMS)
    tried(names[seed % len(names)], seed, tmp_path / "in.onnx")


def test_the_victims_are_whole(tmp_path: Path) -> None:
    """Else damage would not be what is refused."""
    for name, model in VICTIMS.items():
        path = tmp_path / f"{name}.onnx"
        path.write_bytes(model.SerializeToString())
        found = compress(
            path, rank=2, min_gain=-1, ops=["all"], simplify=False, check=False, bench=False
        )
        assert any(layer.status == "factored" for layer in found.report.layers), name
