"""Recipes as text: a JSON file with one line for each layer, and the metadata of a model.

``layers_digest`` is of the layers that the goal led to: it tells where they were changed by hand.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args, get_type_hints

import onnx

from onnx_lowrank.errors import InputError, named
from onnx_lowrank.files import is_file
from onnx_lowrank.graph.provenance import read_metadata
from onnx_lowrank.maps.formats import Format
from onnx_lowrank.ranks.recipe import Recipe, RecipeLayer, SharedFirst

__all__ = ["from_metadata", "load_recipe", "recipe_text", "to_metadata"]

_VERSION = 1
_KEYS = (
    "recipe",
    "tool",
    "input",
    "goal",
    "settings",
    "methods",
    "layers",
    "shared",
    "layers_digest",
)
_METHODS = ("fisher", "refit", "heal")


def recipe_text(recipe: Recipe) -> str:
    """The recipe as a file: keys and layers in a fixed order, one line for each layer."""
    head = {
        "recipe": _VERSION,
        "tool": recipe.tool,
        "input": recipe.input,
        "goal": dict(recipe.goal),
        "settings": dict(recipe.settings),
        "methods": dict(recipe.methods),
    }
    parts = [f"  {json.dumps(key)}: {_json(value)}" for key, value in head.items()]
    parts.append(_lines("layers", [_layer(layer) for layer in recipe.layers]))
    parts.append(_lines("shared", [_shared(own) for own in recipe.shared]))
    parts.append(f'  "layers_digest": {_json(recipe.layers_digest)}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _lines(key: str, rows: list[dict[str, Any]]) -> str:
    if not rows:
        return f'  "{key}": []'
    return f'  "{key}": [\n' + ",\n".join(f"    {_json(row)}" for row in rows) + "\n  ]"


def _layer(layer: RecipeLayer) -> dict[str, Any]:
    row = {"name": layer.name, "form": layer.form, "shape": list(layer.shape), "rank": layer.rank}
    return row if layer.format is None else {**row, "format": dataclasses.asdict(layer.format)}


def _short_layer(layer: RecipeLayer) -> dict[str, Any]:
    """The same; of its format only what differs from the default, as these are bytes of a model."""
    row = _layer(layer)
    if layer.format is not None:
        plain = {own.name: own.default for own in dataclasses.fields(Format)}
        row["format"] = {k: v for k, v in row["format"].items() if v != plain[k]}
    return row


def _shared(own: SharedFirst) -> dict[str, Any]:
    return {"layers": list(own.layers), "scales": list(own.scales)}


def to_metadata(recipe: Recipe) -> dict[str, str]:
    """The recipe as the metadata of the model that it makes; layers that stay dense are left out.

    Returns:
        name -> text (see `onnx_lowrank.graph.provenance`).
    """
    layers = [list(_short_layer(layer).values()) for layer in recipe.layers if not layer.kept]
    found = {"tool": recipe.tool, "input": recipe.input}
    found["goal"] = _compact(dict(recipe.goal))
    found["settings"] = _compact(dict(recipe.settings))
    if recipe.methods:
        found["methods"] = _compact(dict(recipe.methods))
    found["recipe"] = _compact(layers)
    if recipe.shared:
        found["shared"] = _compact([_shared(own) for own in recipe.shared])
    found["layers_digest"] = recipe.layers_digest
    return found


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def from_metadata(properties: Mapping[str, str], source: str) -> Recipe | None:
    """The recipe that a model was made by; None where its metadata hold none.

    Args:
        properties: the metadata of the model.
        source: how messages call the recipe.

    Raises:
        InputError: they are not what `to_metadata` writes.
    """
    found = read_metadata(properties)
    if "recipe" not in found:
        return None
    keys = ("name", "form", "shape", "rank", "format")
    try:
        rows = json.loads(found["recipe"])
        plain = {
            "recipe": _VERSION,
            "tool": found.get("tool", ""),
            "input": found.get("input", ""),
            "goal": json.loads(found.get("goal", "{}")),
            "settings": json.loads(found.get("settings", "{}")),
            "methods": json.loads(found.get("methods", "{}")),
            "layers": [dict(zip(keys, row, strict=False)) for row in rows],
            "shared": json.loads(found.get("shared", "[]")),
            "layers_digest": found.get("layers_digest", ""),
        }
    except (ValueError, TypeError) as error:
        raise InputError(
            f"{source}: its metadata hold no recipe that can be read: {error}"
        ) from error
    return _Reader(source).recipe(plain)


def load_recipe(path: Path) -> Recipe:
    """Read a recipe from its file, or from the metadata of a model that was made by one.

    Raises:
        InputError: the file cannot be read, or is none.
    """
    where = named("recipe", path)
    if not is_file(path):
        raise InputError(f"{where}: no such file")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{where}: {error.strerror or error}") from error
    if not content.lstrip().startswith((b"{", b"[")):
        return _of_model(path, where)
    try:
        plain = json.loads(content.decode("utf-8"))
    except ValueError as error:
        raise InputError(f"{where}: expected JSON: {error}") from error
    except RecursionError as error:
        raise InputError(f"{where}: expected a recipe, got JSON that is nested too deep") from error
    return dataclasses.replace(_Reader(where).recipe(plain), path=path)


def _of_model(path: Path, where: str) -> Recipe:
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # its errors have no common base
        raise InputError(
            f"{where}: expected a recipe that {named('save_recipe')} wrote, or a model that was "
            "made by one; got something else"
        ) from error
    found = from_metadata({p.key: p.value for p in model.metadata_props}, where)
    if found is None:
        raise InputError(
            f"{where}: expected a model that this tool made, got one without a recipe in its "
            "metadata"
        )
    return dataclasses.replace(found, path=path)


class _Reader:
    """From JSON to a recipe; an error names what is wrong."""

    def __init__(self, where: str) -> None:
        self._where = where

    def recipe(self, plain: Any) -> Recipe:
        found = self._table(plain, "the recipe", _KEYS)
        version = found.get("recipe")
        if version != _VERSION:
            raise self._wrong("recipe", f"version {_VERSION} of the format", version)
        layers = self._list(found.get("layers"), "layers")
        shared = self._list(found.get("shared", []), "shared")
        return Recipe(
            tool=self._text(found.get("tool", ""), "tool"),
            input=self._text(found.get("input", ""), "input"),
            goal=self._table(found.get("goal", {}), "goal"),
            settings=self._table(found.get("settings", {}), "settings"),
            methods=self._methods(found.get("methods", {})),
            layers=tuple(self._layer(row, number) for number, row in enumerate(layers, 1)),
            shared=tuple(self._shared(row, number) for number, row in enumerate(shared, 1)),
            layers_digest=self._text(found.get("layers_digest", ""), "layers_digest"),
        )

    def _methods(self, row: Any) -> dict[str, bool]:
        found = self._table(row, "methods", _METHODS)
        for name, taken in found.items():
            if not isinstance(taken, bool):
                raise self._wrong(f"methods: {name}", "true or false", taken)
        return found

    def _layer(self, row: Any, number: int) -> RecipeLayer:
        where = f"layer {number}"
        found = self._table(row, where, ("name", "form", "shape", "rank", "format"))
        name = self._text(found.get("name"), f"{where}: name")
        where = f"layer {name!r}"
        shape = self._list(found.get("shape"), f"{where}: shape")
        if len(shape) not in (2, 3) or not all(map(_whole, shape)):
            raise self._wrong(f"{where}: shape", "two or three whole numbers", shape)
        rank = found.get("rank")
        if rank is not None and not _whole(rank):
            raise self._wrong(f"{where}: rank", "a whole number, or null for dense", rank)
        form = found.get("format")
        return RecipeLayer(
            name,
            self._text(found.get("form"), f"{where}: form"),
            tuple(shape),
            rank,
            None if form is None else self._format(form, f"{where}: format"),
        )

    def _format(self, row: Any, where: str) -> Format:
        """A format from its fields, whatever they are."""
        kinds = get_type_hints(Format)
        found = self._table(row, where, tuple(kinds))
        needed = [
            own.name
            for own in dataclasses.fields(Format)
            if own.default is dataclasses.MISSING and own.default_factory is dataclasses.MISSING
        ]
        for name in needed:
            if name not in found:
                raise self._wrong(where, f"the key {name!r}", list(found))
        for name, value in found.items():
            options = get_args(kinds[name])
            admitted = value in options if options else isinstance(value, kinds[name])
            if isinstance(value, bool) != (kinds[name] is bool) or not admitted:
                some = " or ".join(map(str, options)) if options else kinds[name].__name__
                raise self._wrong(f"{where}: {name}", some, value)
        return Format(**found)

    def _shared(self, row: Any, number: int) -> SharedFirst:
        where = f"shared {number}"
        found = self._table(row, where, ("layers", "scales"))
        layers = self._list(found.get("layers"), f"{where}: layers")
        scales = self._list(found.get("scales"), f"{where}: scales")
        positive = all(type(scale) in (int, float) and 0 < scale < math.inf for scale in scales)
        if len(layers) < 2 or len(set(map(str, layers))) < len(layers):
            raise self._wrong(f"{where}: layers", "two or more different layers", layers)
        if not positive or len(scales) != len(layers):
            raise self._wrong(f"{where}: scales", "a number above 0 for each layer", scales)
        names = tuple(self._text(name, f"{where}: layers") for name in layers)
        return SharedFirst(names, tuple(map(float, scales)))

    def _table(self, value: Any, where: str, keys: tuple[str, ...] | None = None) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self._wrong(where, "an object of JSON", value)
        for key in value:
            if keys is not None and key not in keys:
                raise InputError(
                    f"{self._where}: {where}: unknown key {key!r}; expected one of "
                    f"{', '.join(keys)}"
                )
        return value

    def _list(self, value: Any, where: str) -> list[Any]:
        if not isinstance(value, list):
            raise self._wrong(where, "a list", value)
        return value

    def _text(self, value: Any, where: str) -> str:
        if not isinstance(value, str):
            raise self._wrong(where, "a text", value)
        return value

    def _wrong(self, what: str, expected: str, got: Any) -> InputError:
        shown = _short(json.dumps, got)
        return InputError(f"{self._where}: {what}: expected {expected}, got {shown}")


def _short(write: Callable[[Any], str], value: Any) -> str:
    text = write(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
