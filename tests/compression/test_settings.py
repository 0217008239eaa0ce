"""The checks of the options, as a caller of `compress` gets them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from onnx_lowrank import UsageError, compress
from onnx_lowrank.compression.options import OPTIONS
from onnx_lowrank.compression.settings import Settings
from onnx_lowrank.compression.verbs import SETTINGS
from onnx_lowrank.errors import named, spelled
from onnx_lowrank.graph.wishes import WISHES
from onnx_lowrank.ranks.goals import OBJECTIVES


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"energy": 0.0}, r"^energy=…: expected a number above 0 and up to 1, got 0\.0$"),
        ({"energy": 1.5}, r"got 1\.5; did you mean 0\.015\?"),
        ({"energy": 95}, r"got 95; did you mean 0\.95\?"),
        ({"energy": float("nan")}, "energy=…: .* got nan"),
        ({"energy": "0.9"}, "energy=…: .* got '0.9'"),
        ({"energy": True}, "energy=…: .* got True"),
        ({"keep": 0.0}, "keep=…: .* got 0"),
        ({"keep": -0.1}, "keep=…"),
        ({"keep": 1.01}, "keep=…"),
        ({"rank": 0}, "rank=…: expected a whole number from 1, got 0"),
        ({"rank": -3}, "rank=…"),
        ({"rank": 1.5}, "rank=…: .* got 1.5"),
        ({"rank_multiple": 0}, "rank_multiple=…: expected a whole number from 1 or auto, got 0"),
        ({"min_gain": 1.0}, r"min_gain=…: expected a number from -1 and below 1, got 1\.0"),
        ({"min_gain": -1.1}, "min_gain=…"),
        ({"min_gain": float("inf")}, "min_gain=…"),
        ({"min_gain": None}, "min_gain=…: .* got None"),
        ({"energy": 0.9, "rank": 3}, "expected one goal, got energy=… and rank=…"),
        ({"energy": 0.9, "rank": 3, "keep": 0.5}, "energy=… and rank=… and keep=…"),
        ({"include": "fc1"}, "include=…: expected a sequence, got 'fc1'"),
        ({"ops": "all"}, "ops=…: expected a sequence, got 'all'"),
        ({"exclude": [1]}, "exclude=…: expected texts, got 1"),
        ({"refit": 1}, "refit=…: expected True or False, got 1"),
        ({"check": "no"}, "check=…: expected True or False, got 'no'"),
        ({"dims": {"N": -1}}, "dims=…: expected a mapping"),
        ({"input_shapes": {"x": 3}}, "input_shapes=…: expected a mapping"),
        ({"shape_for": "warp9"}, "shape_for=…: expected one of cpu, arm, .* got 'warp9'"),
        ({"load_stats": "a", "mask": "m"}, "load_stats=… and mask=… exclude each other"),
        ({"max_size": "20"}, r"max_size=…: .* got 20 bytes; did you mean 20MB\?"),
        ({"max_size": " 500 "}, r"got 500 bytes; did you mean 500MB\?"),
        ({"save_costs": 3}, "save_costs=…: expected a path, got 3"),
        ({"ep": None}, "ep=…: expected a text, got None"),
        ({"metric": 3, "tolerance": 0.1}, "metric=…: expected relative-l2, .* got 3"),
    ],
)
def test_values_out_of_range(options: dict[str, Any], message: str) -> None:
    """The model is not looked at."""
    with pytest.raises(UsageError, match=message):
        compress("none.onnx", **options)


def test_a_usage_error_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="energy=…"):
        Settings(energy=2.0)


def test_numbers_of_numpy_are_numbers() -> None:
    settings = Settings.of({"keep": np.float32(0.5), "samples": np.int64(3)})
    assert settings.budget is not None
    assert settings.budget.value == 0.5
    assert settings.samples == 3


def test_defaults_are_settled() -> None:
    assert Settings().energy == 0.95
    assert Settings(keep=0.5).energy is None
    assert Settings().rank_multiple == 8
    assert Settings(shape_for="qnn").rank_multiple == WISHES["qnn"].rank_multiple


def test_choices_are_those_of_the_packages_that_make_them() -> None:
    assert set(OPTIONS["shape_for"].choices) == set(WISHES)
    assert set(OPTIONS["objective"].choices) == set(OBJECTIVES)


def test_the_report_names_every_option() -> None:
    def score(*_: object) -> float:
        return 1.0

    plain = Settings.of({"tolerance": 0.1, "metric": score, "data": {"x": np.ones(3)}}).to_dict()
    assert list(plain) == [option.name for option in SETTINGS]
    assert plain["metric"].endswith("score")
    assert plain["data"] == "a dict of arrays"


def test_an_option_is_spelled_by_who_asks() -> None:
    assert (named("keep"), named("max_error", 0.1)) == ("keep=…", "max_error=0.1")
    with spelled(lambda name, value: f"/{name}{value}"):
        assert named("keep", 1) == "/keep(1,)"
    assert named("check", False) == "check=False"
