"""Provenance: what a model says of the run that made it, as one line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from onnx_lowrank.errors import named
from onnx_lowrank.phrases import counted
from onnx_lowrank.ranks.recipe import Recipe

__all__ = ["provenance_line"]

# Of a digest: enough to find the file that it belongs to.
_SHOWN = 19


def provenance_line(recipe: Recipe) -> str:
    """Such as "made by onnx-lowrank 0.1.0 from sha256:9931…: --keep 0.5; 2 layers factored"."""
    options = [*_options(recipe.goal), *_options(recipe.settings)]
    if recipe.changed:
        options.append("ranks changed by hand since")
    ranked = sum(layer.rank is not None for layer in recipe.layers)
    formatted = sum(layer.format is not None for layer in recipe.layers)
    parts = [f"{counted(ranked, 'layer')} factored"]
    if formatted:
        parts.append(f"{counted(formatted, 'layer')} with a number format")
    digest = recipe.input if len(recipe.input) <= _SHOWN else f"{recipe.input[:_SHOWN]}…"
    return f"made by {recipe.tool} from {digest}: {', '.join(options)}; {', '.join(parts)}"


def _options(values: Mapping[str, Any]) -> Iterator[str]:
    """Options as one would type them."""
    for name, value in values.items():
        if isinstance(value, list):
            yield from (named(name, item) for item in value)
        elif isinstance(value, dict):
            for key, item in value.items():
                sizes = isinstance(item, list)
                text = f"{key}:{','.join(map(str, item))}" if sizes else f"{key}={item}"
                yield named(name, text)
        else:
            yield named(name, value)
