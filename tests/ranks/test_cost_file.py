"""The file that keeps the latencies of layers, and what is wrong with one of another hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnx_lowrank.errors import InputError
from onnx_lowrank.maps.formats import Format, Variant
from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.ranks import cost_file
from onnx_lowrank.ranks.costs import CostTable
from onnx_lowrank.ranks.formats import Formats
from onnx_lowrank.ranks.microbench import Rounds
from onnx_lowrank.ranks.times import Times
from tests.helpers.timed import F32, HERE, measured, product


def test_saved_and_loaded(tmp_path: Path) -> None:
    feed = {"x": np.ones((5, 96), F32)}
    table, (group,) = measured(product(96, 64), feed)
    cost_file.save(tmp_path / "c.json", table)
    assert [path.name for path in tmp_path.iterdir()] == ["c.json"]
    loaded = cost_file.load(tmp_path / "c.json")
    assert (loaded.place, loaded.times) == (table.place, dict(table.times))
    assert loaded.dense(group) is None  # which maps of which model is not in the file

    def never(models: Sequence[bytes], feed: Mapping[str, Array]) -> Rounds:
        raise AssertionError("nothing is left to measure")

    again, (group,) = measured(product(96, 64), feed, table=loaded, timer=never)
    assert again.dense(group) == 96 * 64
    assert again.pair(group, 11) == pytest.approx(11 * (96 + 64))


EIGHT, FOUR = Format(8, 128), Format(4, 32)


def test_times_of_formats(tmp_path: Path) -> None:
    """The timer counts elements of constants: codes, and a scale for each block of a column."""
    feed = {"x": np.ones((5, 128), F32)}
    own = Formats((None, EIGHT, FOUR, Format(4, 32, 8)), (None, EIGHT))
    table, (group,) = measured(product(128, 64), feed, own)
    assert table.time(group, Variant()) == 128 * 64
    assert table.time(group, Variant(None, EIGHT)) == 128 * 64 + 64
    assert table.time(group, Variant(None, FOUR)) == 128 * 64 + 4 * 64
    assert table.time(group, Variant(32)) == pytest.approx(32 * (128 + 64))
    paired = table.time(group, Variant(32, EIGHT))
    assert paired == pytest.approx(32 * (128 + 64) + 32 + 64)
    assert table.time(group, Variant(32, EIGHT), leads=False) == pytest.approx((paired or 0) / 3)
    assert table.time(group, Variant(32, FOUR)) is None  # was not asked for
    corrected = table.time(group, Variant(None, Format(4, 32, 8)))
    assert corrected == pytest.approx(128 * 64 + 4 * 64 + 8 * (128 + 64), rel=0.05)
    cost_file.save(tmp_path / "c.json", table)
    loaded = cost_file.load(tmp_path / "c.json")
    assert loaded.times == dict(table.times)

    def never(models: Sequence[bytes], feed: Mapping[str, Array]) -> Rounds:
        raise AssertionError("nothing is left to measure")

    again, (group,) = measured(product(128, 64), feed, own, table=loaded, timer=never)
    assert again.time(group, Variant(None, FOUR)) == 128 * 64 + 4 * 64
    floats, (group,) = measured(product(128, 64), feed)
    more, (group,) = measured(product(128, 64), feed, own, table=floats)  # lacks the formats
    assert more.time(group, Variant(None, FOUR)) == 128 * 64 + 4 * 64


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"save_costs=.*none.c\.json"):
        cost_file.save(tmp_path / "none" / "c.json", CostTable(HERE, {}))


def _content() -> dict[str, Any]:
    return {
        "version": 1,
        "place": {"provider": "p", "threads": 1, "processor": "c", "runtime": "1"},
        "maps": [
            {
                "form": "matmul-right",
                "node": "MatMul",
                "inputs": ["float[1, 9]", "float[9, 9] weight"],
                "shape": [1, 9, 9],
                "dense_ns": 10.0,
                "ranks": [1, 4],
                "pair_ns": [3.0, 9.0],
                "widths": [0.1, 0.1],
                "rounds": 15,
                "multiple": None,
            }
        ],
    }


def test_a_file_of_another_hand(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(json.dumps(_content()))
    (times,) = cost_file.load(tmp_path / "c.json").times.values()
    assert times == Times(10.0, (1, 4), (3.0, 9.0), (0.1, 0.1), 15)


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (("version",), 2, "expected version 1 of the format, got 2"),
        (("place", "threads"), "two", "'threads': expected a whole number from 1, got 'two'"),
        (("place",), None, "load_costs"),
        (("maps",), {}, "'maps' is no list"),
        (("maps", 0, "ranks"), [4, 1], r"map 0: 'ranks': expected rising whole numbers"),
        (("maps", 0, "ranks"), [], r"map 0: 'ranks'"),
        (("maps", 0, "pair_ns"), [1.0], "map 0: 'pair_ns': expected 2 finite numbers"),
        (("maps", 0, "pair_ns"), [0, 1], "map 0: 'pair_ns': expected numbers above 0"),
        (("maps", 0, "dense_ns"), -1, "map 0: 'dense_ns'"),
        (("maps", 0, "dense_ns"), float("nan"), "map 0: 'dense_ns'"),
        (("maps", 0, "shape"), [9, 9], "map 0: 'shape': expected 3 whole numbers"),
        (("maps", 0, "node"), 3, "map 0: 'node': expected text, got 3"),
        (("maps", 0), 3, "map 0: "),
    ],
)
def test_a_damaged_file(tmp_path: Path, where: tuple[Any, ...], value: Any, message: str) -> None:
    content: Any = _content()
    inner = content
    for step in where[:-1]:
        inner = inner[step]
    inner[where[-1]] = value
    (tmp_path / "c.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=message) as caught:
        cost_file.load(tmp_path / "c.json")
    assert str(caught.value).startswith(f"load_costs='{tmp_path / 'c.json'}': ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "expected JSON"), ("[]", "got something else"), ("{}", "got something else")],
)
def test_no_cost_file(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(InputError, match=message):
        cost_file.load(tmp_path / "c.json")
    with pytest.raises(InputError, match=r"none.json': cannot be read"):
        cost_file.load(tmp_path / "none.json")
