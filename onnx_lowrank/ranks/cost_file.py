"""A cost table in a file: JSON with plain keys, so that another machine can measure and edit it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from onnx_lowrank.errors import InputError, named
from onnx_lowrank.files import Output, write_text
from onnx_lowrank.maps.formats import Activations
from onnx_lowrank.ranks.costs import CostTable
from onnx_lowrank.ranks.times import CostKey, FormatTimes, Place, Times

__all__ = ["load", "save"]

_VERSION = 1


def save(path: Path, table: CostTable) -> None:
    """Write the times, whole or not at all; which layers they belong to follows from the model.

    Raises:
        InputError: the place cannot be written.
    """
    content = {
        "version": _VERSION,
        "place": asdict(table.place),
        "maps": [{**asdict(key), **asdict(times)} for key, times in sorted(table.times.items())],
    }
    write_text(Output(path, "save_costs"), json.dumps(content, indent=1) + "\n")


def load(path: Path) -> CostTable:
    """Read times of any model.

    Raises:
        InputError: the file cannot be read, or is something else.
    """
    option = named("load_costs", path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{option}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(
            f"{option}: expected JSON that {named('save_costs')} wrote: {error}"
        ) from error
    if not isinstance(content, Mapping) or "version" not in content:
        raise InputError(
            f"{option}: expected JSON that {named('save_costs')} wrote, got something else"
        )
    if content["version"] != _VERSION:
        raise InputError(
            f"{option}: expected version {_VERSION} of the format, got {content['version']!r}"
        )
    try:
        place = Place(
            provider=_text(content["place"], "provider"),
            threads=_whole(content["place"], "threads"),
            processor=_text(content["place"], "processor"),
            runtime=_text(content["place"], "runtime"),
        )
        items = content["maps"]
        if not isinstance(items, list):
            raise ValueError("'maps' is no list")
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{option}: {_reason(error)}") from error
    times: dict[CostKey, Times] = {}
    for number, item in enumerate(items):
        try:
            times[_key(item)] = _times(item)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{option}: map {number}: {_reason(error)}") from error
    return CostTable(place, times)


def _reason(error: Exception) -> str:
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)


def _key(item: Mapping[str, Any]) -> CostKey:
    shape = tuple(item["shape"])
    if len(shape) != 3 or not all(isinstance(size, int) for size in shape):
        raise ValueError(f"'shape': expected 3 whole numbers, got {item['shape']!r}")
    return CostKey(
        form=_text(item, "form"),
        node=_text(item, "node"),
        inputs=tuple(str(text) for text in item["inputs"]),
        shape=(shape[0], shape[1], shape[2]),
    )


def _times(item: Mapping[str, Any]) -> Times:
    ranks = item["ranks"]
    if not all(_is_whole(rank) for rank in ranks) or sorted(set(ranks)) != ranks or not ranks:
        raise ValueError(f"'ranks': expected rising whole numbers from 1, got {ranks!r}")
    pair = _numbers(item, "pair_ns", len(ranks))
    if not all(pair):
        raise ValueError(f"'pair_ns': expected numbers above 0, got {item['pair_ns']!r}")
    (dense,) = _numbers({"dense_ns": [item["dense_ns"]]}, "dense_ns", 1)
    if not dense:
        raise ValueError(f"'dense_ns': expected a number above 0, got {item['dense_ns']!r}")
    return Times(
        dense_ns=dense,
        ranks=tuple(ranks),
        pair_ns=pair,
        widths=_numbers(item, "widths", len(ranks)),
        rounds=_whole(item, "rounds"),
        multiple=None if item["multiple"] is None else _whole(item, "multiple"),
        formats=tuple(_format(own, len(ranks)) for own in item.get("formats", ())),
    )


def _format(item: Mapping[str, Any], count: int) -> FormatTimes:
    if not isinstance(item, Mapping):
        raise ValueError(f"'formats': expected objects, got {item!r}")
    (dense,) = _numbers({"dense_ns": [item["dense_ns"]]}, "dense_ns", 1)
    pairs = _numbers(item, "pair_ns", count if item["pair_ns"] else 0)
    if not dense or not all(pairs):
        raise ValueError(f"'formats': expected times above 0, got {item!r}")
    activations = item.get("activations", "float")
    if activations not in get_args(Activations):
        some = ", ".join(get_args(Activations))
        raise ValueError(f"'activations': expected one of {some}, got {activations!r}")
    column = activations != "float" and item["block"] == 0
    block = 0 if column else _whole(item, "block")
    return FormatTimes(_whole(item, "bits"), block, dense, pairs, activations)


def _text(item: Mapping[str, Any], name: str) -> str:
    if not isinstance(item[name], str):
        raise ValueError(f"{name!r}: expected text, got {item[name]!r}")
    return str(item[name])


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _whole(item: Mapping[str, Any], name: str) -> int:
    if not _is_whole(item[name]):
        raise ValueError(f"{name!r}: expected a whole number from 1, got {item[name]!r}")
    return int(item[name])


def _numbers(item: Mapping[str, Any], name: str, count: int) -> tuple[float, ...]:
    values = item[name]
    if len(values) != count or not all(
        isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) and v >= 0
        for v in values
    ):
        raise ValueError(f"{name!r}: expected {count} finite numbers from 0, got {values!r}")
    return tuple(float(value) for value in values)
