"""Damaged files: each is refused in one line, or worked on; none is an internal error."""

from __future__ import annotations

from pathlib import Path

import pytest

from onnx_lowrank import LowRankError, compress
from tests.helpers.damage import damaged, victims

EACH = 40
# Found by such damage: what broke once.
FOUND = (21, 53, 178, 229, 268, 501, 567, 589, 721, 1230, 1277, 1677, 3062, 4594)
VICTIMS = victims()


def tried(name: str, seed: int, path: Path) -> None:
    path.write_bytes(damaged(VICTIMS[name], seed))
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
