"""The damage of several layers at once, on as many samples as it takes to tell it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import onnx_ir as ir
import pytest

from onnx_lowrank import compress
from onnx_lowrank.fitting.statistics import Statistics
from onnx_lowrank.maps.pair import constants_of
from onnx_lowrank.numerics.arrays import Array, Feed
from onnx_lowrank.numerics.moments import Moments
from onnx_lowrank.ranks.probe import Probe
from onnx_lowrank.ranks.together import Together
from tests.helpers.models import parse
from tests.helpers.timed import groups_of

HEAD = '<ir_version: 8, opset_import: ["" : 17]>'


class Told:
    """Stands for a probe: its own samples have damages that are told, others that of their x."""

    def __init__(self, damages: Sequence[float | None]) -> None:
        self.own = list(damages)
        self.feeds: list[Feed] = [{}] * len(damages)
        self.asked: list[float] = []

    def places(self) -> tuple[int, ...]:
        return tuple(range(len(self.own)))

    def damages(self, _: Mapping[str, Array], places: Sequence[int]) -> list[float | None]:
        return [self.own[place] for place in places]

    def further(self, _: Mapping[str, Array], feeds: Sequence[Feed]) -> Iterator[float | None]:
        self.asked += [float(feed["x"]) for feed in feeds]
        return (float(feed["x"]) for feed in feeds)


def together(told: Told, further: Sequence[float]) -> Together:
    feeds: list[Feed] = [{"x": np.array(value)} for value in further]
    return Together(cast(Probe, told), Statistics(), {}, feeds)


def test_samples_that_agree_are_enough() -> None:
    told = Told([1.0, 1.1, 0.9, 1.0, 1.1, 0.9])
    found = together(told, [5.0] * 20).measured({})
    assert found.mean == pytest.approx(1.0)
    assert not told.asked


@pytest.mark.parametrize("own", [[1.0, 1.0], [0.0, 0.0, 8.0, 0.0, 0.0, 0.0], [0.0] * 6])
def test_where_they_do_not_more_are_asked(own: list[float]) -> None:
    """Two that agree say nothing, and no damage at all is no finding."""
    told = Told(own)
    search = together(told, [2.0, 4.0])
    found = search.measured({})
    assert sorted(told.asked) == [2.0, 4.0]
    assert search.asked == 2
    assert found.mean == pytest.approx((sum(own) + 6.0) / (len(own) + 2))
    assert found.error is not None


def test_no_more_are_asked_than_it_takes() -> None:
    told = Told([0.5, 1.5, 1.5, 0.5, 0.2, 1.8])
    found = together(told, list(np.linspace(0.8, 1.2, 100))).measured({})
    assert 6 <= len(told.asked) < 24
    # They lie evenly among all.
    assert min(told.asked) < 0.9
    assert max(told.asked) > 1.1
    assert found.error is not None
    assert found.error <= 0.15 * (found.mean or 0.0)


def test_four_times_as_many_at_most() -> None:
    told = Told([0.0, 9.0])
    together(told, [0.0, 3.0] * 50).measured({})
    assert len(told.asked) == 8


def test_what_cannot_be_compared_is_not_asked_again() -> None:
    told = Told([None, None])
    assert together(told, [1.0]).measured({}).mean is None
    assert not told.asked


def test_the_gain_of_what_was_fitted_is_taken_off(rng: np.random.Generator) -> None:
    """Where a fit to few rows hides an error in what they do not reach."""
    weights = {name: rng.standard_normal((16, 12)).astype(np.float32) for name in "VW"}
    body = "h = MatMul (x, V)\n y = MatMul (x, W)"
    proto = parse(
        f"{HEAD} g (float[N,16] x) => (float[N,12] h, float[N,12] y) {{ {body} }}", weights
    )
    groups = groups_of(ir.from_proto(proto))
    every, few = rng.standard_normal((400, 16)), rng.standard_normal((8, 16))
    unseen = np.linalg.svd(few)[2][-1:]  # no row of the few has a part of it
    errors = {
        "V": 0.1 * rng.standard_normal((16, 12)),
        "W": unseen.T @ rng.standard_normal((1, 12)),
    }
    fit, held = (Moments(x.T @ x / len(x), x.mean(0), len(x)) for x in (few, every))
    statistics = Statistics(fit=dict.fromkeys(groups, (fit,)), held=dict.fromkeys(groups, (held,)))
    constants: dict[str, Array] = {}
    for group in groups:
        own = group.matrix.numpy() - errors[group.matrix.name]
        constants |= constants_of(group, own.astype(np.float32))
    slopes = {group: 2.0 if group.matrix.name == "V" else 1.0 for group in groups}
    told = Told([1.0, 1.0])
    search = Together(cast(Probe, told), statistics, slopes, [{"x": np.array(1.0)}])
    felt = [
        sum(
            slopes[group] * float(np.square(x @ errors[group.matrix.name]).sum()) / len(x)
            for group in groups
        )
        for x in (few, every)
    ]
    factor = search.optimism(constants)
    assert factor == pytest.approx(felt[1] / felt[0], rel=1e-3)
    assert factor > 1.5
    assert search.measured(constants).mean == pytest.approx((2.0 + factor) / 3.0)
    # Never a gain of samples that nothing was fitted to.
    turned = Statistics(fit=statistics.held, held=statistics.fit)
    assert Together(cast(Probe, told), turned, slopes).optimism(constants) == 1.0


def test_outputs_that_leap(rng: np.random.Generator) -> None:
    """Two batches judge; what is predicted comes from all ten, and a note says so."""
    weights: dict[str, Any] = {
        "V": rng.standard_normal((24, 48)) / 5,
        "W": 6 * rng.standard_normal((48, 20)),
    }
    body = "h = MatMul (x, V)\n t = Tanh (h)\n l = MatMul (t, W)\n y = Softmax (l)"
    model = parse(
        f"{HEAD} g (float[N,24] x) => (float[N,20] y) {{ {body} }}",
        {name: array.astype(np.float32) for name, array in weights.items()},
    )

    def batches(count: int) -> list[Feed]:
        return [{"x": rng.standard_normal((8, 24)).astype(np.float32)} for _ in range(count)]

    result = compress(
        model, keep=0.7, calibration=batches(10), data=batches(30), bench=False, simplify=False
    )
    goal = result.report.goal
    assert goal is not None
    assert goal.predicted_damage is not None
    assert goal.achieved_damage is not None
    assert 0.6 < goal.predicted_damage / goal.achieved_damage < 1.6
    assert any("leave the damage unsure" in note for note in result.report.notes)
