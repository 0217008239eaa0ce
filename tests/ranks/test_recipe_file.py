"""Recipes in the metadata of a model: short, and read as they were."""

from __future__ import annotations

import json

from onnx_lowrank.maps.formats import Format
from onnx_lowrank.ranks.recipe import Recipe, RecipeLayer, SharedFirst
from onnx_lowrank.ranks.recipe_file import from_metadata, to_metadata


def test_metadata_hold_of_a_format_only_what_is_no_default() -> None:
    layers = (
        RecipeLayer("a", "matmul-right", (64, 64), 8, Format(4, 32, zeros=True)),
        RecipeLayer("b", "matmul-right", (64, 64), None, Format(8, 0, activations="dynamic")),
        RecipeLayer("c", "matmul-right", (64, 64), None),
        RecipeLayer("d", "gather", (64, 64), None, Format(8, 64, table=True, signed=False)),
        RecipeLayer("e", "matmul-right", (64, 64), 8),
    )
    shared = (SharedFirst(("a", "e"), (1.0, 2.0)),)
    recipe = Recipe("tool", "sha256:1", {"keep": 0.5}, {}, layers, shared, layers_digest="x")
    found = to_metadata(recipe)
    rows = json.loads(found["recipe"])
    assert [row[4:] for row in rows] == [
        [{"bits": 4, "block": 32, "zeros": True}],
        [{"bits": 8, "block": 0, "activations": "dynamic"}],
        [{"bits": 8, "block": 64, "table": True, "signed": False}],
        [],
    ]
    again = from_metadata({f"onnx_lowrank.{key}": text for key, text in found.items()}, "m.onnx")
    assert again is not None
    assert again.layers == tuple(layer for layer in layers if not layer.kept)
    assert again.shared == shared
