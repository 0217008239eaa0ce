"""The line that `inspect` prints of how a model was made."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from onnx_lowrank.compression.provenance import provenance_line
from onnx_lowrank.compression.verbs import spelling
from onnx_lowrank.errors import spelled
from onnx_lowrank.maps.formats import Format
from onnx_lowrank.ranks.recipe import Recipe, RecipeLayer
from tests.helpers.commands import QUICK, call
from tests.helpers.models import linear_model, uniform


def test_the_line_has_the_options_as_one_types_them() -> None:
    recipe = Recipe(
        tool="onnx-lowrank 1.2.3",
        input="sha256:0123456789abcdef0123",
        goal={"keep": 0.5, "uniform": True},
        settings={
            "exclude": ["a.*", "b"],
            "dims": {"batch": 2},
            "input_shapes": {"x": [1, 3]},
            "calibrate": False,
        },
        layers=(
            RecipeLayer("a", "matmul-right", (4, 4), 1, Format(8, 16)),
            RecipeLayer("b", "matmul-right", (4, 4), None),
        ),
        layers_digest="0" * 16,
    )
    with spelled(spelling):
        line = provenance_line(recipe)
    assert line == (
        "made by onnx-lowrank 1.2.3 from sha256:0123456789ab…: --keep 0.5, --uniform, "
        "--exclude a.*, --exclude b, --dim batch=2, --input-shape x:1,3, --no-calibrate, ranks "
        "changed by hand since; 1 layer factored, 1 layer with a number format"
    )


def test_inspect_shows_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "in.onnx"
    onnx.save(linear_model(uniform((32, 32), np.random.default_rng(0)), rows=2), path)
    assert call(path, tmp_path / "o.onnx", "--rank", "4", *QUICK) == 0
    capfd.readouterr()
    assert call("inspect", tmp_path / "o.onnx") == 0
    made = capfd.readouterr().out.splitlines()[1]
    assert made.startswith("made by onnx-lowrank ")
    assert made.endswith(": --rank 4, --no-simplify, --no-calibrate; 1 layer factored")
    assert call("inspect", path) == 0
    assert "made by" not in capfd.readouterr().out


def test_metadata_that_others_changed_do_not_end_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = linear_model(uniform((32, 32), np.random.default_rng(0)))
    model.metadata_props.add(key="onnx_lowrank.recipe", value="{")
    onnx.save(model, tmp_path / "in.onnx")
    assert call("inspect", tmp_path / "in.onnx") == 0
    out = capfd.readouterr().out
    assert "its metadata hold no recipe that can be read" in out
